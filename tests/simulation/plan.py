"""What a seed stands for: a fleet, a load, and what goes wrong when."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from typing import Literal

from services.monitor.messages import PARTS, ExpertPlan, SplitExpert
from services.router.messages import GenerateRequest, Sampling
from shared.settings import DegradedMode
from tests.simulation.numerics import EXPERTS, VOCAB, oracle

Kind = Literal["gateway", "router", "expert"]
Action = Literal["crash", "stop", "reset", "cut", "term", "slow", "nats"]

LOAD_SECONDS = 6.0
"""Requests come within so many seconds, or sooner, and faults begin within half of it."""
CHARACTERS = [chr(0x30 + token) for token in range(VOCAB)]


@dataclass(frozen=True)
class Request:
    """One client's request, and what it must give."""

    request: GenerateRequest
    stops: list[str]
    at: float
    gateway: int
    leaves_after: float | None
    """Seconds after which the client goes away, if it does."""
    reader_seconds: float
    """How long the client takes to read a piece."""
    tokens: list[int]
    text: str
    scores: list[object]
    reason: str


@dataclass(frozen=True)
class Fault:
    """Something that happens to a process, or to NATS, and passes again."""

    at: float
    action: Action
    kind: Kind
    index: int
    seconds: float
    """How long it lasts: until the restart, the SIGCONT, or the network's return. What was sent before a reset in so many
    seconds is lost with it."""

    def __str__(self) -> str:
        of = "nats" if self.action == "nats" else f"{self.action} {self.kind} {self.index}"
        return f"{of} at {self.at:.3f} s for {self.seconds:.3f} s"


@dataclass(frozen=True)
class Plan:
    """Everything that a run does, but for the network's latencies."""

    seed: int
    gateways: int
    routers: int
    shards: int
    workers: int
    moe_layers: int
    blocks: int
    block_tokens: int
    batch_size: int
    prefill_chunk_tokens: int
    max_concurrent: int
    latency: float
    spikes: float
    compute_seconds: float
    load_seconds: float
    burst_seconds: float
    """Within which all requests come."""
    degraded_mode: DegradedMode
    requests: list[Request] = field(default_factory=list)
    expert_plans: list[ExpertPlan] = field(default_factory=list)
    """What a monitor tells, each from its time on, in seconds after the start of the load."""
    faults: list[Fault] = field(default_factory=list)

    @property
    def replicas(self) -> int:
        return self.workers // self.shards


def make_plan(seed: int) -> Plan:
    draw = random.Random(seed)
    shards = draw.randint(1, 3)
    workers = min(5, max(2, shards * draw.randint(1, 3)))
    block_tokens = draw.choice((2, 4, 8))
    plan = Plan(
        seed=seed,
        gateways=draw.choice((1, 1, 2, 3)),
        routers=draw.choice((1, 2, 2, 3)),
        shards=shards,
        workers=workers,
        moe_layers=draw.choice((1, 1, 2)),
        blocks=-(-draw.choice((48, 64, 160)) // block_tokens),
        block_tokens=block_tokens,
        batch_size=draw.choice((2, 4, 8)),
        prefill_chunk_tokens=draw.choice((4, 8, 32)),
        max_concurrent=draw.choice((2, 8)),
        latency=draw.choice((0.0002, 0.001, 0.005, 0.02)),
        spikes=draw.choice((0.0, 0.0, 0.02)),
        compute_seconds=draw.choice((0.01, 0.05, 0.1)),
        load_seconds=draw.choice((0.05, 0.5, 1.0)),
        burst_seconds=draw.choice((0.1, 2.0, LOAD_SECONDS)),
        degraded_mode="skip" if draw.random() < 0.1 else "fail",
    )
    for number in range(draw.randint(2, 8)):
        plan.requests.append(_request(draw, plan, number))
    for _ in range(draw.choice((0, 1, 2, 3, 4, 6))):
        plan.faults.append(_fault(draw, plan))
    plan.faults.sort(key=lambda fault: fault.at)
    for number in range(draw.choice((0, 1, 2, 4)) if shards > 1 else 0):
        plan.expert_plans.append(_expert_plan(draw, plan, number))
    return plan


def _expert_plan(draw: random.Random, plan: Plan, number: int) -> ExpertPlan:
    """Experts split among shards at random. Now and then two plans have the same epoch."""
    experts = []
    for layer in range(plan.moe_layers):
        for expert in sorted(draw.sample(range(EXPERTS), draw.randint(0, 4))):
            shards = sorted(draw.sample(range(plan.shards), draw.randint(1, plan.shards)))
            cuts = sorted(draw.sample(range(1, PARTS), len(shards) - 1))
            parts = [after - before for before, after in itertools.pairwise([0, *cuts, PARTS])]
            experts.append(SplitExpert(layer=layer, expert=expert, shards=tuple(zip(shards, parts, strict=True))))
    return ExpertPlan(
        epoch=1 + number - (number > 1 and draw.random() < 0.2),
        num_shards=plan.shards,
        experts=tuple(experts),
        time=LOAD_SECONDS * (number + draw.random()) / 5,
        before=2.0,
        expected=1.0,
        reason="simulated",
    )


def _request(draw: random.Random, plan: Plan, number: int) -> Request:
    sampling = Sampling(
        temperature=draw.choice((0.0, 1.0)),
        seed=draw.randrange(2**32),
        presence_penalty=draw.choice((0.0, 0.5)),
    )
    request = GenerateRequest(
        id=f"request-{number}",
        token_ids=[draw.randrange(1, VOCAB) for _ in range(draw.choice((1, 3, 9, 20)))],
        max_tokens=draw.choice((0, 1, 6, 12, 12, 25, 25)),
        sampling=sampling,
        stop_token_ids=draw.choice(([], [draw.randrange(VOCAB)])),
        ignore_eos=draw.random() < 0.5,
        logprobs=draw.choice((-1, 0)),
        prompt_logprobs=draw.choice((-1, -1, 0)),
        return_routing=draw.random() < 0.25,
    )
    tokens, scores, reason = oracle(request, plan.moe_layers)
    shown = tokens
    if reason == "stop":
        shown = tokens[:-1]
    text = "".join(CHARACTERS[token] for token in shown)
    stops: list[str] = []
    if len(text) > 3 and draw.random() < 0.3:
        at = draw.randrange(1, len(text) - 1)
        stops = [text[at : at + 2]]
        at = text.find(stops[0])
        text, tokens, reason = text[:at], tokens[: at + 2], "stop"
    return Request(
        request=request,
        stops=stops,
        at=draw.random() * plan.burst_seconds,
        gateway=draw.randrange(plan.gateways),
        leaves_after=draw.random() * 3 if draw.random() < 0.15 else None,
        reader_seconds=draw.choice((0.0, 0.0, 0.0, 0.3)),
        tokens=tokens,
        text=text,
        scores=list(scores),
        reason=reason,
    )


def _fault(draw: random.Random, plan: Plan) -> Fault:
    action: Action = draw.choice(("crash", "crash", "crash", "stop", "stop", "reset", "cut", "term", "slow", "nats"))
    kind: Kind = draw.choice(("gateway", "router", "router", "expert", "expert", "expert"))
    if action == "slow":
        kind = "expert"
    count = {"gateway": plan.gateways, "router": plan.routers, "expert": plan.workers}[kind]
    seconds = {
        "crash": 0.2 + 3 * draw.random(),
        "stop": 0.1 + 7 * draw.random(),
        "reset": 0.4 * draw.random(),
        "cut": 0.1 + 9 * draw.random(),
        "term": 0.5 * draw.random(),
        "slow": 1 + 4 * draw.random(),
        "nats": 0.1 + 4 * draw.random(),
    }[action]
    return Fault(draw.random() * LOAD_SECONDS / 2, action, kind, draw.randrange(count), seconds)
