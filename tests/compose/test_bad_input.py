"""What goes wrong with containers: one clear line from the service concerned, and an exit code or a wait, as fits."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compose.project import Project, docker, succeeded
from tests.running import wait_until


@pytest.mark.parametrize("service", ["gateway", "router", "expert"])
async def test_a_model_folder_that_is_not_there(project: Project, service: str) -> None:
    code, said = await project.attempt("run", "--rm", "--no-deps", "-T", "-e", "MODEL=/models/absent", service)
    assert code == 2
    assert [line for line in said.splitlines() if line.startswith("error: ")] == said.splitlines()[-1:]
    assert "/models/absent" in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("service", "setting", "named"),
    [
        ("router", "BATCH_SIZE=zero", "BATCH_SIZE='zero'"),
        ("expert", "SHARDS=9", "SHARDS=9"),
        ("gateway", "REDIS_URL=http://redis", "REDIS_URL="),
        ("gateway", "ENV=production", "API_AUTH_TOKEN"),
        ("monitor", "STALE_SECONDS=-1", "STALE_SECONDS='-1'"),
    ],
)
async def test_a_wrong_environment_value(project: Project, service: str, setting: str, named: str) -> None:
    code, said = await project.attempt("run", "--rm", "--no-deps", "-T", "-e", setting, service)
    assert code == 2
    last = said.splitlines()[-1]
    assert last.startswith("error: ")
    assert named in last


async def test_nats_that_is_not_there_yet_is_waited_for_with_backoff(project: Project) -> None:
    name = f"{project.name}-waiting"
    line = ("run", "--detach", "--name", name, "--no-deps", "-e", "NATS_URL=nats://user:secret@nowhere:4222", "monitor")
    await project.compose(*line)
    try:

        async def waits() -> list[float]:
            said = (await succeeded("docker", "logs", name)).splitlines()
            events = [json.loads(each) for each in said if each.startswith("{")]
            assert not any("secret" in each for each in said)
            return [event["retry_in_seconds"] for event in events if event["event"] == "bus.waiting"]

        async def thrice() -> bool:
            return len(await waits()) >= 3

        await wait_until(thrice, "three attempts", 30)
        delays = await waits()
        assert delays == sorted(delays)
        assert delays[0] < delays[2]
        assert await succeeded("docker", "inspect", "--format", "{{.State.Running}}", name) == "true\n"
    finally:
        await docker("rm", "--force", name)


async def test_a_model_folder_that_cannot_be_mounted(project: Project) -> None:
    absent = project.folder / "no-such-checkpoint"
    code, said = await project.attempt("run", "--rm", "--no-deps", "-T", "router", MODEL=str(absent))
    assert code != 0
    assert str(absent) in said
    assert not absent.exists(), "Docker made an empty folder in the checkpoint's place"


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.create_server(("0.0.0.0", 0)) as listener:
        yield int(listener.getsockname()[1])


async def test_a_port_that_is_taken(project: Project, taken: int) -> None:
    other = Project(project.folder)
    try:
        code, said = await other.attempt("up", "-d", "--no-deps", "nginx", PORT=str(taken))
        assert code != 0
        assert f":{taken}" in said
        assert "address already in use" in said or "port is already allocated" in said
    finally:
        await other.down()
    assert await other.leftovers() == []


async def test_a_volume_that_cannot_be_written(project: Project, tmp_path: Path) -> None:
    """NATS keeps its streams on a volume; without it, it says why each time that it ends."""
    image = next(i for i in (await project.compose("config", "--images")).split() if i.startswith("nats:"))
    config = project.folder / "deploy" / "nats" / "nats-server.conf"
    mounts = ("--volume", f"{config}:/etc/nats/nats-server.conf:ro", "--volume", f"{tmp_path}:/data:ro")
    code, said = await docker("run", "--rm", *mounts, image)
    assert code != 0
    assert "/data" in said
    assert "read-only file system" in said


async def test_redis_is_told_to_go_on_when_it_cannot_save(project: Project) -> None:
    """Redis only keeps answers. This reads its setting; a disk that really refuses is not tried."""
    redis = (await project.containers("redis"))[0]
    settings = await succeeded("docker", "exec", redis, "redis-cli", "config", "get", "stop-writes-on-bgsave-error")
    assert settings.split() == ["stop-writes-on-bgsave-error", "no"]


async def test_a_service_that_refuses_is_not_restarted_for_ever_in_silence(project: Project) -> None:
    """A wrong value under `up`: Docker restarts the container with backoff, and every round leaves its line."""
    override = project.folder / "wrong.yml"
    override.write_text("services: {monitor: {environment: {STALE_SECONDS: never}}}\n")
    other = Project(project.folder)
    files = ("--file", "docker-compose.yml", "--file", "wrong.yml")
    try:
        code, said = await other.attempt(*files, "up", "-d", "nats", "monitor")
        assert code == 0, said

        async def lines() -> int:
            return (await other.logs("monitor")).count("error: STALE_SECONDS='never'")

        async def twice() -> bool:
            return await lines() >= 2

        await wait_until(twice, "two rounds", 60)
        container = (await other.attempt("ps", "--all", "--quiet", "monitor"))[1].split()[0]
        restarts = int(await succeeded("docker", "inspect", "--format", "{{.RestartCount}}", container))
        assert await lines() >= restarts
    finally:
        await other.down()
        override.unlink()
    assert await other.leftovers() == []
