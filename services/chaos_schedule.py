"""What `openmoe chaos` does to whom and when: pure functions, so that the same seed gives the same schedule."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["expert", "router", "monitor", "nats"]
Action = Literal["kill", "stop"]
KINDS: tuple[Kind, ...] = ("expert", "router", "monitor", "nats")
ACTIONS: tuple[Action, ...] = ("kill", "stop")
LEAST_STOP_SECONDS, MOST_STOP_SECONDS = 1.0, 5.0


@dataclass(frozen=True)
class Strike:
    """One thing that is done to one process."""

    number: int
    at: float
    """Seconds from the start of the load."""
    kind: Kind
    index: int
    """Which of its kind; another one takes its place if this one has no peer to stand in."""
    action: Action
    """kill: SIGKILL; stop: SIGSTOP, and SIGCONT after `seconds`."""
    seconds: float = 0.0
    """That a stopped process stays so."""


def schedule(seed: int, strikes: int, seconds: float, counts: Mapping[Kind, int]) -> list[Strike]:
    """Strikes in the order of time.

    Args:
        seed: of everything that is drawn.
        strikes: how many; each at random in its own part of the time, which is cut into as many.
        seconds: the whole time.
        counts: processes of each kind that may be struck, each as likely as any other.

    """
    draw = random.Random(seed)  # noqa: S311 - a schedule, not a secret
    processes = [(kind, index) for kind in KINDS for index in range(counts.get(kind, 0))]
    if not processes:
        return []
    result = []
    for number in range(strikes):
        at = (number + draw.random()) * seconds / strikes
        kind, index = draw.choice(processes)
        action = draw.choice(ACTIONS)
        stopped = draw.uniform(LEAST_STOP_SECONDS, MOST_STOP_SECONDS)  # drawn for a kill too: later draws stay the same
        result.append(Strike(number, round(at, 3), kind, index, action, round(stopped, 2) if action == "stop" else 0.0))
    return result


@dataclass(frozen=True)
class Member:
    """One process as the chaos knows it now."""

    kind: Kind
    index: int
    ready: bool
    """It runs, and has said so since it or NATS was last struck."""
    shards: Collection[int] = ()
    """That an expert worker serves."""


def spared(member: Member, members: Sequence[Member]) -> str:
    """Why `member` may not be struck now; empty if it may: it works, and a peer works that can stand in for it."""
    if not member.ready:
        return "it is not ready"
    peers = [m for m in members if m.kind == member.kind and m.index != member.index and m.ready]
    if member.kind == "expert":
        alone = sorted(set(member.shards) - {shard for peer in peers for shard in peer.shards})
        return f"nobody else serves shard {alone[0]}" if alone else "" if member.shards else "it serves no shard"
    return "" if peers or member.kind in {"monitor", "nats"} else f"no other {member.kind} is ready"


def victim(strike: Strike, members: Sequence[Member]) -> Member | None:
    """Whom the strike meets: the one that was planned, or the next of its kind that may be struck; None: nobody yet."""
    of_kind = sorted((m for m in members if m.kind == strike.kind), key=lambda m: m.index)
    start = next((n for n, m in enumerate(of_kind) if m.index == strike.index), 0)
    return next((m for m in of_kind[start:] + of_kind[:start] if not spared(m, members)), None)
