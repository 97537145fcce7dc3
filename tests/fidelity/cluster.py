"""One router and its expert workers as real processes, for a checkpoint and a number of shards."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from shared.checkpoint import Checkpoint
from shared.status import Fleet
from tests.running import Running, start_service, wait_until

# Shards -> what each worker is pinned to; an empty string leaves it to the workers to share them.
WORKERS: dict[int, tuple[str, ...]] = {1: ("",), 2: ("", ""), 4: ("0,2", "1,3")}


@dataclass(frozen=True)
class Cluster:
    """What serves one deployment."""

    deployment: str
    shards: int
    processes: list[Running]

    def _covered(self, fleet: Fleet) -> bool:
        for running in self.processes:
            assert running.process.returncode is None, f"it ended before it was ready; {running.said()}"
        routers = [s for s in fleet.live("router") if s.deployment == self.deployment and s.state == "ready"]
        return bool(routers) and fleet.covered_shards(self.deployment) == set(range(self.shards))

    async def ready(self, fleet: Fleet) -> None:
        """Wait until the router and a worker of every shard say that they are ready."""
        said = "\n".join(running.said() for running in self.processes)
        await wait_until(lambda: self._covered(fleet), f"{self.deployment} to be ready; {said}")

    async def stop(self) -> None:
        """SIGTERM to all at once; each must end with exit code 0."""
        await asyncio.gather(*(running.stop() for running in self.processes))

    async def kill(self) -> None:
        await asyncio.gather(*(running.kill() for running in self.processes))


async def start_cluster(
    folder: Path, path: Path, nats_url: str, shards: int, *, workers: tuple[str, ...] | None = None, **settings: str
) -> Cluster:
    """Start the processes that serve the checkpoint at `path`; they may not be ready yet.

    Args:
        folder: where their logs go.
        path: the checkpoint.
        nats_url: their bus.
        shards: EXPERT_SHARDS.
        workers: the shards that each worker is pinned to; default: as `WORKERS` says.
        settings: more settings, for all of them.

    """
    workers = WORKERS[shards] if workers is None else workers
    name = f"{path.name}-{shards}-{len(workers)}"
    common = {
        "MODEL": str(path),
        "SERVED_MODEL_NAME": name,
        "NATS_URL": nats_url,
        "EXPERT_SHARDS": str(shards),
        "WORKERS": str(len(workers)),
        "KV_CACHE_MB": "16",
        "METRICS_PORT": "0",
        "LOG_LEVEL": "WARNING",
        **settings,
    }
    started = [start_service(folder, "router", **common, INSTANCE=f"router-{name}")]
    for number, pinned in enumerate(workers):
        started.append(start_service(folder, "expert", **common, INSTANCE=f"expert-{name}-{number}", SHARDS=pinned))
    return Cluster(Checkpoint.open(path).deployment(name), shards, await asyncio.gather(*started))
