"""What bench.generation compares with: which peers there are, and how their processes are spoken to.

A peer's process prints `ready`, then answers each line {"prompts": [[id]], "max_tokens": n} with a line
{"seconds": s, "tokens": [[id]]}; prompts are equally long, and each gets exactly n new tokens, chosen greedily.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

LOAD_SECONDS = 600
ANSWER_SECONDS = 600
STOP_SECONDS = 30


@dataclass(frozen=True)
class PeerKind:
    """A system that can be measured beside the project."""

    name: str
    packages: tuple[str, ...]
    """Must be importable."""
    install: str
    """What installs them."""
    module: str
    """Its process."""

    @property
    def missing(self) -> tuple[str, ...]:
        """Those of its packages that are not installed."""
        return tuple(name for name in self.packages if importlib.util.find_spec(name) is None)

    @property
    def advice(self) -> str:
        return f"{self.name}: {' and '.join(self.missing)} not installed (pip install {self.install})"


TRANSFORMERS = PeerKind("transformers", ("transformers",), "'openmoe[train]'", "bench.transformers_peer")
LLAMA_CPP = PeerKind("llama.cpp", ("llama_cpp", "gguf"), "'openmoe[llama-cpp]'", "bench.llama_cpp_peer")
KINDS = {kind.name: kind for kind in (TRANSFORMERS, LLAMA_CPP)}


def choose(
    wanted: str | None, kinds: Mapping[str, PeerKind] = MappingProxyType(KINDS)
) -> tuple[list[PeerKind], list[str]]:
    """The peers to measure, and a line for each one that is left out.

    Args:
        wanted: names with commas between; None: all that are installed.
        kinds: that there are, by name.

    Raises:
        ValueError: an unknown name, one that is not installed, or none at all.

    """
    if wanted is None:
        found = [kind for kind in kinds.values() if not kind.missing]
        if not found:
            raise ValueError(f"no peer is installed; {'; '.join(kind.advice for kind in kinds.values())}")
        return found, [f"{kind.advice}, left out" for kind in kinds.values() if kind.missing]
    names = list(dict.fromkeys(name.strip() for name in wanted.split(",")))
    unknown = [name for name in names if name not in kinds]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not a peer that can be measured here (these can: {', '.join(kinds)})")
    absent = [kinds[name].advice for name in names if kinds[name].missing]
    if absent:
        raise ValueError("; ".join(absent))
    return [kinds[name] for name in names], []


class Peer:
    """A peer's process; idle between requests."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process

    async def _line(self, seconds: float) -> str:
        assert self._process.stdout is not None  # noqa: S101 - asked for above
        async with asyncio.timeout(seconds):
            line = await self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}'s process ended; it says why above")
        return line.decode().strip()

    async def loaded(self) -> None:
        """Wait until the checkpoint is loaded.

        Raises:
            SystemExit: the peer cannot.

        """
        line = await self._line(LOAD_SECONDS)
        if line != "ready":
            raise SystemExit(f"{self.name} says {line!r} in place of ready")

    async def run(self, prompts: list[list[int]], max_tokens: int) -> float:
        """Seconds that these prompts took, together.

        Raises:
            SystemExit: the peer failed, or made another number of tokens.

        """
        assert self._process.stdin is not None  # noqa: S101 - asked for above
        self._process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}).encode() + b"\n")
        answer = json.loads(await self._line(ANSWER_SECONDS))
        made = [len(tokens) for tokens in answer["tokens"]]
        if made != [max_tokens] * len(prompts):
            raise SystemExit(f"{self.name} made {made} tokens, not {max_tokens} for each of {len(prompts)} prompts")
        return float(answer["seconds"])

    async def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


@contextlib.asynccontextmanager
async def peer(kind: PeerKind, arguments: Iterable[str]) -> AsyncIterator[Peer]:
    """A peer's process, which has loaded the checkpoint that its arguments name; it is stopped after."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", kind.module, *arguments), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    started = Peer(kind.name, process)
    try:
        await started.loaded()
        yield started
    finally:
        await started.stop()


def serve(generate: Callable[[list[list[int]], int], list[list[int]]]) -> None:
    """A peer's process: answer standard input's requests, until it ends."""
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        tokens = generate(request["prompts"], request["max_tokens"])
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)
