"""The compiled kernel: built once, refused with one line, and right for sizes that fill no tile."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shared.errors import StartError
from shared.experts import ACTIVATION
from shared.kernels import build
from shared.kernels.build import find_compiler, load_kernels
from shared.kernels.choice import compile_kernels
from shared.kernels.experts import ACTIVATIONS, CompiledExperts

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs g++ or clang++")


@pytest.fixture(autouse=True)
def _built_anew() -> Iterator[None]:
    load_kernels.cache_clear()
    yield
    load_kernels.cache_clear()


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize(("hidden", "inner"), [(1, 1), (24, 20), (64, 32), (100, 70), (192, 96)])
def test_sums_are_those_of_float64(hidden: int, inner: int, activation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(3, 2 * inner, hidden, generator=generator) * 2 / hidden**0.5
    down = torch.randn(3, hidden, inner, generator=generator) / inner**0.5
    experts = CompiledExperts(hidden=hidden, inner=inner, num_experts=4, activation=activation, dtype=torch.float32)
    for expert in range(3):
        experts.add(5, expert, gate_up[expert], down[expert])
    tokens = 15
    x = torch.randn(tokens, hidden, generator=generator) * 3
    x[0] *= 100  # the ends of the activation
    token_index = torch.arange(tokens).repeat(2)
    expert_index = torch.cat((torch.zeros(tokens), torch.arange(tokens) % 2 + 1)).int()
    weights = torch.rand(2 * tokens, generator=generator)
    want = torch.zeros(tokens, hidden, dtype=torch.float64)
    for token, expert, weight in zip(token_index, expert_index, weights, strict=True):
        gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
        want[token] += weight * (down[expert].double() @ (ACTIVATION[activation](gate) * up))
    got = experts.compute(5, x, token_index, expert_index, weights)
    scale = want.abs().amax(dim=1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(got.double() / scale, want / scale, rtol=1e-5, atol=1e-5)
    nothing = torch.empty(0, dtype=torch.int32)
    assert not experts.compute(5, x, nothing, nothing, torch.empty(0)).any()
    for token, expert in ((0, 3), (0, 4), (0, -1), (tokens, 0), (-1, 0)):
        pair = torch.tensor([token]), torch.tensor([expert]), torch.ones(1)
        with pytest.raises(ValueError, match="not there"):
            experts.compute(5, x, *pair)


def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_kernels()
    (built,) = (tmp_path / "openmoe").glob("*.so")
    made = built.stat().st_mtime_ns
    load_kernels.cache_clear()
    load_kernels()
    assert [*(tmp_path / "openmoe").glob("*.so*")] == [built]
    assert built.stat().st_mtime_ns == made
    assert stat.S_IMODE((tmp_path / "openmoe").stat().st_mode) == 0o700


def test_a_cache_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load_kernels().moe_forward


def test_kernels_made_beforehand_need_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    build.main()
    if not any((tmp_path / "prebuilt").iterdir()):
        pytest.skip("made for x86-64 only")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(build.PREBUILT_NEEDS[1:], True))
    assert build.find_prebuilt() is None, "a CPU that lacks one of the instruction sets"
    monkeypatch.undo()
    if not all(torch.cpu.get_capabilities().get(name) for name in build.PREBUILT_NEEDS):
        pytest.skip("this CPU has no AVX-512")
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    decision = compile_kernels(None, torch.float32, torch.device("cpu"), native=False)
    assert decision.yes, decision.reason
    assert load_kernels().moe_forward
    assert not (tmp_path / "cache").exists()


def test_without_a_compiler_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(StartError, match=r"needs a C\+\+ compiler: install g\+\+ or clang\+\+"):
        load_kernels()


def test_a_compiler_that_fails_is_named_with_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho first >&2\necho no such option >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(StartError, match=r"broken does not compile our kernels: no such option"):
        load_kernels()
