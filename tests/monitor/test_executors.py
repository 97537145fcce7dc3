"""Who changes the number of instances: the choice, and what is said where it cannot be done."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.monitor.executors import choose_executor, targets
from services.monitor.executors.compose import ComposeExecutor, count_command, scale_command
from services.monitor.executors.kubernetes import KubernetesExecutor
from services.monitor.executors.local import LocalExecutor
from services.monitor.executors.nobody import NobodyExecutor
from shared.errors import MoeError, StartError
from shared.settings import MonitorSettings
from tests.running import Watcher


def settings(**changed: object) -> MonitorSettings:
    return MonitorSettings(**changed)  # type: ignore[arg-type]


async def test_the_setting_chooses_the_executor(watcher: Watcher) -> None:
    for kind, expected in (
        ("none", NobodyExecutor), ("compose", ComposeExecutor), ("kubernetes", KubernetesExecutor),
    ):  # fmt: skip
        assert isinstance(choose_executor(settings(scaling_executor=kind), watcher.bus), expected)
    local = settings(scaling_executor="local", scaling_supervisor="up-1")
    assert isinstance(choose_executor(local, watcher.bus), LocalExecutor)


async def test_local_without_a_supervisor_is_refused_by_name(watcher: Watcher) -> None:
    with pytest.raises(StartError, match="SCALING_SUPERVISOR"):
        choose_executor(settings(scaling_executor="local"), watcher.bus)


async def test_a_supervisor_that_is_not_there_is_a_typed_error(watcher: Watcher) -> None:
    with pytest.raises(MoeError, match="no service listens"):
        await LocalExecutor(watcher.bus, "up-nobody").scale("expert", 3, "load")


async def test_none_says_what_to_set() -> None:
    executor = NobodyExecutor()
    assert not executor.acts
    assert await executor.counts() == {}
    with pytest.raises(MoeError, match="SCALING_EXECUTOR"):
        await executor.scale("expert", 3, "load")


def test_targets_are_read_by_service() -> None:
    assert targets("expert=a,router=b") == {"expert": "a", "router": "b"}
    assert targets("router=b") == {"router": "b"}


@pytest.mark.parametrize("text", ["", "expert", "gateway=x", "expert=a b", "expert=-x", "expert=$(x)", "expert=a,"])
def test_targets_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="scaling_targets"):
        settings(scaling_targets=text)


def test_compose_touches_nothing_but_the_service() -> None:
    command = scale_command("expert", 3)
    assert command[:3] == ["docker", "compose", "up"]
    assert command[-3:] == ["--scale", "expert=3", "expert"]
    assert {"--no-recreate", "--no-deps", "--detach"} <= set(command)
    assert count_command("expert")[-1] == "expert"


async def test_without_docker_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    executor = ComposeExecutor({"expert": "expert"}, tmp_path)
    with pytest.raises(MoeError, match="docker cannot be run") as caught:
        await executor.scale("expert", 3, "load")
    assert caught.value.code == "scaling_failed"


async def test_what_docker_says_against_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "docker"
    program.write_text('#!/bin/sh\necho "no configuration file provided: not found" >&2\nexit 14\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(MoeError, match=r"code 14: no configuration file provided") as caught:
        await ComposeExecutor({"expert": "expert"}, tmp_path).counts()
    assert caught.value.code == "scaling_failed"


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"min_workers": 5, "max_workers": 4}, "MIN_WORKERS=5"),
        ({"min_routers": 5}, "MIN_ROUTERS=5"),
        ({"scale_down_at": 0.75}, "SCALE_DOWN_AT"),
        ({"scaling_executor": "cloud"}, "scaling_executor"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(changed: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        settings(**changed)
