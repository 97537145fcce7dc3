"""The alerts that there are: how grave each is, what to do about it, and what a look at the fleet says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["critical", "warning", "info"]
Action = Literal["scale_up", "investigate", "optimize_cache", "restart", "takeover", "rebalance"]
Verdict = Literal["bad", "between", "good", "unknown"]
"""Beyond the threshold; on the way back, and not yet beyond the one that clears; well; nobody can tell."""

Key = tuple[str, str, str]
"""(rule, service, subject): of one alert. Instances of different services may share a name."""


@dataclass(frozen=True)
class Rule:
    """One kind of alert."""

    severity: Severity
    action: Action
    summary: str
    advice: str
    """What to do, for people."""
    urgent: bool = False
    """Fires after ALERT_URGENT_PENDING_SECONDS: it is a fact, not a figure that may swing back."""


RULES: dict[str, Rule] = {
    "high_latency": Rule(
        "warning",
        "scale_up",
        "Requests take too long",
        "Add routers or expert workers, whichever waits (`openmoe status` shows queues), or admit less.",
    ),
    "high_error_rate": Rule(
        "critical",
        "investigate",
        "Requests fail by our own fault",
        "Look into the log of the instance that is named, for the code that is named.",
    ),
    "low_cache_hit_rate": Rule(
        "info",
        "optimize_cache",
        "The answer cache is of little use",
        "If requests do repeat: see that Redis is up, raise CACHE_TTL_SECONDS and Redis' maxmemory. If they do not: "
        "ENABLE_CACHING=false saves the look-ups. The cache is Redis', so nothing is grown by itself.",
    ),
    "resource_exhaustion": Rule(
        "critical",
        "scale_up",
        "Memory runs out",
        "Add instances on other hosts, give this one more memory, or lower KV_CACHE_MB and MAX_CONCURRENT_REQUESTS.",
    ),
    "service_down": Rule(
        "critical",
        "restart",
        "An instance is gone",
        "Start it again if its supervisor has not; its log says why it ended. Other instances go on serving.",
        urgent=True,
    ),
    "shard_without_replica": Rule(
        "critical",
        "takeover",
        "Experts that nobody serves",
        "A worker that is not pinned takes the shard over by itself. If this stays, start workers: `openmoe expert`.",
        urgent=True,
    ),
    "expert_imbalance": Rule(
        "warning",
        "rebalance",
        "A few shards do most of the work",
        "Give the busiest shard more replicas, or let the placement spread its hot experts.",
    ),
    "queue_saturated": Rule(
        "warning",
        "scale_up",
        "A line is nearly full",
        "What comes next is refused with HTTP 429: add instances of this service.",
    ),
    "scaling_ineffective": Rule(
        "warning",
        "investigate",
        "More instances change nothing",
        "Find what else is short: the routers, the bus, cores that all share. It goes on once the load has fallen, or "
        "when you scale by hand.",
    ),
}


@dataclass(frozen=True)
class Reading:
    """What one look says of one rule and one subject."""

    rule: str
    subject: str
    """An instance, a host, a scaled service, `<deployment>` or `<deployment>/<shard>`."""
    verdict: Verdict
    text: str
    """What is seen, a sentence for people."""
    value: float | None = None
    """None: unknown."""
    threshold: float | None = None
    """That fires."""
    deployment: str = ""
    service: str = ""
    instance: str = ""
    action: Action | None = None
    """Instead of the rule's own."""
    advice: str = ""
    """Instead of the rule's own."""

    @property
    def key(self) -> Key:
        return self.rule, self.service, self.subject


def judge(value: float, fires: float, clears: float, *, low: bool = False) -> Verdict:
    """Of a figure that is bad above `fires` and good from `clears` down; `low`: bad below, and good from there up."""
    if low:
        return "bad" if value < fires else "good" if value >= clears else "between"
    return "bad" if value > fires else "good" if value <= clears else "between"
