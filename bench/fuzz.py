"""Seeded fuzz over every decoder: `python -m bench.fuzz --messages 1000000 --seed 1`.

What comes from the bus is bytes: message data, subjects, headers. Each message of this program is made from its seed
and its index alone: a valid one of tests/protocol/vectors.json with bytes or values changed, random msgpack, or random
bytes; and goes through what a service would do with it. Right are a message of the asked type, which survives being
sent on, and the typed error (BadMessageError; for a subject that is none, ValueError; for headers, any MoeError).
Anything else ends the program with exit code 1, the offending bytes, and the command that does this one message again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import msgpack
from nats.aio.client import Client
from nats.aio.msg import Msg

import services.expert.messages
import services.monitor.messages
import services.router.messages
import shared.status
from services.router.messages import decode_control
from shared import subjects, wire
from shared.bus import BUDGET_MS, ERROR_CODE, ERROR_TEXT, REQUEST_ID, budget_deadline, raise_for_error
from shared.errors import BadMessageError, MoeError
from shared.logs import safe_request_id
from shared.status import Fleet
from shared.tensors import from_wire

VECTORS = Path(__file__).resolve().parent.parent / "tests" / "protocol" / "vectors.json"
MODULES = (services.expert.messages, services.monitor.messages, services.router.messages, shared.status)
DTYPES = (*wire.ITEMSIZE, "float64", "", "int3")
SIZES = (0, 1, 2, 3, 64, -1, -(2**63), 2**31, 2**40, 2**62, 2**63, 2**64 - 1)
HEADER_VALUES = ("", "1", "nan", "-inf", "1e999", "9" * 400, "x" * 5000, "é\x00", "\r\nX: y", "1_0", "0x1", " 5 ", "٣")
ALL_KINDS = {
    value.__name__: value
    for module in MODULES
    for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, wire.Message) and value is not wire.Message
}


class WrongError(Exception):
    """A decoder did what it must not do."""


@dataclass
class Decoders:
    """What services do with bytes from the bus; each returns whether it accepts them."""

    fleet: Fleet = field(default_factory=Fleet)

    def message(self, name: str, data: bytes) -> bool:
        kind = ALL_KINDS[name]
        try:
            value = wire.decode(kind, data)
        except BadMessageError:
            return False
        if not isinstance(value, kind):
            raise WrongError(f"{type(value).__name__} came for {name}")
        again = wire.encode(value)
        if wire.encode(wire.decode(kind, again)) != again:
            raise WrongError("what is sent on is not what came")
        for field_name in value.__struct_fields__:
            tensor = getattr(value, field_name)
            if isinstance(tensor, wire.Tensor):
                self._tensor(tensor)
        return True

    def _tensor(self, tensor: wire.Tensor) -> None:
        if math.prod(tensor.shape) * wire.ITEMSIZE[tensor.dtype] != len(tensor.data):
            raise WrongError("a tensor's shape and bytes do not agree")
        shape = tensor.shape if tensor.data.nbytes else (None,) * len(tensor.shape)
        try:
            if tuple(from_wire(tensor, "tensor", shape, tuple(wire.ITEMSIZE)).shape) != tensor.shape:
                raise WrongError("torch has another shape")
            tensor.to_numpy()
        except BadMessageError:
            return

    def control(self, data: bytes) -> bool:
        try:
            decode_control(data)
        except BadMessageError:
            return False
        return True

    def report(self, subject: str, data: bytes) -> bool:
        before = len(self.fleet.live(now=0.0))
        self.fleet.on_message(Msg(_client=Client(), subject=subject, data=data))
        heard = len(self.fleet.live(now=0.0)) > before
        self.fleet = Fleet()
        return heard

    def subject(self, subject: str) -> bool:
        subjects.kind(subject)
        try:
            service, instance = subjects.parse_status(subject)
        except ValueError:
            return False
        if subjects.status(service, instance) != subject:
            raise WrongError("what was parsed builds another subject")
        return True

    def headers(self, headers: dict[str, str]) -> bool:
        safe_request_id(headers.get(REQUEST_ID, ""))
        until = budget_deadline(headers, 0.0)
        if until is not None and not math.isfinite(until):
            raise WrongError(f"a budget ends at {until}")
        try:
            raise_for_error(Msg(_client=Client(), subject="x", data=b"", headers=headers))
        except MoeError as error:
            if len(error.message) > 2000:
                raise WrongError("an error's text without an end") from None
            return False
        return True


class Maker:
    """Makes messages from valid ones and from nothing."""

    def __init__(self) -> None:
        vectors = json.loads(VECTORS.read_text(encoding="utf-8"))["messages"]
        self.valid = [(str(v["type"]), bytes.fromhex(v["hex"])) for v in vectors]

    def value(self, r: Random, depth: int = 0) -> Any:
        choice = r.randrange(12 if depth < 4 else 9)
        if choice == 0:
            return None
        if choice == 1:
            return r.random() < 0.5
        if choice == 2:
            return r.randrange(-(2 ** r.randrange(64)), 2 ** r.randrange(1, 65))
        if choice == 3:
            return r.choice((0.0, 1.5, -1.0, math.nan, math.inf, -math.inf, 1e308))
        if choice == 4:
            return "".join(r.choice("abcé\0\n/*>. -_9") for _ in range(r.randrange(9)))
        if choice == 5:
            return r.randbytes(r.randrange(33))
        if choice == 6:
            return msgpack.ExtType(r.randrange(128), r.randbytes(r.randrange(9)))
        if choice in (7, 8):
            shape = [r.choice(SIZES) for _ in range(r.randrange(10))]
            return [r.choice(DTYPES), shape, r.randbytes(r.choice((0, 1, 4, 8, 64)))]
        if choice == 9:
            return [self.value(r, depth + 1) for _ in range(r.randrange(5))]
        return {self.key(r): self.value(r, depth + 1) for _ in range(r.randrange(5))}

    def key(self, r: Random) -> Any:
        return r.choice(("v", "id", "layer", "", "op")) if r.random() < 0.9 else r.randrange(-5, 5)

    def bytes_changed(self, r: Random, raw: bytes) -> bytes:
        changed = bytearray(raw)
        for _ in range(r.randrange(1, 5)):
            at = r.randrange(len(changed) + 1)
            changed[at : at + r.randrange(5)] = r.randbytes(r.randrange(5))
        return bytes(changed)

    def values_changed(self, r: Random, raw: bytes) -> bytes:
        message = msgpack.unpackb(raw, strict_map_key=False)
        for name in r.sample(sorted(message), min(len(message), r.randrange(1, 3))):
            message[name] = self.value(r)
        return bytes(msgpack.packb(message))

    def data(self, r: Random) -> tuple[str, str, bytes]:
        """(how it was made, of which type, the bytes)."""
        name, raw = r.choice(self.valid)
        if r.random() < 0.1:
            name = r.choice(sorted(ALL_KINDS))
        chance = r.random()
        if chance < 0.02:
            return "valid", name, raw
        if chance < 0.4:
            return "bytes changed", name, self.bytes_changed(r, raw)
        if chance < 0.7:
            return "values changed", name, self.values_changed(r, raw)
        if chance < 0.8:
            return "cut short", name, raw[: r.randrange(len(raw))]
        if chance < 0.88:
            return "msgpack", name, bytes(msgpack.packb(self.value(r)))
        if chance < 0.9:
            return "nested", name, r.choice((b"\x91", b"\x81", b"\x81\xa1a", b"\x92\xc0")) * r.randrange(1, 3000)
        return "bytes", name, r.randbytes(r.randrange(200))

    def subject(self, r: Random) -> str:
        good = ["moe", "status", "expert", "expert-1"]
        for _ in range(r.randrange(3)):
            good[r.randrange(4)] = "".join(r.choice("aZ9_-.*> \r\n\0éß") for _ in range(r.randrange(6)))
        return ".".join(good[: r.randrange(2, 5)] if r.random() < 0.2 else good)

    def headers(self, r: Random) -> dict[str, str]:
        names = r.sample((BUDGET_MS, ERROR_CODE, ERROR_TEXT, REQUEST_ID, "Status", "x"), r.randrange(4))
        return {name: r.choice(HEADER_VALUES) if r.random() < 0.7 else str(r.uniform(-1e9, 1e9)) for name in names}


@dataclass(frozen=True)
class Case:
    """One message and what is done with it."""

    made: str
    shown: str
    """The offending bytes in hex, or the text."""
    run: Callable[[], bool]


def case(seed: int, index: int, maker: Maker, decoders: Decoders) -> Case:
    """Message `index` of `seed`, the same each time."""
    r = Random(f"{seed}:{index}")
    where = r.random()
    if where < 0.05:
        subject = maker.subject(r)
        return Case("subject", repr(subject), lambda: decoders.subject(subject))
    if where < 0.1:
        headers = maker.headers(r)
        return Case("headers", repr(headers), lambda: decoders.headers(headers))
    made, name, data = maker.data(r)
    shown = f"{name} {data.hex()}"
    if where < 0.15:
        return Case(f"control, {made}", shown, lambda: decoders.control(data))
    if where < 0.25:
        subject = maker.subject(r)
        return Case(f"report, {made}", f"{subject!r} {data.hex()}", lambda: decoders.report(subject, data))
    return Case(f"message, {made}", shown, lambda: decoders.message(name, data))


def fuzz(seed: int, indices: Iterator[int] | range, decoders: Decoders | None = None) -> dict[str, Any]:
    """Do the messages of `indices`; counts by how they were made, refused and accepted.

    Raises:
        SystemExit: a decoder did what it must not do; the text tells which message did it, and how to do it again.

    """
    maker, decoders = Maker(), decoders or Decoders()
    accepted: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    start = time.perf_counter()
    for index in indices:
        one = case(seed, index, maker, decoders)
        try:
            good = one.run()
        except Exception as error:
            traceback.print_exc()
            raise SystemExit(
                f"{type(error).__name__}: {error}\n{one.made}: {one.shown}\n"
                f"again: python -m bench.fuzz --seed {seed} --only {index}"
            ) from error
        (accepted if good else refused)[one.made] += 1
    seconds = time.perf_counter() - start
    count = accepted.total() + refused.total()
    return {
        "seed": seed,
        "messages": count,
        "refused": refused.total(),
        "accepted": accepted.total(),
        "messages_per_second": round(count / seconds),
        "seconds": round(seconds, 1),
        "made": {
            made: {"refused": refused[made], "accepted": accepted[made]} for made in sorted({*accepted, *refused})
        },
    }


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="only the message of this index, to see again what went wrong")
    arguments = parser.parse_args(given)
    indices = range(arguments.messages) if arguments.only is None else range(arguments.only, arguments.only + 1)
    print(json.dumps(fuzz(arguments.seed, indices), indent=1))
    sys.exit(0)


if __name__ == "__main__":
    main()
