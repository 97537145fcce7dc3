"""A wrong setting is refused in one line that names the variable; a secret's value is never shown."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from services.nats_server import free_port
from tests.oracle import make_checkpoint
from tests.running import start, start_service
from tests.start.starting import refusal

WRONG = [
    ("router", "BATCH_SIZE", "many"),
    ("router", "BATCH_SIZE", "0"),
    ("router", "KV_CACHE_MB", "-1"),
    ("router", "PREFILL_CHUNK_TOKENS", "1.5"),
    ("router", "EXPERT_RECOVERY_SECONDS", "soon"),
    ("router", "TIMEOUT_SECONDS", "nan"),
    ("router", "DTYPE", "int4"),
    ("router", "DEVICE", "tpu"),
    ("router", "TORCH_THREADS", "-2"),
    ("expert", "EXPERT_SHARDS", "0"),
    ("expert", "SHARDS", "0;1"),
    ("expert", "SHARDS", "7"),
    ("expert", "WORKERS", "0"),
    ("expert", "INSTANCE", "a.b"),
    ("gateway", "PORT", "99999"),
    ("gateway", "PORT", "http"),
    ("gateway", "MAX_CONCURRENT_REQUESTS", "0"),
    ("gateway", "MAX_BODY_MB", "much"),
    ("gateway", "ENV", "prod"),
    ("monitor", "STALE_SECONDS", "0"),
    ("monitor", "LOG_LEVEL", "LOUD"),
    ("up", "BATCH_SIZE", "many"),
    ("up", "LOG_LEVEL", "LOUD"),
]


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody else listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("settings") / "tiny", "mixtral")


@pytest.mark.parametrize(("what", "name", "value"), WRONG, ids=["-".join(case) for case in WRONG])
async def test_a_wrong_value_is_refused_by_name(what: str, name: str, value: str, tiny: Path, tmp_path: Path) -> None:
    line = await refusal(tmp_path, what, {"MODEL": str(tiny), name: value})
    assert f"{name}=" in line
    assert value in line


async def test_every_wrong_value_is_named_at_once(tmp_path: Path) -> None:
    line = await refusal(tmp_path, "router", {"BATCH_SIZE": "many", "KV_CACHE_MB": "0", "LOG_LEVEL": "LOUD"})
    for name in ("BATCH_SIZE", "KV_CACHE_MB", "LOG_LEVEL"):
        assert f"{name}=" in line


async def test_a_command_refuses_as_its_service_does(tmp_path: Path) -> None:
    running = await start(tmp_path, "cli", sys.executable, "-m", "services.cli", "router", BATCH_SIZE="many")
    assert await running.ended() == 2
    (line,) = running.log.read_text().splitlines()
    assert line.startswith("error: BATCH_SIZE='many'")


async def test_a_secret_is_never_shown(tiny: Path, tmp_path: Path) -> None:
    line = await refusal(tmp_path, "gateway", {"MODEL": str(tiny), "API_AUTH_TOKEN": "secret"})
    assert "API_AUTH_TOKEN" in line
    assert "secret" not in line.replace("(hidden)", "")


async def test_a_secrets_file_that_is_not_there_is_named(tiny: Path, tmp_path: Path) -> None:
    file = str(tmp_path / "nowhere")
    line = await refusal(tmp_path, "gateway", {"MODEL": str(tiny), "API_AUTH_TOKEN_FILE": file})
    assert f"API_AUTH_TOKEN_FILE={file}" in line


async def test_a_kv_cache_too_small_for_one_block_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "m", "mixtral-head-dim", head_dim=64)  # 3 MB for a block of 1024 tokens
    settings = {"MODEL": str(path), "KV_BLOCK_TOKENS": "1024", "KV_CACHE_MB": "1"}
    assert "KV_CACHE_MB=1" in await refusal(tmp_path, "router", settings)


async def test_a_kv_cache_too_small_for_the_wanted_length_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "m", "mixtral-head-dim", head_dim=512)  # 393216 bytes for a block of 16 tokens
    line = await refusal(tmp_path, "router", {"MODEL": str(path), "KV_CACHE_MB": "1", "MAX_MODEL_LEN": "200"})
    assert "KV_CACHE_MB=1" in line
    assert "MAX_MODEL_LEN asks for 200" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
async def test_a_device_that_is_not_there_is_named(tiny: Path, tmp_path: Path) -> None:
    for what in ("router", "expert"):
        assert "DEVICE=cuda" in await refusal(tmp_path, what, {"MODEL": str(tiny), "DEVICE": "cuda"})


async def test_more_shards_than_experts_are_refused(tiny: Path, tmp_path: Path) -> None:
    line = await refusal(tmp_path, "up", {"MODEL": str(tiny), "EXPERT_SHARDS": "7"})
    assert "7" in line
    assert "6 experts" in line


async def test_a_taken_port_is_named(tiny: Path, tmp_path: Path, nats_url: str, taken: int) -> None:
    settings = {"MODEL": str(tiny), "NATS_URL": nats_url}
    for what in ("gateway", "up"):
        assert f"PORT={taken}" in await refusal(tmp_path, what, {**settings, "PORT": str(taken)})
    for what in ("router", "expert", "monitor"):
        assert f"METRICS_PORT={taken}" in await refusal(tmp_path, what, {**settings, "METRICS_PORT": str(taken)})


async def test_an_address_of_another_machine_is_named(tiny: Path, tmp_path: Path, nats_url: str) -> None:
    settings = {"MODEL": str(tiny), "NATS_URL": nats_url, "HOST": "192.0.2.1"}
    assert "HOST=192.0.2.1" in await refusal(tmp_path, "gateway", settings)
    assert "192.0.2.1" in await refusal(tmp_path, "router", settings)


@pytest.mark.slow
async def test_without_nats_services_wait_longer_and_longer_and_then_say_so(tiny: Path, tmp_path: Path) -> None:
    """Slow: they wait a minute for a server that may still come."""
    url = f"nats://127.0.0.1:{free_port()}"

    async def check(service: str) -> None:
        running = await start_service(
            tmp_path, service, MODEL=str(tiny), NATS_URL=url, PORT="0", METRICS_PORT="0", ENV="staging"
        )
        try:
            assert await running.ended(120) == 2, running.said()
        finally:
            await running.kill()
        *before, last = running.log.read_text().splitlines()
        assert last.startswith(f"error: NATS_URL={url}: no NATS server"), running.said()
        assert not [line for line in before if line.startswith("error: ")]
        waits = [event["retry_in_seconds"] for event in map(json.loads, before) if event["event"] == "bus.waiting"]
        assert waits[0] < waits[-1]
        assert waits == sorted(waits)

    await asyncio.gather(*(check(service) for service in ("router", "expert", "gateway", "monitor")))


async def test_an_address_that_is_no_nats_server_is_refused_at_once(tiny: Path, tmp_path: Path) -> None:
    for url in ("127.0.0.1:4222", "http://127.0.0.1:4222", "nats://"):
        line = await refusal(tmp_path, "gateway", {"MODEL": str(tiny), "NATS_URL": url})
        assert f"NATS_URL='{url}'" in line
