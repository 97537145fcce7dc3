"""What bench.gguf_checkpoint writes, read by gguf's own reader."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.checkpoint import Checkpoint
from shared.errors import CheckpointError
from tests.oracle import VARIANTS, Oracle, make_checkpoint

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'openmoe[llama-cpp]'")

from bench.gguf_checkpoint import parts, write  # noqa: E402 - it imports gguf

WRITTEN = {
    "mixtral": "llama",
    "mixtral-tied": "llama",
    "mixtral-head-dim": "llama",
    "olmoe": "olmoe",
    "qwen3": "qwen3moe",
}
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


@pytest.mark.parametrize("variant", WRITTEN)
def test_the_file_says_what_config_json_says(variant: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / variant, variant)
    config, architecture = Checkpoint.open(path).config, WRITTEN[variant]
    fields, tensors = read(write(path, tmp_path / "model.gguf"))
    assert fields["general.architecture"] == architecture
    expected = {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "vocab_size": config.vocab_size,
    }
    assert {name: fields[f"{architecture}.{name}"] for name in expected} == expected
    assert fields[f"{architecture}.rope.freq_base"] == pytest.approx(config.rope.theta)
    assert fields[f"{architecture}.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)
    assert len(tensors) == len(parts(Checkpoint.open(path)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_those_of_the_checkpoint(dtype: torch.dtype, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "olmoe", "olmoe", dtype=dtype)
    state = Oracle(path, dtype).model.state_dict()
    _, tensors = read(write(path, tmp_path / "model.gguf"))

    def found(name: str) -> torch.Tensor:
        tensor = tensors[name]
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        return values.reshape(*reversed(tensor.shape.tolist()))

    gate_up, down = state["model.layers.1.mlp.experts.gate_up_proj"], state["model.layers.1.mlp.experts.down_proj"]
    gate, up = gate_up.chunk(2, dim=1)
    for name, value in {"ffn_gate_exps": gate, "ffn_up_exps": up, "ffn_down_exps": down}.items():
        assert torch.equal(found(f"blk.1.{name}.weight"), value.float())
    for name, source in {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}.items():
        assert torch.equal(found(f"{name}.weight"), state[f"{source}.weight"].float())
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.2.ffn_down_exps.weight"] == DTYPES[dtype]
    assert kinds["blk.0.attn_norm.weight"] == kinds["blk.2.ffn_gate_inp.weight"] == "F32"


def test_a_file_is_written_again_when_the_checkpoint_is_newer(tmp_path: Path) -> None:
    path, file = make_checkpoint(tmp_path / "olmoe", "olmoe"), tmp_path / "model.gguf"
    made = (path / "config.json").stat().st_mtime
    file.write_bytes(b"old")
    os.utime(file, (made - 1, made - 1))
    assert len(write(path, file).read_bytes()) > 1000
    file.write_bytes(b"new")
    assert write(path, file).read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.gguf", "olmoe"]


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - set(WRITTEN)))
def test_what_llama_cpp_would_compute_otherwise_is_refused(variant: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / variant, variant)
    with pytest.raises(CheckpointError, match=r"not written as GGUF, as it has \w"):
        write(path, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()
