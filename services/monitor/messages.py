"""What the monitor tells everybody. docs/protocol.md specifies it."""

from __future__ import annotations

from shared.wire import Message


class Event(Message, frozen=True, kw_only=True):
    """`moe.events.<kind>`: something that an operator should know."""

    kind: str
    """What is wrong: `service_down`, `shard_without_replica`."""
    subject: str
    """The instance or shard that it is about."""
    text: str
    time: float
    """Unix seconds."""
