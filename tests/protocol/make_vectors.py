"""Builds vectors.json, the protocol's test vectors, with the plain msgpack package and nothing of ours.

Run it after a change of the protocol: `python tests/protocol/make_vectors.py`.

In the file, bytes are `{"bytes": hex}` and maps with integer keys `{"map": [[key, value], ...]}`, as JSON has neither.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack

FILE = Path(__file__).parent / "vectors.json"
ABOUT = (
    "Test vectors of docs/protocol.md, made by make_vectors.py. 'tensors': one tensor by itself. 'messages': what each "
    "type means. 'hostile': bytes that must be refused as a message of their type; 'then' appends bytes many times. "
    "'defaults': what a field means that is left out."
)

FORMAT = {
    "float32": "f",
    "float16": "e",
    "int64": "q",
    "int32": "i",
    "int16": "h",
    "int8": "b",
    "uint8": "B",
    "bool": "?",
}
NUMBERS: dict[str, list[float]] = {
    "float32": [0.0, -0.0, 1.0, -1.5, 3.4028234663852886e38, 1.1754943508222875e-38],
    "float16": [0.0, -0.0, 1.0, -1.5, 65504.0, 6.103515625e-05],
    "bfloat16": [0.0, -0.0, 1.0, -1.5, 3.3895313892515355e38, 0.00390625],
    "int64": [0, 1, -1, 2**63 - 1, -(2**63), 256],
    "int32": [0, 1, -1, 2**31 - 1, -(2**31), 256],
    "int16": [0, 1, -1, 2**15 - 1, -(2**15), 256],
    "int8": [0, 1, -1, 127, -128, 64],
    "uint8": [0, 1, 2, 127, 128, 255],
    "bool": [True, False, True, True, False, False],
}

packb: Callable[..., bytes] = msgpack.packb


def data(dtype: str, numbers: list[float]) -> bytes:
    """The numbers' bytes, little-endian; a bfloat16 is the upper half of a float32."""
    if dtype == "bfloat16":
        return b"".join(struct.pack("<f", number)[2:] for number in numbers)
    return struct.pack(f"<{len(numbers)}{FORMAT[dtype]}", *numbers)


def tensor(dtype: str, shape: list[int], numbers: list[float]) -> list[Any]:
    return [dtype, shape, data(dtype, numbers)]


H2 = [[0.5, -1.0], [2.0, 0.25], [0.0, 1.0]]
HIDDEN = [number for row in H2 for number in row]

SAMPLING_DEFAULTS = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": 0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": {},
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "GenerateRequest": {
        "v": 1,
        "output_ids": [],
        "sampling": SAMPLING_DEFAULTS,
        "stop_token_ids": [],
        "ignore_eos": False,
        "logprobs": -1,
        "prompt_logprobs": -1,
        "return_logits": False,
        "return_prompt_logits": False,
        "return_routing": False,
        "client": "",
    },
    "GenerateChunk": {
        "v": 1,
        "instance": "",
        "token_ids": [],
        "start": None,
        "logprobs": [],
        "prompt_logprobs": None,
        "logits": None,
        "prompt_logits": None,
        "routing": None,
        "finish_reason": None,
        "stop_token_id": None,
        "degraded": False,
    },
    "ForwardRequest": {"v": 1},
    "ForwardReply": {"v": 1, "degraded": False},
    "CancelRequest": {"v": 1, "op": "cancel"},
    "CancelReply": {"v": 1},
    "CheckRequest": {"v": 1, "op": "check"},
    "CheckReply": {"v": 1},
    "ExpertsRequest": {"v": 1},
    "ExpertsReply": {"v": 1},
    "Event": {
        "v": 1,
        "state": "",
        "severity": "",
        "action": "",
        "value": None,
        "threshold": None,
        "started": 0.0,
        "fingerprint": "",
    },
    "AuditRecord": {"v": 1},
    "Deployment": {"v": 1},
    "Placement": {"v": 1, "unwritten": []},
    "Roster": {"v": 1, "unwritten": []},
    "ExpertPlan": {"v": 1, "experts": []},
    "ScalingEvent": {
        "v": 1,
        "winner": "",
        "metrics": [],
        "held": [],
        "by_hand": False,
        "dry_run": False,
        "outcome": "",
    },
    "ScaleRequest": {"v": 1, "op": "scale", "reason": ""},
    "ScaleReply": {"v": 1},
    "Status": {
        "v": 1,
        "deployment": "",
        "model": "",
        "state": "starting",
        "pid": 0,
        "host": "",
        "started": 0.0,
        "address": "",
        "num_shards": 0,
        "shards": [],
        "wanted_shards": [],
        "pinned": False,
        "loaded_bytes": 0,
        "total_bytes": 0,
        "running": 0,
        "waiting": 0,
        "max_model_len": 0,
        "kv_usage": 0.0,
        "tokens_total": 0,
        "requests_total": 0,
        "errors_total": 0,
        "cpu": 0.0,
        "cores": 0.0,
        "busy_seconds": 0.0,
        "memory_bytes": 0,
        "memory_limit_bytes": 0,
        "memory_available_bytes": 0,
        "queue_limit": 0,
        "latencies": {},
        "errors": {},
        "cache_lookups": 0,
        "cache_hits": 0,
        "epoch": 0,
        "expert_tokens": [],
        "shard_tokens": [],
        "state_stored": False,
    },
}

RECORD = {
    "id": "1767225600.500000-monitor-1-placement_changed-demo-3f2a91bc",
    "time": 1767225600.5,
    "actor": "monitor-1",
    "action": "placement_changed",
    "subject": "demo-3f2a91bc",
    "text": "epoch 3: expert-2 serves 0, 1",
}

SCALING = {
    "kind": "scale_up",
    "subject": "expert",
    "text": "2 experts become 3, as cpu_usage: 92% busy, mean of 2",
    "time": 1767225600.5,
    "actor": "monitor-1",
    "current": 2,
    "wanted": 3,
    "desired": 3,
}

# type -> the message with its required fields only
OPEN_ALERT = {
    "kind": "shard_without_replica",
    "subject": "demo-3f2a91bc/1",
    "text": "no worker serves shard 1 of demo-3f2a91bc",
    "service": "expert",
    "deployment": "demo-3f2a91bc",
    "instance": "",
    "severity": "critical",
    "action": "takeover",
    "advice": "Start workers.",
    "value": 0.0,
    "threshold": 1.0,
    "started": 1767225600.5,
    "notified": 1767225600.5,
}

MINIMAL: dict[str, dict[str, Any]] = {
    "GenerateRequest": {"id": "g-1", "token_ids": [5], "max_tokens": 1},
    "GenerateChunk": {"id": "g-1"},
    "ForwardRequest": {"layer": 0, "hidden_states": tensor("float32", [1, 2], [0.5, -1.0])},
    "ForwardReply": {
        "hidden_states": tensor("float32", [1, 2], [0.25, 1.5]),
        "top_k_index": tensor("int64", [1, 2], [7, 2]),
        "top_k_weights": tensor("float32", [1, 2], [0.75, 0.25]),
    },
    "CancelRequest": {"id": "g-1"},
    "CancelReply": {"found": True},
    "CheckRequest": {"ids": ["g-1"]},
    "CheckReply": {"tokens": {"g-1": 3}},
    "ExpertsRequest": {
        "layer": 1,
        "hidden_states": tensor("float32", [3, 2], HIDDEN),
        "token_index": tensor("int32", [4], [0, 1, 1, 2]),
        "expert_index": tensor("int32", [4], [2, 0, 2, 4]),
        "weights": tensor("float32", [4], [1.0, 0.75, 0.25, 0.5]),
    },
    "ExpertsReply": {"hidden_states": tensor("float32", [1, 2], [0.25, 1.5])},
    "Status": {"service": "expert", "instance": "expert-1"},
    "Event": {
        "kind": "service_down",
        "subject": "expert-1",
        "text": "expert expert-1 has fallen silent",
        "time": 1767225600.5,
    },
    "AuditRecord": RECORD,
    "ScalingEvent": SCALING,
    "ScaleRequest": {"counts": {"expert": 4}},
    "ScaleReply": {"counts": {"expert": 4}, "text": "expert-5, expert-6 start"},
    "Deployment": {
        "model": "demo",
        "fingerprint": "3f2a91bc",
        "num_shards": 2,
        "first_seen": 1767225600.5,
        "last_seen": 1767229200.5,
    },
    "Placement": {
        "epoch": 3,
        "shards": [[0, ["expert-1", "expert-2"]], [1, ["expert-2"]]],
        "time": 1767225600.5,
        "reason": "expert-2 serves 0, 1",
    },
    "Roster": {
        "members": [{"service": "router", "instance": "router-1", "draining": False}],
        "alerts": [OPEN_ALERT],
    },
    "ExpertPlan": {
        "epoch": 2,
        "num_shards": 2,
        "time": 1767225600.5,
        "before": 1.75,
        "expected": 1.0,
        "reason": "the most loaded shard has 1.75 times the mean",
    },
}

# (name, type, message)
MESSAGES: list[tuple[str, str, dict[str, Any]]] = [
    (
        "generate: greedy",
        "GenerateRequest",
        {"v": 1, "id": "g-1", "token_ids": [489, 889, 65], "max_tokens": 8, "sampling": {"temperature": 0}},
    ),
    (
        "generate: every field",
        "GenerateRequest",
        {
            "v": 1,
            "id": "g-2é",
            "token_ids": [0, 127, 128, 65535, 65536],
            "max_tokens": 1000,
            "output_ids": [7, 4000],
            "sampling": {
                "temperature": 0.7,
                "top_p": 0.9,
                "top_k": 40,
                "min_p": 0.05,
                "seed": 2**63 - 1,
                "presence_penalty": -2.0,
                "frequency_penalty": 2.0,
                "repetition_penalty": 1.1,
                "logit_bias": {5: -100.0, 4000: 1.5},
            },
            "stop_token_ids": [0, 3],
            "ignore_eos": True,
            "logprobs": 20,
            "prompt_logprobs": 0,
            "return_logits": True,
            "return_prompt_logits": True,
            "return_routing": True,
            "client": "gateway-1",
        },
    ),
    (
        "generate: every default said aloud",
        "GenerateRequest",
        {**DEFAULTS["GenerateRequest"], **MINIMAL["GenerateRequest"]},
    ),
    (
        "generate: fields of a later version are ignored",
        "GenerateRequest",
        {"v": 1, **MINIMAL["GenerateRequest"], "priority": 3, "labels": {"team": ["a", None, 1.5, b"\x00"]}},
    ),
    ("chunk: accepted", "GenerateChunk", {"v": 1, "id": "g-1", "instance": "router-1"}),
    ("chunk: one token", "GenerateChunk", {"v": 1, "id": "g-1", "token_ids": [472], "start": 0}),
    (
        "chunk: the last, ended by a stop token",
        "GenerateChunk",
        {"v": 1, "id": "g-1", "token_ids": [0], "start": 1, "finish_reason": "stop", "stop_token_id": 0},
    ),
    ("chunk: cancelled", "GenerateChunk", {"v": 1, "id": "g-1", "finish_reason": "cancelled"}),
    (
        "chunk: every field",
        "GenerateChunk",
        {
            "v": 1,
            "id": "g-2",
            "instance": "router-1",
            "token_ids": [7],
            "start": 2,
            "logprobs": [[7, -0.25, 1, [[7, -0.25], [9, -2.5]]]],
            "prompt_logprobs": [None, [5, -3.5, 12, []]],
            "logits": tensor("float32", [1, 4], [0.0, 1.0, -1.5, 0.25]),
            "prompt_logits": tensor("float32", [2, 2], [0.5, -1.0, 2.0, 0.25]),
            "routing": tensor("int32", [2, 1, 2], [0, 1, 1, 0]),
            "finish_reason": "length",
            "stop_token_id": None,
            "degraded": True,
        },
    ),
    ("chunk: a log-probability without alternatives", "GenerateChunk", {"id": "g-1", "logprobs": [[7, -0.25, 1]]}),
    (
        "forward: bfloat16",
        "ForwardRequest",
        {"v": 1, "layer": 3, "hidden_states": tensor("bfloat16", [3, 2], HIDDEN)},
    ),
    ("forward: float16", "ForwardRequest", {"v": 1, "layer": 3, "hidden_states": tensor("float16", [3, 2], HIDDEN)}),
    ("forward: float32", "ForwardRequest", {"v": 1, **MINIMAL["ForwardRequest"]}),
    ("forward: the answer", "ForwardReply", {"v": 1, **MINIMAL["ForwardReply"]}),
    ("cancel", "CancelRequest", {"v": 1, "op": "cancel", "id": "g-1"}),
    ("cancel: the answer", "CancelReply", {"v": 1, "found": False}),
    ("check", "CheckRequest", {"v": 1, "op": "check", "ids": ["g-1", "g-2"]}),
    ("check: the answer", "CheckReply", {"v": 1, "tokens": {"g-1": 17}}),
    (
        "generate: to go on after three tokens",
        "GenerateRequest",
        {"v": 1, "id": "g-1.1", "token_ids": [489, 889, 65], "max_tokens": 8, "output_ids": [472, 65, 9]},
    ),
    ("chunk: the fourth token", "GenerateChunk", {"v": 1, "id": "g-1.1", "token_ids": [12], "start": 3}),
    ("experts: float32", "ExpertsRequest", {"v": 1, **MINIMAL["ExpertsRequest"]}),
    (
        "experts: bfloat16",
        "ExpertsRequest",
        {"v": 1, **MINIMAL["ExpertsRequest"], "hidden_states": tensor("bfloat16", [3, 2], HIDDEN)},
    ),
    (
        "experts: no pairs",
        "ExpertsRequest",
        {
            "v": 1,
            "layer": 0,
            "hidden_states": tensor("float32", [1, 2], [0.5, -1.0]),
            "token_index": tensor("int32", [0], []),
            "expert_index": tensor("int32", [0], []),
            "weights": tensor("float32", [0], []),
        },
    ),
    ("experts: the answer", "ExpertsReply", {"v": 1, "hidden_states": tensor("bfloat16", [3, 2], HIDDEN)}),
    (
        "status: a router",
        "Status",
        {
            "v": 1,
            "service": "router",
            "instance": "router-1",
            "deployment": "demo-3f2a91bc",
            "model": "demo",
            "state": "ready",
            "pid": 4711,
            "host": "node-1",
            "started": 1767225600.5,
            "address": "127.0.0.1:9100",
            "num_shards": 2,
            "shards": [],
            "wanted_shards": [],
            "pinned": False,
            "loaded_bytes": 5000000000,
            "total_bytes": 5000000000,
            "running": 3,
            "waiting": 1,
            "max_model_len": 1024,
            "kv_usage": 0.125,
            "tokens_total": 70000,
            "requests_total": 900,
            "errors_total": 1,
            "cpu": 0.75,
            "cores": 2.0,
            "memory_bytes": 600000000,
            "memory_limit_bytes": 24000000000,
            "memory_available_bytes": 9000000000,
            "queue_limit": 1024,
            "latencies": {"queue": [900], "step": [0, 0, 10, 890]},
            "errors": {"queue_timeout": 1},
            "epoch": 3,
            "expert_tokens": [[10, 20], [15, 15]],
            "shard_tokens": [[10, 20], [15, 15]],
        },
    ),
    (
        "status: an expert worker",
        "Status",
        {
            "v": 1,
            "service": "expert",
            "instance": "expert-1",
            "deployment": "demo-3f2a91bc",
            "model": "demo",
            "state": "ready",
            "started": 1767225600.5,
            "num_shards": 2,
            "shards": [0, 1],
        },
    ),
    (
        "status: a monitor that keeps its state",
        "Status",
        {"v": 1, "service": "monitor", "instance": "monitor-1", "state": "ready", "state_stored": True},
    ),
    ("event: a worker fell silent", "Event", {"v": 1, **MINIMAL["Event"]}),
    (
        "event: an alert is over",
        "Event",
        {
            "v": 1,
            "kind": "high_latency",
            "subject": "demo-3f2a91bc",
            "text": "p95 of time to first token of demo-3f2a91bc is 380 ms over 412 samples in 60 s",
            "time": 1767225660.5,
            "state": "resolved",
            "severity": "warning",
            "action": "scale_up",
            "value": 0.625,
            "threshold": 0.5,
            "started": 1767225600.5,
            "fingerprint": "9d2c0f6a4be1735d",
        },
    ),
    ("audit: a placement changed", "AuditRecord", {"v": 1, **RECORD}),
    (
        "scaling: every field",
        "ScalingEvent",
        {
            "v": 1,
            **SCALING,
            "winner": "cpu_usage",
            "metrics": [
                {"metric": "cpu_usage", "usage": 0.92, "wanted": 3, "text": "92% busy, mean of 2"},
                {"metric": "response_time", "usage": None, "wanted": None, "text": "gateway-1 has not been heard of"},
            ],
            "held": [["bounds", "5 are wanted, at most 3 may be"]],
            "by_hand": True,
            "dry_run": True,
            "outcome": "expert-5 start",
        },
    ),
    ("scale: by hand", "ScaleRequest", {"v": 1, "op": "scale", "counts": {"expert": 4}, "reason": "openmoe scale"}),
    ("scale: the answer", "ScaleReply", {"v": 1, "counts": {"expert": 4}, "text": "expert-5, expert-6 start"}),
    ("deployment: seen for an hour", "Deployment", {"v": 1, **MINIMAL["Deployment"]}),
    ("placement: every field", "Placement", {"v": 1, **MINIMAL["Placement"], "unwritten": [{"v": 1, **RECORD}]}),
    (
        "roster: every field",
        "Roster",
        {
            "v": 1,
            "members": [
                {"service": "expert", "instance": "expert-1", "draining": True},
                {"service": "router", "instance": "router-1", "draining": False},
            ],
            "alerts": [OPEN_ALERT],
            "unwritten": [{"v": 1, **RECORD}],
        },
    ),
    (
        "plan: every field",
        "ExpertPlan",
        {
            "v": 1,
            **MINIMAL["ExpertPlan"],
            "experts": [
                {"layer": 0, "expert": 4, "shards": [[0, 64], [1, 192]]},
                {"layer": 1, "expert": 3, "shards": [[0, 256]]},
            ],
        },
    ),
]


def long_form(value: Any) -> bytes:
    """`value` in msgpack's longest forms: a decoder must not insist on the shortest."""
    match value:
        case bool() | None:
            return packb(value)
        case int():
            return b"\xd3" + struct.pack(">q", value)
        case float():
            return b"\xcb" + struct.pack(">d", value)
        case str():
            return b"\xdb" + struct.pack(">I", len(value.encode())) + value.encode()
        case bytes():
            return b"\xc6" + struct.pack(">I", len(value)) + value
        case list():
            return b"\xdd" + struct.pack(">I", len(value)) + b"".join(map(long_form, value))
        case dict():
            items = b"".join(long_form(key) + long_form(item) for key, item in value.items())
            return b"\xdf" + struct.pack(">I", len(value)) + items
    raise TypeError(type(value))


def as_json(value: Any) -> Any:
    match value:
        case bytes():
            return {"bytes": value.hex()}
        case list():
            return [as_json(item) for item in value]
        case dict() if any(not isinstance(key, str) for key in value):
            return {"map": [[key, as_json(item)] for key, item in value.items()]}
        case dict():
            return {key: as_json(item) for key, item in value.items()}
    return value


def from_json(value: Any) -> Any:
    """The inverse of `as_json`."""
    match value:
        case list():
            return [from_json(item) for item in value]
        case {"bytes": str(digits), **rest} if not rest:
            return bytes.fromhex(digits)
        case {"map": list(items), **rest} if not rest:
            return {key: from_json(item) for key, item in items}
        case dict():
            return {key: from_json(item) for key, item in value.items()}
    return value


def hostile_of_every_type() -> list[dict[str, Any]]:
    """What no type may take for itself."""
    vectors = []

    def add(name: str, kind: str, raw: bytes, **more: Any) -> None:
        vectors.append({"name": f"{kind}: {name}", "type": kind, "hex": raw.hex(), **more})

    for kind, minimal in MINIMAL.items():
        whole = {"v": 1, **minimal}
        good = packb(whole)
        add("no bytes", kind, b"")
        add("cut short by a byte", kind, good[:-1])
        add("cut after the map's head", kind, good[:1])
        add("a byte too many", kind, good + b"\xc0")
        add("two messages", kind, good + good)
        add("the byte that msgpack never uses", kind, b"\xc1")
        add("nil", kind, packb(None))
        add("a string", kind, packb("{}"))
        add("JSON", kind, b'{"v": 1}')
        add("an array in the map's place", kind, packb(list(whole.values())))
        add("an extension type in the map's place", kind, packb(msgpack.ExtType(1, good)))
        add("integer keys", kind, packb(dict(enumerate(whole.values()))))
        add("keys as bytes", kind, packb({key.encode(): value for key, value in whole.items()}))
        add("a key that is no UTF-8", kind, b"\x81\xa2\xff\xfe\x01")
        for wrong in (0, 2, -1, "1", 1.0, True, None, [1]):
            add(f"v is {wrong!r}", kind, packb({**whole, "v": wrong}))
        for key in minimal:
            add(f"{key} is missing", kind, packb({k: value for k, value in whole.items() if k != key}))
            add(f"{key} is nil", kind, packb({**whole, key: None}))
            add(f"{key} is a map", kind, packb({**whole, key: {"a": [1]}}))
            add(f"{key} is an extension type", kind, packb({**whole, key: msgpack.ExtType(5, b"abc")}))
            add(f"{key} is a timestamp", kind, packb({**whole, key: msgpack.Timestamp(1)}))
        head = bytes([good[0] + 1]) + good[1:] + packb("unknown")
        add("nested too deep", kind, head, then={"hex": "91", "times": 100_000})
        add("nested too deep, as maps", kind, head, then={"hex": "81a161", "times": 100_000})
        add("a map that claims 4 billion entries", kind, b"\xdf\xff\xff\xff\xff" + good[1:])
        add("a string that claims 4 GB", kind, b"\x81\xdb\xff\xff\xff\xffv")
    return vectors


def hostile_tensors() -> list[tuple[str, Any]]:
    """What may not stand in a tensor's place."""
    zeros = b"\0" * 8
    return [
        ("a byte too few", ["float32", [1, 2], zeros[:7]]),
        ("a byte too many", ["float32", [1, 2], zeros + b"\0"]),
        ("no bytes", ["float32", [1, 2], b""]),
        ("bytes for an empty shape", ["float32", [0, 2], zeros]),
        ("the itemsize of another dtype", ["float16", [1, 2], zeros]),
        ("a negative size", ["float32", [-1, 2], zeros]),
        ("two negative sizes, whose product is right", ["float32", [-1, -2], zeros]),
        ("sizes whose product overflows 64 bits to 0", ["uint8", [2**32, 2**32], b""]),
        ("sizes whose product overflows 64 bits to 8", ["uint8", [2**61 + 1, 8], zeros]),
        ("a size of 2**64 - 1", ["uint8", [2**64 - 1], zeros]),
        ("nine dimensions", ["uint8", [1] * 9, b"\0"]),
        ("float64", ["float64", [1], zeros]),
        ("complex64", ["complex64", [1], zeros]),
        ("an object dtype", ["object", [1], zeros]),
        ("numpy's spelling", ["<f4", [1, 2], zeros]),
        ("an empty dtype", ["", [1, 2], zeros]),
        ("the dtype as a number", [1, [1, 2], zeros]),
        ("the dtype in bytes", [b"float32", [1, 2], zeros]),
        ("the shape as a number", ["float32", 2, zeros]),
        ("a float in the shape", ["float32", [1.0, 2.0], zeros]),
        ("a boolean in the shape", ["float32", [True, 2], zeros]),
        ("nil in the shape", ["float32", [None, 2], zeros]),
        ("the data as a string", ["float32", [1, 2], "\0" * 8]),
        ("the data as numbers", ["float32", [1, 2], [0.0, 0.0]]),
        ("the data as an extension type", ["float32", [1, 2], msgpack.ExtType(1, zeros)]),
        ("no data", ["float32", [1, 2]]),
        ("an empty array", []),
        ("a map", {"dtype": "float32", "shape": [1, 2], "data": zeros}),
        ("plain bytes", zeros),
        ("rows of numbers", [[0.0, 0.0]]),
    ]


def hostile_values() -> list[tuple[str, str, dict[str, Any]]]:
    """(type, field and what is wrong, fields to change): values out of their range."""
    nan, infinity = float("nan"), float("inf")
    generate: list[tuple[str, dict[str, Any]]] = [
        ("an empty id", {"id": ""}),
        ("an id of 129 characters", {"id": "x" * 129}),
        ("no tokens", {"token_ids": []}),
        ("a negative token", {"token_ids": [5, -1]}),
        ("a float among the tokens", {"token_ids": [5, 1.0]}),
        ("a boolean among the tokens", {"token_ids": [True]}),
        ("tokens as a tensor", {"token_ids": tensor("int32", [1], [5])}),
        ("a negative max_tokens", {"max_tokens": -1}),
        ("a negative token in output_ids", {"output_ids": [5, -1]}),
        ("max_tokens as a float", {"max_tokens": 1.0}),
        ("max_tokens as text", {"max_tokens": "1"}),
        ("logprobs of 21", {"logprobs": 21}),
        ("logprobs of -2", {"logprobs": -2}),
        ("prompt_logprobs of 21", {"prompt_logprobs": 21}),
        ("ignore_eos as a number", {"ignore_eos": 1}),
        ("stop_token_ids as a number", {"stop_token_ids": 0}),
        ("client as a number", {"client": 1}),
        ("sampling is nil", {"sampling": None}),
        ("sampling is an array", {"sampling": []}),
    ]
    for key, wrong in {
        "temperature": (-0.1, 100.5, nan, infinity, "1", None),
        "top_p": (0.0, 1.5, nan),
        "top_k": (-1, 1.0),
        "min_p": (-0.1, 1.1, nan),
        "seed": (-1, 2**63, 1.0),
        "presence_penalty": (-2.5, 2.5, nan, -infinity),
        "frequency_penalty": (-2.5, 2.5, nan),
        "repetition_penalty": (0.0, -1.0, 101.0, nan),
        "logit_bias": ({5: 100.5}, {5: nan}, {"5": 1.0}, {1.5: 1.0}, [[5, 1.0]]),
    }.items():
        generate += [(f"{key} of {value!r}", {"sampling": {key: value}}) for value in wrong]
    others: list[tuple[str, str, dict[str, Any]]] = [
        ("GenerateChunk", "an unknown finish_reason", {"finish_reason": "eos"}),
        ("GenerateChunk", "a log-probability without its rank", {"logprobs": [[7, -0.25]]}),
        ("GenerateChunk", "a log-probability as a map", {"logprobs": [{"token": 7, "logprob": -0.25, "rank": 1}]}),
        ("GenerateChunk", "an alternative without its value", {"logprobs": [[7, -0.25, 1, [[7]]]]}),
        ("ForwardRequest", "a negative layer", {"layer": -1}),
        ("ExpertsRequest", "a negative layer", {"layer": -1}),
        ("CancelRequest", "an op that no one knows", {"op": "drain"}),
        ("CancelReply", "found as a number", {"found": 1}),
        ("CheckRequest", "an id that is a number", {"ids": [1]}),
        ("CheckReply", "a count as text", {"tokens": {"g-1": "3"}}),
        ("ForwardReply", "degraded as a number", {"degraded": 1}),
        ("GenerateChunk", "a start as text", {"start": "2"}),
        ("Status", "an unknown state", {"state": "odd"}),
        ("Status", "shards as text", {"shards": "0,1"}),
        ("Status", "started as a timestamp", {"started": msgpack.Timestamp(1)}),
        ("Status", "expert_tokens without rows", {"expert_tokens": [1, 2]}),
        ("Event", "the time as text", {"time": "2026-01-01T00:00:00Z"}),
        ("Event", "a state that no one knows", {"state": "acknowledged"}),
        ("Event", "a value as text", {"value": "0.6"}),
        ("AuditRecord", "the time as text", {"time": "2026-01-01T00:00:00Z"}),
        ("ScalingEvent", "a kind that no one knows", {"kind": "scaled"}),
        ("ScalingEvent", "a rule without its reason", {"held": [["bounds"]]}),
        ("ScalingEvent", "a usage as text", {"metrics": [{"metric": "cpu_usage", "usage": "0.9", "text": ""}]}),
        ("ScaleRequest", "an op that no one knows", {"op": "drain"}),
        ("ScaleRequest", "a service that is not scaled", {"counts": {"monitor": 2}}),
        ("ScaleRequest", "a negative count", {"counts": {"expert": -1}}),
        ("ScaleRequest", "a count beyond all fleets", {"counts": {"expert": 1025}}),
        ("ScaleReply", "a count as text", {"counts": {"expert": "4"}}),
        ("Deployment", "a negative number of shards", {"num_shards": -1}),
        ("Placement", "an epoch of 0", {"epoch": 0}),
        ("Placement", "an epoch as a float", {"epoch": 1.0}),
        ("Placement", "a negative shard", {"shards": [[-1, ["expert-1"]]]}),
        ("Placement", "a shard without workers", {"shards": [[0]]}),
        ("Placement", "shards as a map", {"shards": {"0": ["expert-1"]}}),
        ("ExpertPlan", "an epoch of 0", {"epoch": 0}),
        ("ExpertPlan", "no shards", {"num_shards": 0}),
        ("ExpertPlan", "1025 shards", {"num_shards": 1025}),
        ("ExpertPlan", "parts that do not add up", {"experts": [{"layer": 0, "expert": 0, "shards": [[0, 255]]}]}),
        ("ExpertPlan", "a part of 0", {"experts": [{"layer": 0, "expert": 0, "shards": [[0, 256], [1, 0]]}]}),
        ("ExpertPlan", "an expert nowhere", {"experts": [{"layer": 0, "expert": 0, "shards": []}]}),
        (
            "ExpertPlan",
            "a shard twice",
            {"experts": [{"layer": 0, "expert": 0, "shards": [[1, 128], [1, 128]]}]},
        ),
        (
            "ExpertPlan",
            "shards that do not ascend",
            {"experts": [{"layer": 0, "expert": 0, "shards": [[1, 128], [0, 128]]}]},
        ),
        ("ExpertPlan", "a negative expert", {"experts": [{"layer": 0, "expert": -1, "shards": [[0, 256]]}]}),
        ("ExpertPlan", "a layer as text", {"experts": [{"layer": "0", "expert": 0, "shards": [[0, 256]]}]}),
        ("ExpertPlan", "the time as text", {"time": "2026-01-01T00:00:00Z"}),
        ("Status", "shard_tokens without rows", {"shard_tokens": [1, 2]}),
        ("Roster", "a member without a service", {"members": [{"instance": "expert-1"}]}),
        ("Roster", "alerts as text", {"alerts": "none"}),
    ]
    return [("GenerateRequest", name, change) for name, change in generate] + others


def hostile() -> list[dict[str, Any]]:
    vectors = hostile_of_every_type()
    for kind, minimal in MINIMAL.items():
        for key, value in minimal.items():
            if not (isinstance(value, list) and len(value) == 3 and isinstance(value[0], str)):
                continue
            for name, wrong in hostile_tensors():
                raw = packb({"v": 1, **minimal, key: wrong})
                vectors.append({"name": f"{kind}: {key}: {name}", "type": kind, "hex": raw.hex()})
    for kind, name, change in hostile_values():
        raw = packb({"v": 1, **MINIMAL[kind], **change})
        vectors.append({"name": f"{kind}: {name}", "type": kind, "hex": raw.hex()})
    claims = packb({"v": 1, "layer": 0})[1:] + packb("hidden_states") + b"\x93" + packb("uint8")
    for name, tail in (
        ("a shape that claims 4 billion sizes", b"\xdd\xff\xff\xff\xff\x01"),
        ("data that claim 4 GB", packb([1]) + b"\xc6\xff\xff\xff\xff\x00"),
    ):
        raw = b"\x83" + claims + tail
        vectors.append({"name": f"ForwardRequest: {name}", "type": "ForwardRequest", "hex": raw.hex()})
    raw = b"\x81" + packb("token_ids") + b"\xdd\xff\xff\xff\xff\x01"
    vectors.append(
        {"name": "GenerateRequest: 4 billion tokens claimed", "type": "GenerateRequest", "hex": raw.hex()},
    )
    return vectors


def tensors() -> list[dict[str, Any]]:
    shapes: list[tuple[str, list[int], list[float]]] = [
        (dtype, [2, 3], numbers) for dtype, numbers in NUMBERS.items()
    ] + [
        ("float32", [], [1.5]),
        ("int64", [0], []),
        ("float32", [0, 256], []),
        ("uint8", [1] * 8, [7]),
    ]
    vectors = []
    for dtype, shape, numbers in shapes:
        value = tensor(dtype, shape, numbers)
        vectors.append(
            {
                "name": f"{dtype} {shape}",
                "hex": packb(value).hex(),
                "value": as_json(value),
                "numbers": numbers,
            }
        )
    return vectors


def messages() -> list[dict[str, Any]]:
    vectors = []

    def add(name: str, kind: str, message: dict[str, Any], raw: bytes, form: str) -> None:
        vectors.append({"name": name, "type": kind, "form": form, "hex": raw.hex(), "value": as_json(message)})

    for name, kind, message in MESSAGES:
        add(name, kind, message, packb(message), "short")
    for kind, message in MINIMAL.items():
        add(f"{kind}: required fields only", kind, message, packb(message), "short")
    seen = set()
    for name, kind, message in MESSAGES:
        if kind not in seen or name.endswith("every field"):
            add(f"{name}, in msgpack's longest forms", kind, message, long_form(message), "long")
        seen.add(kind)
    return vectors


def text() -> str:
    """The file's contents: one vector a line."""
    sections = {"tensors": tensors(), "messages": messages(), "hostile": hostile()}
    lines = ["{", f'"about": {json.dumps(ABOUT)},', f'"defaults": {json.dumps(as_json(DEFAULTS))},']
    for name, vectors in sections.items():
        body = ",\n".join(json.dumps(vector, ensure_ascii=True) for vector in vectors)
        lines.append(f'"{name}": [\n{body}\n]' + ("" if name == "hostile" else ","))
    return "\n".join([*lines, "}", ""])


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
