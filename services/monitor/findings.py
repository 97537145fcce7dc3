"""What is wrong in the fleet: a pure function of two looks at it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shared.status import Status


@dataclass(frozen=True)
class Finding:
    """One alert: its kind, what it is about, and a sentence."""

    kind: str
    subject: str
    text: str


def findings(before: Sequence[Status], now: Sequence[Status]) -> list[Finding]:
    """Instances that fell silent without draining, and shards that nobody serves although a router needs them."""
    present = {(s.service, s.instance) for s in now}
    found = [
        Finding("service_down", s.instance, f"{s.service} {s.instance} has fallen silent")
        for s in before
        if (s.service, s.instance) not in present and s.state != "draining"
    ]
    for deployment, missing in shards_missing(now).items():
        found += [
            Finding("shard_without_replica", f"{deployment}/{shard}", f"no worker serves shard {shard} of {deployment}")
            for shard in missing
        ]
    return found


def shards_missing(now: Sequence[Status]) -> dict[str, list[int]]:
    """Per deployment that has a ready router: the shards that no ready worker serves."""
    result = {}
    for deployment in sorted({s.deployment for s in now if s.service == "router" and s.state == "ready"}):
        mine = [s for s in now if s.deployment == deployment]
        served = {shard for s in mine if s.service == "expert" and s.state == "ready" for shard in s.shards}
        num_shards = max(s.num_shards for s in mine)
        result[deployment] = [shard for shard in range(num_shards) if shard not in served]
    return result
