"""Every name on the bus is built, and parsed, here and nowhere else."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"[A-Za-z0-9_-]+\Z")

STATUS_ALL = "moe.status.>"
PLAN_ALL = "moe.*.plan"
EVENTS_ALL = "moe.events.>"
ROUTER_QUEUE = "router"
KINDS = ("generate", "forward", "experts", "worker", "control", "plan")
EVENT_KINDS = ("alert", "rebalance", "rollout", "scaling", "takeover")
"""Of `moe.events.<kind>`; `audit` is not among them, as no subject may be in two streams."""


def token(value: str) -> str:
    """`value`, if it may stand in a subject: nats-py checks nothing, and CR/LF would inject protocol.

    Raises:
        ValueError: for anything but letters, digits, `_` and `-`.

    """
    if not is_token(value):
        raise ValueError(f"{value!r} cannot be part of a NATS subject (letters, digits, '_' and '-' only)")
    return value


def is_token(value: str) -> bool:
    """Whether `value` may stand in a subject."""
    return _TOKEN.match(value) is not None


def slug(name: str) -> str:
    """`name` made into a subject token."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "model"


def deployment(model: str, fingerprint: str) -> str:
    """`demo-3f2a91bc`: a model's slug and the first 8 hex digits of its checkpoint's fingerprint."""
    return f"{slug(model)}-{fingerprint[:8]}"


def generate(deployment: str, instance: str = "") -> str:
    """Generations, for any router of the deployment, or for the one called `instance`."""
    return f"moe.{token(deployment)}.generate" + (f".{token(instance)}" if instance else "")


def forward(deployment: str, instance: str = "") -> str:
    """Forward passes through one MoE layer, for any router of the deployment, or for the one called `instance`."""
    return f"moe.{token(deployment)}.forward" + (f".{token(instance)}" if instance else "")


def experts(deployment: str, shard: int) -> str:
    return f"moe.{token(deployment)}.experts.{int(shard)}"


def shard_queue(shard: int) -> str:
    return f"shard-{int(shard)}"


def worker(deployment: str, instance: str) -> str:
    return f"moe.{token(deployment)}.worker.{token(instance)}"


def plan(deployment: str) -> str:
    """Where the monitor tells which experts have copies."""
    return f"moe.{token(deployment)}.plan"


def parse_plan(subject: str) -> str:
    """The deployment of a plan's subject; the inverse of `plan`.

    Raises:
        ValueError: if it is none.

    """
    parts = subject.split(".")
    if len(parts) != 3 or parts[0] != "moe" or parts[2] != "plan":
        raise ValueError(f"{subject!r} is not a plan's subject")
    return token(parts[1])


def status(service: str, instance: str) -> str:
    return f"moe.status.{token(service)}.{token(instance)}"


def parse_status(subject: str) -> tuple[str, str]:
    """(service, instance) of a status subject; the inverse of `status`.

    Raises:
        ValueError: if it is none.

    """
    parts = subject.split(".")
    if len(parts) != 4 or parts[:2] != ["moe", "status"]:
        raise ValueError(f"{subject!r} is not a status subject")
    return token(parts[2]), token(parts[3])


def control(service: str, instance: str) -> str:
    return f"moe.control.{token(service)}.{token(instance)}"


def event(kind: str) -> str:
    return f"moe.events.{token(kind)}"


def kind(subject: str) -> str:
    """Which form `subject` has: generate, forward, experts, worker, control, plan, or other."""
    parts = subject.split(".")
    found = "control" if parts[1:2] == ["control"] else parts[2] if len(parts) > 2 else ""
    return found if parts[0] == "moe" and found in KINDS else "other"


AUDIT = event("audit")


def inbox_prefix(service: str, instance: str) -> str:
    """A prefix per service, so that permissions can keep one from reading another's replies."""
    return f"_INBOX_{token(service)}.{token(instance)}"


def discovery(verb: str, service: str = "", instance: str = "") -> str:
    """`$SRV.<verb>` of everybody, of one service, or of one instance (NATS ADR-32)."""
    parts = ["$SRV", token(verb)]
    if service:
        parts.append(f"openmoe-{token(service)}")
        if instance:
            parts.append(token(instance))
    return ".".join(parts)
