"""A stranger on the bus who speaks NATS and means harm: what he sends is counted, and nobody else notices.

tests/stack/test_bad_messages.py has messages that are wrong in themselves; here it is names, headers, sizes, reports and
replies that nobody asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgpack
import pytest
import pytest_asyncio

from services.router.messages import GenerateRequest
from shared import subjects, wire
from shared.bus import HEADER_ALLOWANCE, Bus
from shared.errors import MoeError
from shared.status import Status
from tests.running import Stack, running_nats, running_stack, wait_until, watching
from tests.stack.looking import deployment_of, http
from tests.stack.test_bad_messages import ALL_KINDS, CALL, FORWARD, GENERATE, HIDDEN, PAIR

SECONDS = 30
PROMPT = "def read_file(path):"


class Stranger:
    """A bare connection to NATS, which writes what no client would."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    @contextlib.asynccontextmanager
    async def connected(cls, nats_url: str) -> AsyncIterator[Stranger]:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(nats_url.rpartition(":")[2]))
        try:
            await reader.readline()  # INFO
            writer.write(b'CONNECT {"verbose":false,"pedantic":false,"headers":true}\r\n')
            yield cls(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def send(self, subject: bytes, data: bytes = b"", *, reply: bytes = b"", head: bytes = b"") -> None:
        """Publish, and return when the server has taken it."""
        to = subject + (b" " + reply if reply else b"")
        sizes = b"%d %d" % (len(head), len(head) + len(data)) if head else b"%d" % len(data)
        self._writer.write(
            (b"HPUB " if head else b"PUB ") + to + b" " + sizes + b"\r\n" + head + data + b"\r\nPING\r\n"
        )
        await self._writer.drain()
        async with asyncio.timeout(SECONDS):
            while (line := await self._reader.readline()) != b"PONG\r\n":
                assert line.startswith((b"PING", b"INFO")), line


@dataclass
class Site:
    """A stack on a bus of its own, so that what is counted was sent here."""

    stack: Stack
    nats_url: str
    bus: Bus
    statuses: dict[str, Status]

    @property
    def deployment(self) -> str:
        return self.statuses["router"].deployment

    def subject(self, kind: str) -> str:
        d = self.deployment
        return {
            "generate": subjects.generate(d),
            "forward": subjects.forward(d),
            "experts": subjects.experts(d, 0),
            "worker": subjects.worker(d, self.statuses["expert"].instance),
            "control": subjects.control("router", self.statuses["router"].instance),
        }[kind]

    async def counted(self, service: str, on: str) -> float:
        """moe_bad_messages_total of one process."""
        address = self.statuses[service].address
        async with httpx.AsyncClient(trust_env=False) as client:
            text = (await client.get(f"http://{address}/metrics")).text
        found = re.search(rf'^moe_bad_messages_total{{on="{on}"}} (\S+)$', text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    async def completes(self) -> str:
        body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        async with http(self.stack) as client:
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            return str(answer.json()["choices"][0]["text"])

    async def refusal(self, kind: str, data: bytes, headers: dict[str, str] | None = None) -> str:
        with pytest.raises(MoeError) as caught:
            await self.bus.request(self.subject(kind), data, timeout=SECONDS, headers=headers)
        return caught.value.code


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    folder: Path = tmp_path_factory.mktemp("strangers")
    async with (
        running_nats(folder) as nats_url,
        running_stack(folder, NATS_URL=nats_url, DTYPE="float32") as stack,
        watching(nats_url) as watcher,
    ):
        deployment = await deployment_of(stack)

        def found() -> dict[str, Status]:
            live = [s for s in watcher.fleet.live() if s.deployment in (deployment, "")]
            shown = [s for s in live if s.service != "expert" or 0 in s.shards]
            return {s.service: s for s in shown}

        await wait_until(lambda: set(found()) == {"gateway", "router", "expert", "monitor"}, "all to report")
        yield Site(stack, nats_url, watcher.bus, found())


@pytest_asyncio.fixture(autouse=True, loop_scope="session")
async def _nobody_noticed(site: Site) -> AsyncIterator[None]:
    """After each test the same text comes, nobody was restarted, and nobody lost the connection."""
    before = await site.completes()
    said = site.stack.log.read_text(errors="replace")
    yield
    assert await site.completes() == before
    new = site.stack.log.read_text(errors="replace")[len(said) :]
    for line in new.splitlines():
        assert not re.search(r"bus\.disconnected|ended with code|Traceback|callback\.failed|watch\.failed", line), line


SERVED = ["generate", "forward", "experts", "worker", "control"]
NAMES = {
    "not UTF-8": b"\xff\xfe",
    "vertical tab": b"a\x0bb",
    "form feed": b"a\x0c9",
    "NUL": b"a\0b",
    "wildcards": b"a.*.>",
    "empty tokens": b"..a..",
    "long": b"r" * 3900,
    "a service's own": b"$SRV.PING",
}


@pytest.mark.parametrize("reply", NAMES.values(), ids=NAMES)
async def test_a_strange_reply_subject_harms_nobody(site: Site, reply: bytes) -> None:
    async with Stranger.connected(site.nats_url) as stranger:
        for kind in SERVED:
            for data in (b"\xc1", msgpack.packb(CALL), msgpack.packb(GENERATE)):
                await stranger.send(site.subject(kind).encode(), data, reply=reply)
        for verb in (b"PING", b"INFO", b"STATS"):
            await stranger.send(b"$SRV." + verb, b"x", reply=reply)


async def test_a_strange_subject_harms_nobody_and_is_counted(site: Site) -> None:
    before = {service: await site.counted(service, "name") for service in site.statuses}
    async with Stranger.connected(site.nats_url) as stranger:
        for token in (b"\xff", b"a\x0bb", b"a\x0cb", b"\0", "ü".encode(), b"*", b"x" * 2000):
            await stranger.send(b"moe.status." + token + b".x", b"\xc1")
            await stranger.send(b"moe.status.expert." + token, b"\xc1")
    for service in site.statuses:
        await wait_until(
            lambda s=service: counted(site, s, "name", before[s] + 2),  # type: ignore[misc]
            f"{service} to count the two that are no text",
        )


async def counted(site: Site, service: str, on: str, least: float) -> bool:
    return await site.counted(service, on) >= least


HEADS = {
    "none": b"NATS/1.0\r\n",
    "empty": b"NATS/1.0\r\n\r\n",
    "noise": b"\xff" * 64,
    "a status that is none": b"NATS/1.0 \xb2\xb2\xb2\xff\r\n\r\n",
    "no responders": b"NATS/1.0 503\r\n\r\n",
    "an error": b"NATS/1.0\r\nNats-Service-Error-Code: bad_message\r\nNats-Service-Error: x\r\n\r\n",
    "an unknown error": b"NATS/1.0\r\nNats-Service-Error-Code: no_such_code\r\n\r\n",
    "a giant value": b"NATS/1.0\r\nMoe-Request-Id: " + b"x" * 6_000_000 + b"\r\n\r\n",
    "a giant budget": b"NATS/1.0\r\nMoe-Budget-Ms: " + b"9" * 6_000_000 + b"\r\n\r\n",
    "a million lines": b"NATS/1.0\r\n" + b"a: b\r\n" * 1_000_000 + b"\r\n",
    "the same again and again": b"NATS/1.0\r\n" + b"Moe-Budget-Ms: 1\r\n" * 3000 + b"\r\n",
    "no colon": b"NATS/1.0\r\n" + b"x" * 1000 + b"\r\n\r\n",
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
async def test_strange_headers_harm_nobody(site: Site, head: bytes) -> None:
    gateway = subjects.inbox_prefix("gateway", site.statuses["gateway"].instance).encode()
    async with Stranger.connected(site.nats_url) as stranger:
        for subject in [
            *(site.subject(kind) for kind in SERVED),
            "moe.status.expert.x",
            "$SRV.PING",
            "moe.events.alert",
        ]:
            await stranger.send(subject.encode(), b"\xc1", reply=b"nowhere", head=head)
        await stranger.send(gateway + b".1", b"", head=head)


async def test_headers_that_are_too_long_are_counted(site: Site) -> None:
    before = await site.counted("router", "headers")
    async with Stranger.connected(site.nats_url) as stranger:
        await stranger.send(site.subject("forward").encode(), b"", reply=b"nowhere", head=HEADS["a giant value"])
    await wait_until(lambda: counted(site, "router", "headers", before + 1), "the router to count it")


@pytest.mark.parametrize("kind", SERVED)
async def test_each_bad_message_is_counted_where_it_came(site: Site, kind: str) -> None:
    service = "expert" if kind in {"experts", "worker"} else "router"
    before = await site.counted(service, kind)
    for data in ALL_KINDS.values():
        assert await site.refusal(kind, data) == "bad_message"
    assert await site.counted(service, kind) == before + len(ALL_KINDS)


def padded(message: dict[str, Any], size: int) -> bytes:
    """`message` with a field that nobody knows, `size` bytes in all."""
    padding = size - len(msgpack.packb({**message, "padding": b"\0" * 2**17})) + 2**17
    return bytes(msgpack.packb({**message, "padding": b"\0" * padding}))


async def test_messages_as_large_as_the_server_takes(site: Site) -> None:
    limit = site.bus.max_payload + HEADER_ALLOWANCE
    for kind, message in (("forward", FORWARD), ("experts", CALL), ("worker", CALL)):
        whole = padded(message, limit)
        assert len(whole) == limit
        async with Stranger.connected(site.nats_url) as stranger:
            await stranger.send(site.subject(kind).encode(), whole, reply=b"nowhere")
            await stranger.send(site.subject(kind).encode(), b"\0" * limit, reply=b"nowhere")
        assert await site.bus.request(site.subject(kind), padded(message, limit - HEADER_ALLOWANCE), timeout=SECONDS)
    for kind in SERVED:
        for data in (b"\xdd" + struct.pack(">I", limit) + b"\x01" * (limit - 4101), b"\x81" * (limit - 4096)):
            assert await site.refusal(kind, data) == "bad_message"


async def test_a_prompt_as_large_as_a_message(site: Site) -> None:
    data = msgpack.packb({**GENERATE, "token_ids": [5] * (site.bus.max_payload - 100)})
    assert await site.refusal("generate", data) == "context_length_exceeded"
    many = msgpack.packb({**GENERATE, "stop_token_ids": [5] * (site.bus.max_payload - 100)})
    assert await site.refusal("generate", many) == "invalid_request"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("kind", ["experts", "worker"])
async def test_numbers_that_are_none_stay_with_their_sender(site: Site, kind: str, value: float) -> None:
    """A worker computes what it is sent; the next caller's rows are as ever."""
    good = await site.bus.request(site.subject(kind), msgpack.packb(CALL), timeout=SECONDS)
    number = struct.pack("<f", value)
    for spoilt in (
        {"hidden_states": ["float32", [1, HIDDEN], number * HIDDEN]},
        {"weights": ["float32", [1], number]},
    ):
        bad = msgpack.packb({**CALL, **PAIR, **spoilt})
        first, second = await asyncio.gather(
            site.bus.request(site.subject(kind), bad, timeout=SECONDS),
            site.bus.request(site.subject(kind), msgpack.packb(CALL), timeout=SECONDS),
        )
        assert msgpack.unpackb(first)["hidden_states"][1] == [1, HIDDEN]
        assert second == good


async def test_wild_status_reports_are_refused_and_counted(site: Site) -> None:
    d = site.deployment
    base = {"v": 1, "service": "router", "instance": "wild", "deployment": d, "state": "ready"}
    wild: list[dict[str, Any]] = [
        {"num_shards": 2**62},
        {"num_shards": -1},
        {"shards": [2**62]},
        {"shards": [-1]},
        {"wanted_shards": list(range(5000))},
        {"started": math.nan},
        {"started": math.inf},
        {"kv_usage": math.nan},
        {"cpu": -1.0},
        {"max_model_len": -5},
        {"deployment": "x" * 1_000_000},
        {"expert_tokens": [[-1]]},
        {"expert_tokens": [[]] * 100_000},
        {"service": "expert"},
        {"instance": "another"},
    ]
    before = {service: await site.counted(service, "status") for service in site.statuses}
    async with Stranger.connected(site.nats_url) as stranger:
        for change in wild:
            await stranger.send(b"moe.status.router.wild", msgpack.packb({**base, **change}))
    for service in site.statuses:
        await wait_until(
            lambda s=service: counted(site, s, "status", before[s] + len(wild)),  # type: ignore[misc]
            f"{service} to count them all",
        )
    async with http(site.stack) as client:
        health = (await client.get("/health")).json()
    assert "wild" not in json.dumps(health)


async def test_a_flood_of_reports_leaves_the_known_ones(site: Site) -> None:
    async with Stranger.connected(site.nats_url) as stranger:
        data = {"v": 1, "service": "router", "deployment": "elsewhere", "state": "ready"}
        for n in range(6000):
            await stranger.send(b"moe.status.router.f%d" % n, msgpack.packb({**data, "instance": f"f{n}"}))
    async with http(site.stack) as client:
        health = (await client.get("/health")).json()
        assert health["status"] == "ok"
        assert (await client.get("/performance-report")).status_code == 200


async def test_garbage_events_and_discovery_are_survived(site: Site) -> None:
    async with Stranger.connected(site.nats_url) as stranger:
        for data in ALL_KINDS.values():
            for subject in (b"moe.events.alert", b"moe.events.x", b"moe.control.gateway.x", b"moe.control.expert.x"):
                await stranger.send(subject, data, reply=b"nowhere")
            for verb in (b"PING", b"INFO", b"STATS", b"NONE"):
                await stranger.send(b"$SRV." + verb, data, reply=b"nowhere")
                await stranger.send(b"$SRV." + verb + b".openmoe-router", data)
    for name in ("PING", "INFO", "STATS"):
        address = subjects.discovery(name, "router", site.statuses["router"].instance)
        assert json.loads(await site.bus.request(address, b"\xff", timeout=SECONDS))["name"] == "openmoe-router"


CHUNKS: dict[str, bytes] = {
    "nothing": b"",
    "noise": ALL_KINDS["noise"],
    "deep nesting": b"\x91" * 2000,
    "another's chunk": msgpack.packb({"v": 1, "id": "another", "token_ids": [5]}),
    "tokens out of the vocabulary": msgpack.packb({"v": 1, "id": "another", "token_ids": [2**62, -1]}),
    "another's end": msgpack.packb({"v": 1, "id": "another", "finish_reason": "stop"}),
    "an expert's reply": msgpack.packb({"v": 1, "hidden_states": ["float32", [1, 1], b"\0" * 4]}),
}


@pytest.mark.parametrize("data", CHUNKS.values(), ids=CHUNKS)
async def test_bogus_replies_into_a_gateways_live_stream(site: Site, data: bytes) -> None:
    """Ends within the time that is given, with the right text or one typed error; never with a wrong token."""
    body = {"prompt": PROMPT, "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    prefix = subjects.inbox_prefix("gateway", site.statuses["gateway"].instance)
    async with http(site.stack) as client:
        right = (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]
        under_way = asyncio.create_task(streamed(client, body))
        try:
            async with asyncio.timeout(SECONDS):
                while not under_way.done():
                    for token in range(1, 300):
                        await site.bus.publish(f"{prefix}.{token}", data)
                    await asyncio.sleep(0.05)
                text, code = await under_way
        finally:
            under_way.cancel()
            await asyncio.gather(under_way, return_exceptions=True)
    assert right.startswith(text)
    assert text == right or code in {"internal_error", "router_unavailable", "bus_unavailable", "chunk_lost"}, code


async def streamed(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[str, str]:
    """(text, code of the error that ended it, if one did)."""
    text = ""
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        if answer.status_code != 200:
            await answer.aread()
            return "", str(answer.json()["error"]["code"])
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return text, str(event["error"]["code"])
                text += "".join(choice["text"] for choice in event["choices"])
    return text, ""


@pytest.mark.parametrize("data", CHUNKS.values(), ids=CHUNKS)
async def test_bogus_replies_to_a_gateways_forward_request(site: Site, data: bytes) -> None:
    """The client is told of a fault that is not its own, or gets its answer."""
    body = {"layer": 0, "hidden_states": [[0.1] * HIDDEN]}
    prefix = subjects.inbox_prefix("gateway", site.statuses["gateway"].instance)
    stop = asyncio.Event()

    async def shoot() -> None:
        while not stop.is_set():
            for token in range(1, 500):
                await site.bus.publish(f"{prefix}.{token}", data)
            await asyncio.sleep(0)

    shooting = asyncio.create_task(shoot())
    try:
        async with http(site.stack) as client:
            for _ in range(3):
                answer = await client.post("/v1/moe/forward", json=body)
                assert answer.status_code in {200, 500, 503}, answer.text
    finally:
        stop.set()
        await shooting


async def test_bogus_replies_to_a_routers_expert_calls(site: Site) -> None:
    """Wrong bytes of a worker fail what they were for, or are asked for again; the router goes on."""
    prefix = subjects.inbox_prefix("router", site.statuses["router"].instance)
    request = GenerateRequest(id="bogus", token_ids=[5, 6], max_tokens=100, ignore_eos=True)
    with site.bus.open_stream() as stream:
        await site.bus.publish(site.subject("generate"), wire.encode(request), reply=stream.inbox)
        await stream.next(SECONDS)
        for data in CHUNKS.values():
            for token in range(1, 400):
                await site.bus.publish(f"{prefix}.{token}", data)
        await site.bus.flush()
        try:
            while not msgpack.unpackb(await stream.next(SECONDS)).get("finish_reason"):
                pass
        except MoeError as error:
            assert error.code in {"shard_unavailable", "internal_error"}  # noqa: PT017 - either is right
