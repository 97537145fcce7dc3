"""JetStream over the bus' connection: buckets of values with compare-and-set, and streams of acknowledged records.

nats-py does the work; here are a deadline for each call and its errors made ours. Nothing on a request's path uses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import nats.errors
from nats.js import api, errors
from nats.js.kv import KeyValue

from shared.bus import Bus
from shared.errors import MoeError

CALL_SECONDS = 2.0


class NoJetStreamError(MoeError):
    """The server has no JetStream, or none for this stream or bucket now: it still starts, is full, or was emptied."""

    def __init__(self, reason: str) -> None:
        super().__init__("bus_unavailable", f"NATS keeps nothing: {reason}")


class ConflictError(Exception):
    """Somebody else has written the key since it was read."""


@dataclass(frozen=True)
class Entry:
    """A key's value, and the number of the write that made it: a fencing token, as numbers only grow."""

    value: bytes
    revision: int


class JetStream:
    """What is kept on the server that `bus` is connected to."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._client = bus.jetstream(CALL_SECONDS)

    @contextlib.asynccontextmanager
    async def _call(self, data: bytes = b"") -> AsyncIterator[None]:
        """One exchange with the server.

        Raises:
            MoeError: `bus_unavailable` without a connection or an answer in time, `payload_too_large`.
            NoJetStreamError: nobody there keeps anything.
            ConflictError: the key is another one's by now.

        """
        if not self._bus.connected:
            raise MoeError("bus_unavailable", "the connection to NATS is down; try again in a moment")
        if len(data) > self._bus.max_payload:
            raise MoeError("payload_too_large", f"the value has {len(data)} bytes, NATS takes {self._bus.max_payload}")
        try:
            async with asyncio.timeout(CALL_SECONDS):
                yield
        except errors.KeyWrongLastSequenceError as error:
            raise ConflictError(str(error)) from None
        except (nats.errors.NoRespondersError, errors.NoStreamResponseError) as error:
            raise NoJetStreamError("no JetStream, or none of this name") from error
        except errors.ServiceUnavailableError as error:
            raise NoJetStreamError(error.description or "JetStream is off, or still starts") from error
        except TimeoutError as error:
            raise MoeError("bus_unavailable", f"JetStream gave no answer within {CALL_SECONDS:g} s") from error
        except (nats.errors.Error, OSError, json.JSONDecodeError) as error:
            raise MoeError("bus_unavailable", f"JetStream refused: {error}") from error

    async def bucket(self, name: str) -> Bucket | None:
        """The bucket `name`, None if there is none. Raises as `_call` does."""
        async with self._call():
            try:
                return Bucket(self, name, await self._client.key_value(name))
            except errors.NotFoundError:
                return None

    async def make_bucket(self, name: str, *, history: int, max_bytes: int) -> Bucket:
        """The bucket `name`, made as a file if there is none. Raises as `_call` does."""
        found = await self.bucket(name)
        if found is not None:
            return found
        config = api.KeyValueConfig(bucket=name, history=history, max_bytes=max_bytes, storage=api.StorageType.FILE)
        async with self._call():
            return Bucket(self, name, await self._client.create_key_value(config))

    async def make_stream(
        self, name: str, subjects: Sequence[str], *, max_age_seconds: float, max_bytes: int, sync: bool
    ) -> Stream:
        """The stream `name` of everything on `subjects`, made as a file if there is none; the oldest goes first.

        A stream that is there keeps the limits that it has, an operator's perhaps, and gets the subjects that it lacks.

        Args:
            name: of the stream.
            subjects: of which none may be in another stream.
            max_age_seconds: how long a record is kept.
            max_bytes: how many bytes of them.
            sync: false: acknowledge before the disk has it, whatever the server's `sync_interval`.

        Raises:
            MoeError: as `_call`.

        """
        async with self._call():
            try:
                config = (await self._client.stream_info(name)).config
            except errors.NotFoundError:
                config = None
        if config is None:
            config = api.StreamConfig(
                name=name,
                subjects=list(subjects),
                storage=api.StorageType.FILE,
                max_age=max_age_seconds,
                max_bytes=max_bytes,
                persist_mode=None if sync else api.PersistMode.ASYNC,
            )
            async with self._call():
                await self._client.add_stream(config)
        elif missing := [subject for subject in subjects if subject not in config.subjects]:
            async with self._call():
                await self._client.update_stream(config, subjects=[*config.subjects, *missing])
        return Stream(self, name)

    def stream(self, name: str) -> Stream:
        """The stream `name`, which may not be there."""
        return Stream(self, name)


class Bucket:
    """Values by key."""

    def __init__(self, jetstream: JetStream, name: str, client: KeyValue) -> None:
        self._jetstream = jetstream
        self._name = name
        self._client = client

    async def get(self, key: str) -> Entry | None:
        """The last value of `key`, None if it has none. Raises as `JetStream._call` does."""
        async with self._jetstream._call():  # noqa: SLF001 - one module, one mechanism
            try:
                entry = await self._client.get(key)
            except errors.KeyNotFoundError:
                return None
            return Entry(bytes(entry.value or b""), int(entry.revision))

    async def put(self, key: str, value: bytes, *, last: int) -> int:
        """Write `key` if revision `last` (0: no value) is still its last; the new revision, once the server has it.

        Raises:
            ConflictError: it is not.
            MoeError: as `JetStream._call`; the value may have been written or not.

        """
        async with self._jetstream._call(value):  # noqa: SLF001
            if last:
                return int(await self._client.update(key, value, last=last))
            return int(await self._client.create(key, value))

    async def keys(self) -> list[str]:
        """Every key that ever had a value, sorted. Raises as `JetStream._call` does.

        From the stream that a bucket is (NATS ADR-8); nats-py would make a consumer for it.
        """
        prefix = f"$KV.{self._name}."
        async with self._jetstream._call():  # noqa: SLF001
            info = await self._jetstream._client.stream_info(f"KV_{self._name}", subjects_filter=f"{prefix}>")  # noqa: SLF001
            return sorted(subject.removeprefix(prefix) for subject in info.state.subjects or ())


class Stream:
    """Records in the order of their arrival."""

    def __init__(self, jetstream: JetStream, name: str) -> None:
        self._jetstream = jetstream
        self._name = name

    async def append(self, subject: str, data: bytes, *, record_id: str) -> int:
        """Add a record, and return its number once the server has acknowledged it. Raises as `JetStream._call` does.

        The same `record_id` again, within the stream's window (two minutes by default), adds nothing.
        """
        headers = {api.Header.MSG_ID.value: record_id}
        async with self._jetstream._call(data):  # noqa: SLF001
            ack = await self._jetstream._client.publish(subject, data, stream=self._name, headers=headers)  # noqa: SLF001
            return int(ack.seq)

    async def last(self, count: int) -> list[bytes]:
        """The last `count` records, the oldest first. Raises as `JetStream._call` does."""
        return [data for _, data in await self.newest(count)]

    async def newest(self, count: int) -> list[tuple[str, bytes]]:
        """As `last`, each record with its subject."""
        client = self._jetstream._client  # noqa: SLF001
        async with self._jetstream._call():  # noqa: SLF001
            try:
                state = (await client.stream_info(self._name)).state
            except errors.NotFoundError:
                return []
        records = []
        for number in range(max(1, state.first_seq, state.last_seq - count + 1), state.last_seq + 1):
            async with self._jetstream._call():  # noqa: SLF001
                with contextlib.suppress(errors.NotFoundError):  # it was the oldest, and went meanwhile
                    found = await client.get_msg(self._name, seq=number)
                    records.append((str(found.subject), bytes(found.data or b"")))
        return records
