"""Which shards nobody serves: a pure function of a look at the fleet."""

from __future__ import annotations

from collections.abc import Sequence

from shared.status import Status


def shards_missing(now: Sequence[Status]) -> dict[str, list[int]]:
    """Per deployment that has a ready router: the shards that no ready worker serves."""
    result = {}
    for deployment in sorted({s.deployment for s in now if s.service == "router" and s.state == "ready"}):
        mine = [s for s in now if s.deployment == deployment]
        served = {shard for s in mine if s.service == "expert" and s.state == "ready" for shard in s.shards}
        num_shards = max(s.num_shards for s in mine)
        result[deployment] = [shard for shard in range(num_shards) if shard not in served]
    return result
