"""The model that is trained, a fresh one or a checkpoint's, and its export as a Hugging Face folder."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from shared.errors import StartError
from training.plan import Shape
from training.vocabulary import CHAT_TEMPLATE, SPECIAL

disable_progress_bar()  # the run has its own


def fresh_model(shape: Shape, seed: int) -> Any:
    """A randomly initialised OLMoE model in float32; tied embeddings, as small models can ill afford two."""
    torch.manual_seed(seed)
    config = OlmoeConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.expert_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        max_position_embeddings=shape.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return OlmoeForCausalLM(config)


def checkpoint_model(path: Path) -> Any:
    """The model in the checkpoint folder `path`, in float32.

    Raises:
        StartError: it cannot be loaded, or has no experts.

    """
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise StartError(f"--init {path}: {' '.join(str(error).split())[:300]}") from None
    if not hasattr(model.config, "num_experts_per_tok"):
        raise StartError(f"--init {path}: {model.config.model_type} has no experts")
    return model


def count_parameters(model: Any) -> tuple[int, int]:
    """(all parameters, those that one token uses)."""
    config = model.config  # Mixtral has a name of its own for the number of experts
    experts, top_k = getattr(config, "num_experts", None) or config.num_local_experts, config.num_experts_per_tok
    total = active = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        active += parameter.numel() * top_k // experts if ".experts." in name else parameter.numel()
    return total, active


def export(model: Any, tokenizer: Tokenizer, folder: Path, *, init: Path | None) -> Path:
    """Write a bfloat16 Hugging Face folder, replacing an older one only when the new one is whole.

    A fine-tuned checkpoint keeps its tokenizer files; a fresh model gets the trained tokenizer and a chat template.
    """
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    if init is None:
        model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    copy.deepcopy(model).to("cpu", torch.bfloat16).save_pretrained(partial)
    if init is None:
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0])
        fast.chat_template = CHAT_TEMPLATE
        fast.save_pretrained(partial)
    else:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            if (init / name).exists():
                shutil.copyfile(init / name, partial / name)
    for file in partial.iterdir():
        file.chmod(0o644)  # weights are written for their owner only; a container's user must read them
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder
