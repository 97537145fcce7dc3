"""Who serves what, by the fleet's reports, and which of them to ask next. A pure core: the clock is passed in.

Outlier ejection as Envoy has it: whoever fails is left out for a while, longer each time in a row, and let back in when
it answers, or when the time is over and it has reported since. The last one stays in whatever happens: somebody
doubtful is better than nobody.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from shared.status import Status

SILENT_SECONDS = 2.5
"""Who reports each second and has not been heard of for so long is not asked."""
FIRST_EJECTION_SECONDS = 1.0
LONGEST_EJECTION_SECONDS = 30.0
FORGOTTEN_SECONDS = 60.0
ANYTHING = 0
"""The key of services that all do the same work, as routers do."""


@dataclass(eq=False)
class Replica:
    """What is known of one instance."""

    instance: str
    serves: tuple[int, ...]
    heard: float
    failures: int = 0
    """In a row."""
    failed_at: float = -math.inf
    out_until: float = -math.inf

    def is_in(self, now: float) -> bool:
        """Whether it is in rotation: not left out, and heard of since it last failed."""
        return now >= self.out_until and self.heard > self.failed_at


class Replicas:
    """The instances of one service of one deployment, by what they serve: a worker's shards, or `ANYTHING`."""

    def __init__(self, service: str, deployment: str, *, silent_seconds: float = SILENT_SECONDS) -> None:
        self._service = service
        self._deployment = deployment
        self._silent_seconds = silent_seconds
        self._known: dict[str, Replica] = {}
        self._by_key: dict[int, list[Replica]] = {}
        self._turns: dict[int, int] = {}
        self._served_at: dict[int, float] = {}
        self.ejections = 0

    def observe(self, status: Status, now: float) -> None:
        """Take note of a report."""
        if status.service != self._service or status.deployment != self._deployment:
            return
        if status.state != "ready":
            self.gone(status.instance)
            return
        serves = status.shards if self._service == "expert" else (ANYTHING,)
        self._served_at.update(dict.fromkeys(serves, now))
        known = self._known.get(status.instance)
        if known is not None and known.serves == serves:
            known.heard = now
            return
        self.gone(status.instance)
        for old in [each.instance for each in self._known.values() if now - each.heard > FORGOTTEN_SECONDS]:
            self.gone(old)
        replica = self._known[status.instance] = Replica(status.instance, serves, now)
        for key in serves:
            self._by_key.setdefault(key, []).append(replica)

    def gone(self, instance: str) -> None:
        """Forget `instance` until it reports again: NATS knows that nobody listens there, or it says so itself."""
        replica = self._known.pop(instance, None)
        if replica is not None:
            for key in replica.serves:
                self._by_key[key].remove(replica)

    def failed(self, instance: str, now: float) -> None:
        """Leave `instance` out for a while: it does not answer, or not in time."""
        replica = self._known.get(instance)
        if replica is not None and now >= replica.out_until:
            doublings = min(replica.failures, 32)  # 2.0 ** 1024 is too large for a float
            seconds = min(FIRST_EJECTION_SECONDS * 2.0**doublings, LONGEST_EJECTION_SECONDS)
            replica.failures += 1
            replica.failed_at = now
            replica.out_until = now + seconds
            self.ejections += 1

    def answered(self, instance: str) -> None:
        """Let `instance` back in."""
        replica = self._known.get(instance)
        if replica is not None and replica.failures:
            replica.failures = 0
            replica.failed_at = replica.out_until = -math.inf

    def choose(self, key: int, now: float, avoid: Collection[str] = ()) -> str | None:
        """Whose turn it is to be asked for `key`; None if nobody is known but those of `avoid`.

        One that is left out is chosen only if there is no other.
        """
        replicas = self._by_key.get(key)
        if not replicas:
            return None
        turn = self._turns[key] = self._turns.get(key, 0) + 1
        spare: Replica | None = None
        for offset in range(len(replicas)):
            replica = replicas[(turn + offset) % len(replicas)]
            if now - replica.heard > self._silent_seconds or replica.instance in avoid:
                continue
            if replica.is_in(now):
                return replica.instance
            if spare is None or replica.out_until < spare.out_until:
                spare = replica
        return None if spare is None else spare.instance

    def served(self, key: int, now: float) -> bool:
        """Whether anybody who was heard of lately serves `key`."""
        return any(now - replica.heard <= self._silent_seconds for replica in self._by_key.get(key, ()))

    def heard(self, instance: str) -> float:
        """When `instance` last reported; minus infinity if it is not known."""
        replica = self._known.get(instance)
        return -math.inf if replica is None else replica.heard

    def last_served(self, key: int) -> float:
        """When somebody last reported that it serves `key`; minus infinity if nobody ever has."""
        return self._served_at.get(key, -math.inf)

    def has_other(self, key: int, now: float, instance: str | None) -> bool:
        """Whether anybody but `instance` may be asked for `key`, none of those who are left out."""
        return any(
            r.instance != instance and now - r.heard <= self._silent_seconds and r.is_in(now)
            for r in self._by_key.get(key, ())
        )
