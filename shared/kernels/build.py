"""Compiles the kernels for the CPU at hand, once, and keeps the result in the user's cache.

`python -m shared.kernels.build` compiles them for any x86-64 CPU with AVX-512 instead and puts them beside the source,
where they are found without a compiler: for a container image.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from shared.errors import StartError

FOLDER = Path(__file__).parent
SOURCES = tuple(FOLDER / name for name in ("experts.cpp", "dense.cpp"))
HEADERS = tuple(FOLDER / name for name in ("vectors.h", "tiles.h", "pool.h"))
COMPILERS = ("g++", "clang++")
FLAGS = ("-O3", "-std=c++20", "-shared", "-fPIC", "-pthread")
NATIVE = "-march=native"
PREBUILT = FOLDER / "prebuilt"
PREBUILT_NEEDS = ("avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl")
"""Of the CPU. Source: x86-64 psABI, micro-architecture level 4."""
COMPILE_SECONDS = 120


def find_compiler() -> str | None:
    """The C++ compiler to use: $CXX, g++ or clang++, whichever is there."""
    return next((found for name in (os.environ.get("CXX"), *COMPILERS) if name and (found := shutil.which(name))), None)


def _prebuilt() -> Path:
    """Where the kernels of this source are, if they came with the program."""
    return PREBUILT / f"x86-64-v4-{hashlib.sha256(repr(_files()).encode()).hexdigest()[:16]}.so"


def _files() -> list[bytes]:
    return [file.read_bytes() for file in (*SOURCES, *HEADERS)]


def find_prebuilt() -> Path | None:
    """The kernels that came with the program, where they are and this CPU runs them."""
    capabilities = torch.cpu.get_capabilities()
    return found if all(capabilities.get(name) for name in PREBUILT_NEEDS) and (found := _prebuilt()).exists() else None


@functools.cache
def load_kernels() -> ctypes.CDLL:
    """The compiled kernels: those that came with the program, else from the cache where they were compiled before.

    Raises:
        StartError: no compiler, or it does not compile this; what came with the program does not load.

    """
    prebuilt = find_prebuilt()
    if prebuilt is not None:
        try:
            return ctypes.CDLL(str(prebuilt))
        except OSError as error:
            raise StartError(f"our kernels do not load: {error}; ENABLE_COMPILATION=false does without") from None
    compiler = find_compiler()
    if compiler is None:
        raise StartError(
            f"ENABLE_COMPILATION=true needs a C++ compiler: install {' or '.join(COMPILERS)}, or name one in CXX; "
            "ENABLE_COMPILATION=false does without"
        )
    name = f"kernels-{_fingerprint(compiler)}.so"
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openmoe"
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        if cache.stat().st_uid != os.getuid():  # what others may write there must not run here
            raise PermissionError
        with (cache / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # workers start together: one compiles, the others wait for it
            if not (cache / name).exists():
                _compile(compiler, cache / f"{name}.new")
                (cache / f"{name}.new").replace(cache / name)
        return ctypes.CDLL(str(cache / name))
    with tempfile.TemporaryDirectory(prefix="openmoe-") as folder:  # no cache that can be written
        _compile(compiler, Path(folder) / name)
        return ctypes.CDLL(str(Path(folder) / name))


def _fingerprint(compiler: str) -> str:
    """Of all that the result depends on."""
    cpu = sorted(torch.cpu.get_capabilities().items())
    status = Path(compiler).resolve().stat()
    parts = (_files(), FLAGS, NATIVE, compiler, status.st_size, status.st_mtime_ns, platform.machine(), cpu)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, target: Path, march: str = NATIVE) -> None:
    command = [compiler, *FLAGS, march, "-o", str(target), *map(str, SOURCES)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StartError(f"ENABLE_COMPILATION: {error}") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise StartError(f"ENABLE_COMPILATION: {compiler} does not compile our kernels: {last}")


def main() -> None:
    compiler = find_compiler()
    if compiler is None:
        raise SystemExit(f"no C++ compiler: install {' or '.join(COMPILERS)}")
    PREBUILT.mkdir(exist_ok=True)
    if platform.machine() == "x86_64":
        _compile(compiler, _prebuilt(), "-march=x86-64-v4")
    else:  # nothing to do: our kernels are slow without AVX-512
        sys.stderr.write(f"our kernels are not for {platform.machine()}\n")


if __name__ == "__main__":
    main()
