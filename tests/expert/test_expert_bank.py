"""The experts' maths against a plain loop, whatever the grouping; loading from both layouts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from shared.checkpoint import Checkpoint
from shared.errors import CheckpointError
from shared.experts import Activation, ExpertBank, ExpertOptions, shard_experts
from shared.kernels.build import find_compiler
from tests.oracle import make_checkpoint

CPU = torch.device("cpu")
HIDDEN = 32
EXPERTS = 6


def opened(
    path: Path,
    variant: str,
    dtype: torch.dtype = torch.float32,
    options: ExpertOptions | None = None,
    **more: int,
) -> ExpertBank:
    checkpoint = Checkpoint.open(make_checkpoint(path / variant, variant, dtype=dtype, **more))
    bank = ExpertBank(checkpoint, dtype=dtype, device=CPU, options=options)
    bank.load(range(EXPERTS))
    return bank


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> ExpertBank:
    return opened(tmp_path_factory.mktemp("bank"), "mixtral")


def plain(
    path: Path,
    layer: int,
    hidden: torch.Tensor,
    pairs: list[tuple[int, int, float]],
    act: Activation = F.silu,
    sparsity: float = 0,
) -> torch.Tensor:
    """[T, H]: one pair after another, from the checkpoint's files, in float64; without the least important channels."""
    tensors = all_tensors(path)
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    for token, expert, weight in pairs:
        gate_up = tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"][expert]
        down = tensors[f"model.layers.{layer}.mlp.experts.down_proj"][expert]
        norms = [w.pow(2).sum(dim=1) for w in (*gate_up.chunk(2), down.T)]
        least = (norms[0] * norms[1] * norms[2]).argsort()[: int(sparsity * down.shape[1])]
        gate, up = (hidden[token].double() @ gate_up.T).chunk(2)
        h = act(gate) * up
        h[least] = 0
        out[token] += weight * (h @ down.T)
    return out


@cache
def all_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors by name, in float64; the experts of a layer stacked, however they are stored."""
    found = {name: t.double() for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}
    stacked: dict[str, torch.Tensor] = {}
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        for home, names in (
            ("block_sparse_moe.experts", ("w1", "w3", "w2")),
            ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
        ):
            if f"{prefix}{home}.0.{names[0]}.weight" in found:
                gate, up, down = (
                    torch.stack([found[f"{prefix}{home}.{e}.{name}.weight"] for e in range(EXPERTS)]) for name in names
                )
                stacked[f"{prefix}mlp.experts.gate_up_proj"] = torch.cat((gate, up), dim=1)
                stacked[f"{prefix}mlp.experts.down_proj"] = down
    return found | stacked


def compute(bank: ExpertBank, layer: int, hidden: torch.Tensor, pairs: list[tuple[int, int, float]]) -> torch.Tensor:
    tokens, experts, weights = zip(*pairs, strict=True) if pairs else ((), (), ())
    return bank.compute(
        layer,
        hidden,
        torch.tensor(tokens, dtype=torch.int32),
        torch.tensor(experts, dtype=torch.int32),
        torch.tensor(weights, dtype=torch.float32),
    )


needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="needs g++ or clang++")
OPTIONS = [
    ExpertOptions(),
    ExpertOptions(widen=True),
    pytest.param(ExpertOptions(compiled=True), marks=needs_compiler),
    ExpertOptions(quantization="8bit"),
    ExpertOptions(quantization="8bit", sparsity=0.25),
    pytest.param(ExpertOptions(quantization="8bit", compiled=True), marks=needs_compiler),
]
PAIRS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, EXPERTS - 1), st.floats(-2, 2, width=32)), max_size=24)


@settings(max_examples=80, deadline=None)
@given(pairs=PAIRS, layer=st.integers(0, 2), seed=st.integers(0, 99))
def test_any_pairs_give_the_sum_that_a_plain_loop_gives(
    bank: ExpertBank, pairs: list[tuple[int, int, float]], layer: int, seed: int
) -> None:
    hidden = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(seed))
    got = compute(bank, layer, hidden, pairs)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), plain(bank._checkpoint.path, layer, hidden, pairs), atol=1e-4)


@pytest.fixture(params=[1, 2], ids="{}-threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["mixtral", "mixtral-gelu", "mixtral-gelu-tanh"])
def test_a_token_is_the_same_among_any_others_to_the_bit(
    tmp_path: Path, variant: str, dtype: torch.dtype, options: ExpertOptions
) -> None:
    # So wide that torch splits the activations of all rows among threads, inside a row.
    bank = opened(tmp_path, variant, dtype, options, intermediate_size=104)
    generator = torch.Generator().manual_seed(2)
    tokens = 700
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    chosen = torch.rand(tokens, EXPERTS, generator=generator).topk(3).indices  # [T, 3]
    weights = torch.rand(tokens, 3, generator=generator)

    def together(first: int, last: int) -> torch.Tensor:
        tokens = torch.arange(last - first).repeat_interleave(3).int()
        parts = chosen[first:last].flatten().int(), weights[first:last].flatten()
        return bank.compute(2, hidden[first:last], tokens, *parts)

    alone = torch.cat([together(i, i + 1) for i in range(tokens)])
    for count in (2, 3, 5, 7, 16, 33, 64, 300, 511, tokens):
        assert torch.equal(together(0, count), alone[:count]), f"{count} tokens"
    assert torch.equal(together(13, 60), alone[13:60])


@settings(max_examples=50, deadline=None)
@given(pairs=PAIRS, cuts=st.lists(st.integers(0, 24), max_size=4))
def test_how_the_pairs_are_grouped_and_ordered_makes_no_difference(
    bank: ExpertBank, pairs: list[tuple[int, int, float]], cuts: list[int]
) -> None:
    hidden = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(0))
    whole = compute(bank, 1, hidden, pairs)
    edges = [0, *sorted(cuts), len(pairs)]
    parts = torch.zeros_like(whole)
    for first, last in itertools.pairwise(edges):
        parts += compute(bank, 1, hidden, list(reversed(pairs[first:last])))
    assert torch.allclose(parts, whole, atol=1e-4)


def test_one_row_is_computed_like_many(bank: ExpertBank) -> None:
    hidden = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(3))
    pairs = [(0, 2, 0.75), (0, 5, 0.25)]
    want = plain(bank._checkpoint.path, 0, hidden, pairs)
    assert torch.allclose(compute(bank, 0, hidden, pairs).double(), want, atol=1e-5)
    assert torch.allclose(
        compute(bank, 0, hidden, pairs[:1]) + compute(bank, 0, hidden, pairs[1:]), want.float(), atol=1e-5
    )


def test_no_pairs_give_zeros(bank: ExpertBank) -> None:
    assert torch.equal(compute(bank, 0, torch.ones(3, HIDDEN), []), torch.zeros(3, HIDDEN))
    assert compute(bank, 0, torch.ones(0, HIDDEN), []).shape == (0, HIDDEN)


def test_a_row_that_no_pair_names_is_zero(bank: ExpertBank) -> None:
    got = compute(bank, 0, torch.ones(3, HIDDEN), [(1, 0, 1.0)])
    assert not got[[0, 2]].any()
    assert got[1].any()


def test_sums_are_kept_in_float32_whatever_the_weights_are(tmp_path: Path) -> None:
    half = opened(tmp_path, "mixtral", torch.bfloat16)
    hidden = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    one = compute(half, 0, hidden, [(0, 3, 1.0)])
    many = compute(half, 0, hidden, [(0, 3, 1 / 64)] * 64)
    assert one.dtype == many.dtype == torch.bfloat16
    # Added up in bfloat16, 64 small parts would be off by far more than the last bit.
    assert torch.allclose(one.float(), many.float(), rtol=2**-7, atol=0)


def test_widened_experts_are_bfloat16_weights_computed_in_float32(tmp_path: Path) -> None:
    wide = opened(tmp_path, "olmoe", torch.bfloat16, ExpertOptions(widen=True))
    hidden = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(4)).bfloat16()
    pairs = [(t, e, 0.5) for t in range(5) for e in (0, 3, 4)]
    want = plain(wide._checkpoint.path, 1, hidden, pairs)
    # One rounding, of the result.
    torch.testing.assert_close(compute(wide, 1, hidden, pairs).double(), want, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["mixtral", "olmoe", "qwen2", "qwen3", "mixtral-gelu"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_gives_the_sum_within_its_bound(
    tmp_path: Path, options: ExpertOptions, variant: str, dtype: torch.dtype
) -> None:
    """Relative to the norm of a token's sum: rounding alone, or int8 weights; pruned channels count as zero."""
    bound = 0.03 if options.quantization == "8bit" else 1e-5
    if dtype is torch.bfloat16:
        bound += 0.02
    bank = opened(tmp_path, variant, dtype, options)
    hidden = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(4)).to(dtype)
    pairs = [(t, e, 0.5) for t in range(9) for e in (0, 3, 4)]
    act = F.gelu if variant == "mixtral-gelu" else F.silu
    want = plain(bank._checkpoint.path, 1, hidden, pairs, act, options.sparsity)
    off = (compute(bank, 1, hidden, pairs).double() - want).norm(dim=1) / want.norm(dim=1)
    assert off.max() <= bound


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_bytes_reported_while_loading_are_those_in_memory(tmp_path: Path, options: ExpertOptions) -> None:
    checkpoint = Checkpoint.open(
        make_checkpoint(tmp_path / "m", "olmoe", dtype=torch.bfloat16, intermediate_size=128, hidden_size=128)
    )
    bank = ExpertBank(checkpoint, dtype=torch.bfloat16, device=CPU, options=options)
    counted: list[int] = []
    bank.load([0, 2], counted.append)
    assert sum(counted) == bank.bytes_of([0, 2])
    itemsize = 4 if options.widen else 1 if options.quantization == "8bit" else 2
    numbers = 2 * 3 * 3 * 128 * int(128 * (1 - options.sparsity))
    assert numbers * itemsize <= sum(counted) <= 1.05 * numbers * itemsize


@pytest.mark.parametrize("variant", ["mixtral", "olmoe", "qwen2", "qwen3", "mixtral-gelu"])
def test_only_the_experts_that_were_asked_for_are_loaded(tmp_path: Path, variant: str) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "m", variant))
    bank = ExpertBank(checkpoint, dtype=torch.float32, device=CPU)
    loaded: list[int] = []
    bank.load([1, 4], loaded.append)
    assert sum(loaded) == bank.bytes_of([1, 4])
    assert {e for layer in checkpoint.config.moe_layers for e in range(EXPERTS) if bank.has(layer, e)} == {1, 4}
    bank.load([1, 4], loaded.append)
    assert sum(loaded) == bank.bytes_of([1, 4]), "what is there is not read again"


def test_stacked_and_single_layouts_hold_the_same_experts(tmp_path: Path) -> None:
    single = make_checkpoint(tmp_path / "single", "qwen3")
    tensors = {name: t for file in sorted(single.glob("*.safetensors")) for name, t in load_file(file).items()}
    other = tmp_path / "other"
    other.mkdir()
    for file in ("config.json", "tokenizer.json"):
        (other / file).write_bytes((single / file).read_bytes())
    rewritten = {name: t.contiguous() for name, t in tensors.items() if ".mlp.experts." not in name}
    stacks = all_tensors(single)
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp.experts."
        if f"{prefix}gate_up_proj" in tensors:
            gate, up = tensors[f"{prefix}gate_up_proj"].chunk(2, dim=1)
            for e in range(EXPERTS):
                rewritten[f"{prefix}{e}.gate_proj.weight"] = gate[e].contiguous()
                rewritten[f"{prefix}{e}.up_proj.weight"] = up[e].contiguous()
                rewritten[f"{prefix}{e}.down_proj.weight"] = tensors[f"{prefix}down_proj"][e].contiguous()
        else:
            for name in ("gate_up_proj", "down_proj"):
                rewritten[f"{prefix}{name}"] = stacks[f"{prefix}{name}"].float().contiguous()
    save_file(rewritten, other / "model.safetensors", metadata={"format": "pt"})
    hidden = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(5))
    sums = []
    for path in (single, other):
        bank = ExpertBank(Checkpoint.open(path), dtype=torch.float32, device=CPU)
        bank.load(range(EXPERTS))
        sums.append(compute(bank, 2, hidden, [(0, 0, 1.0), (1, 3, 0.5), (2, 5, 0.25)]))
    assert torch.equal(*sums)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "m", "mixtral"))
    name = next(name for name in checkpoint.tensors.entries if "layers.1." in name and "experts" in name)
    del checkpoint.tensors.entries[name]
    with pytest.raises(CheckpointError, match=r"layers\.1"):
        ExpertBank(checkpoint, dtype=torch.float32, device=CPU).load(range(EXPERTS))


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 64))
def test_every_expert_is_in_exactly_one_shard(experts: int, shards: int) -> None:
    owners = [shard for shard in range(shards) for _ in shard_experts(experts, shards, shard)]
    all_experts = sorted(e for shard in range(shards) for e in shard_experts(experts, shards, shard))
    assert all_experts == list(range(experts))
    sizes = [owners.count(shard) for shard in range(shards)]
    assert max(sizes) - min(sizes) <= 1
    assert all(e % shards == shard for shard in range(shards) for e in shard_experts(experts, shards, shard))


COMPILED = pytest.param(True, marks=pytest.mark.skipif(find_compiler() is None, reason="no compiler"))


@pytest.mark.parametrize("compiled", [False, COMPILED])
def test_one_layers_expert_is_loaded_and_dropped_by_itself(tmp_path: Path, compiled: bool) -> None:
    options = ExpertOptions(compiled=compiled)
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "m", "mixtral"))
    whole, bank = (ExpertBank(checkpoint, dtype=torch.float32, device=CPU, options=options) for _ in range(2))
    whole.load(range(EXPERTS))
    bank.load([0, 2, 4])
    counted: list[int] = []
    bank.load([1, 3], counted.append, [2])
    assert sum(counted) == bank.bytes_of([1, 3], num_layers=1)
    assert [bank.has(layer, 1) for layer in range(3)] == [False, False, True]
    call = (torch.randn(3, HIDDEN), torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3]), torch.ones(3))
    assert torch.equal(bank.compute(2, *call), whole.compute(2, *call))
    bank.drop([(2, 1), (2, 5)])
    assert not bank.has(2, 1)
    with pytest.raises((KeyError, ValueError)):
        bank.compute(2, *call)
    rest = (call[0], call[1], torch.tensor([3, 2, 3]), call[3])
    assert torch.equal(bank.compute(2, *rest), whole.compute(2, *rest))
    bank.load([1], counted.append, [2])
    assert torch.equal(bank.compute(2, *call), whole.compute(2, *call))
