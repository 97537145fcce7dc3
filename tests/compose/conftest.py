"""The compose stack from a clean copy of the project, started once for all tests here, and taken down to the last volume."""

from __future__ import annotations

import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from tests.compose.project import REPOSITORY, Project, docker, succeeded
from tests.running import wait_until

PROMPT = {"prompt": "def read_file(path):", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


FIGURES = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash[FIGURES]:
        terminalreporter.line(line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.compose)
            item.add_marker(pytest.mark.timeout(600))


async def clean_copy(folder: Path) -> Path:
    """The project's tracked files as they are now: what a fresh clone holds once they are committed."""
    listed = await succeeded("git", "-C", str(REPOSITORY), "ls-files", "-z")
    for name in filter(None, listed.split("\0")):
        source, target = REPOSITORY / name, folder / name
        if source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    return folder


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engine() -> None:
    """A Docker engine with Compose v2; without one, these tests are skipped."""
    if not shutil.which("docker"):
        pytest.skip("docker is not installed")
    for command in (("info", "--format", "{{.ServerVersion}}"), ("compose", "version")):
        code, said = await docker(*command)
        if code:
            pytest.skip(f"`docker {' '.join(command)}` fails: {said.strip()[-200:]}")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def project(
    engine: None, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> AsyncIterator[Project]:
    """The stack of docker-compose.yml, up; its times are printed."""
    made = Project(await clean_copy(tmp_path_factory.mktemp("clone")))
    figures = request.config.stash[FIGURES]
    try:
        start = time.monotonic()
        await made.compose("build", seconds=1200)
        built = time.monotonic()
        await made.compose("up", "--build", "-d", "--wait")
        healthy = time.monotonic()
        async with made.http() as client:

            async def completed() -> bool:
                return (await client.post("/v1/completions", json=PROMPT)).status_code == 200

            await wait_until(completed, "the first completion")
        first = time.monotonic()
        figures.append(f"docker compose build: {built - start:.1f} s")
        figures.append(
            f"docker compose up to all healthy: {healthy - built:.1f} s, to the first completion: {first - built:.1f} s"
        )
        for service, seconds in (await made.start_seconds()).items():
            figures.append(f"{service}: ready {seconds:.1f} s after its container's start")
        figures.append(f"image: {await made.image_megabytes():.0f} MB")
        yield made
        await made.down()
        assert await made.leftovers() == [], "`docker compose down -v` left something"
    except BaseException:
        figures.append((await made.logs("--tail", "40"))[-20000:])
        raise
    finally:
        await made.down()


@pytest_asyncio.fixture
async def client(project: Project) -> AsyncIterator[httpx.AsyncClient]:
    async with project.http() as http:
        yield http
