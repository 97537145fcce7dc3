"""A checkpoint as one GGUF file, which llama.cpp reads: `python -m bench.gguf_checkpoint FOLDER FILE`.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Matrices keep the checkpoint's dtype; norms and
gates are float32, as llama.cpp computes them. There is no vocabulary in the file: only token ids can be asked for.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch

from shared.checkpoint import Checkpoint, ModelConfig
from shared.checkpoint.names import PREFIX, expert_names, moe_prefix
from shared.errors import CheckpointError
from shared.tensors import TensorReader

ARCHITECTURES = {"mixtral": "llama", "olmoe": "olmoe", "qwen3_moe": "qwen3moe"}
DTYPES = {
    "bfloat16": (torch.bfloat16, gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "float16": (torch.float16, gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "float32": (torch.float32, gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
}


@dataclass(frozen=True)
class Part:
    """One tensor of the file."""

    name: str
    sources: tuple[str, ...]
    """Of the checkpoint; those of a layer's experts become one."""
    shape: tuple[int, ...]
    """Of each source."""
    stacked: bool = False
    heads: int = 0
    """Above 0: so many heads, in each of which llama.cpp rotates neighbours in place of halves."""
    wide: bool = False
    """Kept in float32."""

    @property
    def written(self) -> tuple[int, ...]:
        """Its shape in the file."""
        return (len(self.sources), *self.shape) if self.stacked else self.shape


def _check(c: ModelConfig, where: Path) -> None:
    """What llama.cpp would compute in another way, or not at all, is refused."""
    olmoe = c.family == "olmoe"
    reasons = {
        f"{c.family} models": c.family not in ARCHITECTURES,
        f"hidden_act {c.hidden_act}": c.hidden_act not in ("silu", "swish"),
        f"rope type {c.rope.type}": c.rope.type != "default",
        "sliding windows": any(c.sliding_windows),
        "clip_qkv": c.clip_qkv is not None,
        "attention with biases": c.qkv_bias or c.output_bias,
        "layers without experts": len(c.moe_layers) != c.num_hidden_layers,
        f"norm_topk_prob {c.norm_topk_prob}": c.norm_topk_prob == olmoe,
        "grouped-query attention in OLMoE": olmoe and c.num_key_value_heads != c.num_attention_heads,
        "a head_dim of its own in OLMoE": olmoe and c.head_dim * c.num_attention_heads != c.hidden_size,
    }
    found = [reason for reason, here in reasons.items() if here]
    if found:
        raise CheckpointError(f"{where}: not written as GGUF, as it has {', '.join(found)}")


def parts(checkpoint: Checkpoint) -> list[Part]:
    """All tensors of the file, in its order.

    Raises:
        CheckpointError: llama.cpp has no such model, or the experts are stored as one tensor already.

    """
    c = checkpoint.config
    _check(c, checkpoint.path)
    hidden, inner = c.hidden_size, c.moe_intermediate_size
    q_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    embeddings = "model.embed_tokens.weight"
    head = embeddings if c.tie_word_embeddings else "lm_head.weight"
    found = [
        Part("token_embd.weight", (embeddings,), (c.vocab_size, hidden)),
        Part("output_norm.weight", ("model.norm.weight",), (hidden,), wide=True),
        Part("output.weight", (head,), (c.vocab_size, hidden)),
    ]
    permuted = c.family == "mixtral"
    for layer in range(c.num_hidden_layers):
        p, a = PREFIX.format(layer=layer), f"{PREFIX.format(layer=layer)}self_attn."
        experts = [expert_names(c, checkpoint.tensors, layer, expert) for expert in range(c.num_experts)]
        if experts[0].row is not None:
            raise CheckpointError(f"{checkpoint.path}: not written as GGUF, as its experts are stored as one tensor")
        gate = f"{moe_prefix(c, checkpoint.tensors, layer)}gate.weight"
        own = [
            Part("attn_norm", (f"{p}input_layernorm.weight",), (hidden,), wide=True),
            Part("attn_q", (f"{a}q_proj.weight",), (q_size, hidden), heads=c.num_attention_heads * permuted),
            Part("attn_k", (f"{a}k_proj.weight",), (kv_size, hidden), heads=c.num_key_value_heads * permuted),
            Part("attn_v", (f"{a}v_proj.weight",), (kv_size, hidden)),
            Part("attn_output", (f"{a}o_proj.weight",), (hidden, q_size)),
            Part("ffn_norm", (f"{p}post_attention_layernorm.weight",), (hidden,), wide=True),
            Part("ffn_gate_inp", (gate,), (c.num_experts, hidden), wide=True),
            Part("ffn_gate_exps", tuple(e.gate for e in experts), (inner, hidden), stacked=True),
            Part("ffn_up_exps", tuple(e.up for e in experts), (inner, hidden), stacked=True),
            Part("ffn_down_exps", tuple(e.down for e in experts), (hidden, inner), stacked=True),
        ]
        if c.qk_norm != "none":
            sizes = (q_size, kv_size) if c.qk_norm == "whole" else (c.head_dim, c.head_dim)
            own += [
                Part(f"attn_{name}_norm", (f"{a}{name}_norm.weight",), (size,), wide=True)
                for name, size in zip("qk", sizes, strict=True)
            ]
        found += [Part(f"blk.{layer}.{o.name}.weight", o.sources, o.shape, o.stacked, o.heads, o.wide) for o in own]
    return found


def _read(part: Part, reader: TensorReader, dtype: torch.dtype) -> torch.Tensor:
    tensors = [reader.read(name, part.shape, dtype) for name in part.sources]
    if part.stacked:
        return torch.stack(tensors)
    if not part.heads:
        return tensors[0]
    rows, columns = part.shape
    halves = tensors[0].reshape(part.heads, 2, rows // part.heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns).contiguous()


def _metadata(writer: gguf.GGUFWriter, c: ModelConfig) -> None:
    writer.add_file_type(DTYPES[c.dtype][2])
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope.theta)
    writer.add_expert_count(c.num_experts)
    writer.add_expert_used_count(c.num_experts_per_tok)
    writer.add_feed_forward_length(c.moe_intermediate_size)
    writer.add_expert_feed_forward_length(c.moe_intermediate_size)


def write(folder: Path, file: Path) -> Path:
    """Write the checkpoint in `folder` to `file`, unless that is there and newer; one tensor at a time is in memory.

    Raises:
        CheckpointError: llama.cpp has no such model, or the checkpoint is damaged.

    """
    if file.exists() and file.stat().st_mtime >= (folder / "config.json").stat().st_mtime:
        return file
    checkpoint = Checkpoint.open(folder)
    c = checkpoint.config
    found = parts(checkpoint)
    dtype, kind, _ = DTYPES[c.dtype]
    unfinished = file.with_name(f"{file.name}.part")
    writer = gguf.GGUFWriter(unfinished, ARCHITECTURES[c.family])
    _metadata(writer, c)
    for part in found:
        itemsize, stored = (4, gguf.GGMLQuantizationType.F32) if part.wide else (dtype.itemsize, kind)
        nbytes = math.prod(part.written) * itemsize
        writer.add_tensor_info(part.name, part.written, np.dtype(np.int8), nbytes, stored)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with TensorReader(checkpoint.tensors, torch.device("cpu"), lambda _: None) as reader:
            for part in found:
                tensor = _read(part, reader, torch.float32 if part.wide else dtype)
                writer.write_tensor_data(tensor.view(torch.int8).numpy())
        writer.close()
        unfinished.replace(file)  # so a file of this name is whole
    finally:
        writer.close()
        unfinished.unlink(missing_ok=True)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    try:
        print(write(arguments.folder, arguments.file))
    except CheckpointError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
