"""Runs in a container of its own, on the stack's network: a NATS client with none of the project's code."""

from __future__ import annotations

import asyncio
import json
import struct

import nats
from msgspec import msgpack


async def main() -> None:
    bus = await nats.connect("nats://nats:4222")
    report = await (await bus.subscribe("moe.status.router.*")).next_msg(timeout=5)
    deployment = msgpack.decode(report.data)["deployment"]

    inbox = bus.new_inbox()
    replies = await bus.subscribe(inbox)
    request = {"v": 1, "id": inbox, "token_ids": [1, 2, 3], "max_tokens": 8, "ignore_eos": True}
    await bus.publish(f"moe.{deployment}.generate", msgpack.encode(request), reply=inbox)
    tokens: list[int] = []
    reason = None
    while reason is None:
        chunk = msgpack.decode((await replies.next_msg(timeout=30)).data)
        tokens += chunk.get("token_ids", [])
        reason = chunk.get("finish_reason")

    hidden = ["float32", [1, 256], struct.pack("<256f", *[0.1] * 256)]
    call = {
        "v": 1,
        "layer": 1,
        "hidden_states": hidden,
        "token_index": ["int32", [1], struct.pack("<i", 0)],
        "expert_index": ["int32", [1], struct.pack("<i", 0)],
        "weights": ["float32", [1], struct.pack("<f", 1.0)],
    }
    reply = await bus.request(f"moe.{deployment}.experts.0", msgpack.encode(call), timeout=10)
    dtype, shape, _data = msgpack.decode(reply.data)["hidden_states"]
    await bus.close()
    print(json.dumps({"token_ids": tokens, "finish_reason": reason, "expert": [dtype, shape]}))


asyncio.run(main())
