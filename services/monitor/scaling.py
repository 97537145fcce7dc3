"""How many workers and routers there should be: a pure function of what is seen, what was decided, and the time.

The count is that of Kubernetes' Horizontal Pod Autoscaler: for each metric ceil(count x usage / target), of which the
largest wins (https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/#algorithm-details). Its target
lies one tolerance below the threshold for more, so that "up at 80 %" is what happens: at 80 % the ratio leaves the
tolerance. Between the two thresholds nothing changes. Around the formula are rules that each say why they hold back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from services.expert.placement import removable
from services.monitor.observations import Measured, Observation
from services.monitor.rules import Reading as AlertReading
from services.monitor.utilisation import Metric, Service, Targets, Usage, usages

Action = Literal["up", "down", "hold"]
Rule = Literal[
    "disconnected", "restarted", "no_data", "starting", "cooldown", "by_hand", "window", "bounds", "placement",
    "weights", "step", "shards", "ineffective",
]  # fmt: skip
STEP_FACTOR = 2
"""The most that one decision multiplies by: latency and lines tell that there are too few, hardly by how many."""
START_SECONDS = 120.0
"""Whoever was asked for is waited for so long before more are."""
BETTER = 0.05
"""By which share a figure must have changed to count as changed."""
ROUNDING = 1e-9


@dataclass(frozen=True)
class Limits:
    """What an operator has set for one service."""

    least: int = 2
    most: int = 16
    up_at: float = 0.8
    down_at: float = 0.3
    tolerance: float = 0.1
    cooldown: float = 60.0
    """Seconds after a change in which there is no other."""
    window: float = 300.0
    """Seconds of low load, without a gap, before there are fewer."""
    attempts: int = 3
    """Scale-ups in a row that changed nothing before there are no more."""
    targets: Targets = field(default_factory=Targets)


@dataclass(frozen=True)
class Held:
    """A rule that kept a count from being asked for."""

    rule: Rule
    text: str


@dataclass(frozen=True)
class Reading:
    """One metric and the count that it asks for."""

    usage: Usage
    wanted: int | None
    """None: it asks for nothing, as it is unknown or says nothing about this service."""


@dataclass(frozen=True)
class Decision:
    """What should be, and why."""

    service: Service
    time: float
    """Unix seconds."""
    current: int
    """Instances that are there and stay: ready, on their way, or not heard of just now."""
    wanted: int
    """By the metrics alone."""
    desired: int
    """After all rules; `current` if nothing is to be done."""
    readings: tuple[Reading, ...]
    winner: Metric | None
    """The metric that asks for the most."""
    held: tuple[Held, ...]
    text: str

    @property
    def action(self) -> Action:
        return "up" if self.desired > self.current else "down" if self.desired < self.current else "hold"


@dataclass(frozen=True)
class Attempt:
    """The last scale-up, and how things stood then."""

    metric: Metric
    usage: float
    throughput: float
    """Tokens per second."""


@dataclass(frozen=True)
class ScalingState:
    """What must be remembered of one service from look to look. An empty one is how a monitor starts."""

    since: float | None = None
    """Since when the fleet has been heard of without a break."""
    changed: float | None = None
    """When the count was last changed."""
    by_hand: bool = False
    """Whether it was by hand."""
    target: int | None = None
    """What was asked for then."""
    low_since: float | None = None
    """Since when all that counts has been known and low; None: it is not."""
    lows: tuple[tuple[float, int], ...] = ()
    """(time, wanted) of the looks since then that asked for more than all later ones, those of the last window."""
    attempt: Attempt | None = None
    futile: int = 0
    """Scale-ups in a row that changed nothing."""


def decide(
    service: Service, observation: Observation, state: ScalingState, limits: Limits
) -> tuple[Decision, ScalingState]:
    """What `service` should have now, and what to remember.

    Args:
        service: whose count.
        observation: the fleet over the last seconds; its `now` is the time.
        state: what the last call returned.
        limits: the operator's.

    """
    now = observation.now
    present = _present(service, observation)
    current = len(present)
    if not observation.connected:
        held = Held("disconnected", "NATS cannot be heard: nothing is known of anybody")
        decision = Decision(service, now, current, current, current, (), None, (held,), held.text)
        return decision, replace(state, since=None, low_since=None, lows=())
    state = replace(state, since=now if state.since is None else state.since)
    ready = len(observation.ready(service))
    readings = tuple(_reading(u, ready, current, limits) for u in usages(service, observation, limits.targets))
    winner = _winner(readings)
    state = _judged(state, winner, observation, limits)
    wanted = current if winner is None else winner.wanted or 0
    state = _with_low(state, readings, wanted, not observation.stale(service) and ready > 0, now, limits)
    look = _Look(service, observation, limits, state, present, readings, wanted)
    grows = current <= limits.most and max(wanted, limits.least) > current
    desired, rules = look.upwards() if grows else look.downwards()
    if desired != current:
        attempt = None
        if desired > current and winner is not None and winner.usage.value is not None:
            attempt = Attempt(winner.usage.metric, winner.usage.value, _throughput(observation))
        state = ScalingState(state.since, now, target=desired, attempt=attempt, futile=state.futile)
    metric = winner.usage.metric if winner else None
    text = _text(service, current, desired, winner, rules)
    return Decision(service, now, current, wanted, desired, readings, metric, tuple(rules), text), state


def by_hand(state: ScalingState, now: float, count: int) -> ScalingState:
    """After an operator has asked for `count`: it stands for a cooldown, and what was futile is forgotten."""
    return ScalingState(state.since, now, by_hand=True, target=count)


def scaling_ineffective(service: Service, state: ScalingState, limits: Limits) -> AlertReading:
    """What `state` says of the alert of this name: whether scaling up has been given up."""
    futile = state.futile >= limits.attempts
    times = "once" if state.futile == 1 else f"{state.futile} times in a row"
    return AlertReading(
        rule="scaling_ineffective",
        subject=service,
        verdict="bad" if futile else "good",
        text=f"scaling {service}s up has changed nothing {times}" if state.futile else f"scaling {service}s is open",
        value=float(state.futile),
        threshold=float(limits.attempts),
        service=service,
    )


@dataclass(frozen=True)
class _Look:
    """One look, for the rules."""

    service: Service
    observation: Observation
    limits: Limits
    state: ScalingState
    present: Sequence[Measured]
    readings: Sequence[Reading]
    wanted: int

    @property
    def current(self) -> int:
        return len(self.present)

    def upwards(self) -> tuple[int, list[Held]]:
        """How many there should be now, `current` if a rule holds that back; and the rules."""
        limits, current = self.limits, self.current
        wanted, held = max(self.wanted, limits.least), self._weights()
        if wanted > limits.most:
            held.append(Held("bounds", f"{wanted} are wanted, at most {limits.most} may be"))
            wanted = limits.most
        if wanted > max(STEP_FACTOR * current, limits.least):
            wanted = max(STEP_FACTOR * current, limits.least)
            held.append(Held("step", f"no more than {STEP_FACTOR} times as many at once"))
        wanted = self._even(wanted, held)
        reasons = [*self._resting(), *self._starting()] if wanted > current else []
        if wanted > current and self.state.futile >= limits.attempts:
            text = f"{self.state.futile} scale-ups in a row changed nothing: find what else is short, or scale by hand"
            reasons.append(Held("ineffective", text))
        return current if reasons else wanted, held + reasons

    def downwards(self) -> tuple[int, list[Held]]:
        """The same for a count that is to be no larger than it is."""
        limits, current, now = self.limits, self.current, self.observation.now
        held = self._weights()
        if current > limits.most:
            wanted = limits.most
        elif self.state.low_since is None:
            return current, [*held, *(self._unheard() + self._unknown() if self.wanted < current else [])]
        else:
            wanted = max(limits.least, *(count for _, count in self.state.lows))
            if self.wanted < limits.least:
                held.append(Held("bounds", f"{self.wanted} would do, at least {limits.least} must be"))
            if wanted < current and now - self.state.low_since < limits.window:
                text = f"the load has been low for {now - self.state.low_since:.0f} s of {limits.window:g}"
                held.append(Held("window", text))
        wanted = min(current, self._even(wanted, held))
        if wanted >= current:
            return current, held
        going = removable([m.status for m in self.observation.ready(self.service)], current - wanted)
        if len(going) < current - wanted:
            held.append(
                Held("placement", f"{current - wanted} could go, {len(going)} may: the others hold the last copy")
            )
            wanted = current - len(going)
        reasons = [*self._resting(), *self._starting(), *self._unheard()]
        stays = reasons or any(h.rule == "window" for h in held)
        return current if stays else wanted, held + reasons

    def _even(self, wanted: int, held: list[Held]) -> int:
        """`wanted`, or as many more as give each shard the same number of workers.

        The slowest shard bounds a layer: with more workers than shards, one that only some shards have helps nobody.
        """
        shards = max((m.status.num_shards for m in self.present if m.service == "expert"), default=0)
        even = -(-wanted // shards) * shards if 0 < shards < wanted else wanted
        if even == wanted or even > self.limits.most:
            return wanted
        held.append(Held("shards", f"{wanted} would leave some of {shards} shards with fewer workers than the others"))
        return even

    def _weights(self) -> list[Held]:
        return [
            Held("weights", f"{r.usage.metric}: {r.usage.text}")
            for r in self.readings
            if not r.usage.relieves and (r.usage.value or 0.0) > self.limits.up_at
        ]

    def _resting(self) -> list[Held]:
        now, state, limits = self.observation.now, self.state, self.limits
        if state.changed is not None and now - state.changed < limits.cooldown:
            left = limits.cooldown - (now - state.changed)
            if state.by_hand:
                return [Held("by_hand", f"{state.target} were asked for by hand, which stands for {left:.0f} s more")]
            return [Held("cooldown", f"the last change is {now - state.changed:.0f} s ago; {left:.0f} s are left")]
        if state.changed is None and state.since is not None and now - state.since < limits.cooldown:
            left = limits.cooldown - (now - state.since)
            return [
                Held("restarted", f"this monitor has listened for {now - state.since:.0f} s; {left:.0f} s are left")
            ]
        return []

    def _starting(self) -> list[Held]:
        """Those that were asked for and are not ready yet."""
        state, now = self.state, self.observation.now
        on_the_way = [m for m in self.present if m.status.state in ("starting", "loading")]
        asked = state.target is not None and state.changed is not None and now - state.changed < START_SECONDS
        missing = state.target - self.current if asked and state.target is not None else 0
        young = [m for m in on_the_way if now - m.status.started < START_SECONDS]
        if young or (missing > 0 and asked):
            return [Held("starting", f"{len(young) + max(0, missing)} are still on their way")]
        return []

    def _unheard(self) -> list[Held]:
        names = [m.instance for m in self.observation.stale(self.service)]
        return [Held("no_data", f"{', '.join(names)} has not been heard of lately")] if names else []

    def _unknown(self) -> list[Held]:
        return [
            Held("no_data", f"{r.usage.metric} is unknown: {r.usage.text}")
            for r in self.readings
            if r.usage.counts and r.usage.value is None
        ]


def _present(service: Service, observation: Observation) -> list[Measured]:
    """Those that are there and stay; whoever is silent counts until it is forgotten, as it may be back any moment."""
    return [m for m in observation.of(service, fresh=False) if m.status.state != "draining"]


def _reading(usage: Usage, ready: int, current: int, limits: Limits) -> Reading:
    """Monotonic in the usage: fewer below `down_at`, as many as there are up to `up_at`, more above."""
    if usage.value is None or not usage.counts or not usage.relieves or not ready:
        return Reading(usage, None)
    target = limits.up_at / (1 + limits.tolerance)
    wanted = max(1, math.ceil(ready * usage.value / target - ROUNDING))
    if usage.value > limits.up_at:
        return Reading(usage, max(wanted, ready + 1, current))
    return Reading(usage, current if usage.value >= limits.down_at else min(wanted, current))


def _winner(readings: Sequence[Reading]) -> Reading | None:
    """The reading that asks for the most; of equals the most used one."""
    known = [r for r in readings if r.wanted is not None]
    return max(known, key=lambda r: (r.wanted or 0, r.usage.value or 0.0), default=None)


def _with_low(
    state: ScalingState, readings: Sequence[Reading], wanted: int, heard: bool, now: float, limits: Limits
) -> ScalingState:
    """Since when the load has been low; one look at which it is not, or not known to be, begins the window anew."""
    values = [r.usage.value for r in readings if r.usage.counts and r.usage.relieves]
    if not heard or not values or any(value is None or value >= limits.down_at for value in values):
        return replace(state, low_since=None, lows=())
    lows = tuple((at, count) for at, count in state.lows if now - at <= limits.window and count > wanted)
    return replace(state, low_since=now if state.low_since is None else state.low_since, lows=(*lows, (now, wanted)))


def _judged(state: ScalingState, winner: Reading | None, observation: Observation, limits: Limits) -> ScalingState:
    """Whether the last scale-up has changed anything, once its cooldown is over."""
    usage = winner.usage.value if winner else None
    if winner is None or usage is None:
        return state
    if usage <= limits.up_at:
        return replace(state, futile=0, attempt=None)
    attempt = state.attempt
    if attempt is None or state.changed is None or observation.now - state.changed < limits.cooldown:
        return state
    relieved = winner.usage.metric != attempt.metric or usage < (1 - BETTER) * attempt.usage
    more = _throughput(observation) > (1 + BETTER) * attempt.throughput
    return replace(state, futile=0 if relieved or more else state.futile + 1, attempt=None)


def _throughput(observation: Observation) -> float:
    """Tokens per second of all routers."""
    return sum(m.tokens / m.seconds for m in observation.of("router") if m.seconds)


def _text(service: Service, current: int, desired: int, winner: Reading | None, held: Sequence[Held]) -> str:
    name = f"{service}s"
    why = f"{winner.usage.metric}: {winner.usage.text}" if winner else "nothing is known"
    rules = "; ".join(h.text for h in held)
    if desired == current:
        return f"{current} {name} stay ({why})" + (f": {rules}" if rules else "")
    return f"{current} {name} become {desired}, as {why}" + (f"; {rules}" if rules else "")
