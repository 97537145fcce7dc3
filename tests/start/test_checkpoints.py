"""A checkpoint that cannot be served is refused in one line that names the file, the tensor or the switch."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.oracle import make_checkpoint
from tests.start.starting import refusal

INDEX = "model.safetensors.index.json"
DENSE = "model.layers.0.self_attn.q_proj.weight"
EXPERT = "model.layers.1.mlp.experts.gate_up_proj"
ALL = ("router", "expert", "gateway", "up")
LIGHT = ("gateway", "up")
"""Those that start fast, where all read the checkpoint with the same code."""


def _file_of(path: Path, tensor: str) -> Path:
    weight_map: dict[str, str] = json.loads((path / INDEX).read_text())["weight_map"]
    if tensor not in weight_map:  # the layout with a tensor for each expert
        tensor = next(name for name in weight_map if name.startswith("model.layers.1.") and ".experts." in name)
    return path / weight_map[tensor]


def _rewrite(path: Path, tensor: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put `change` of a tensor, or of all experts' tensors of its layer, into its file."""
    file = _file_of(path, tensor)
    tensors = load_file(file)
    for name in tensors:
        if name == tensor or (".experts." in tensor and ".experts." in name):
            tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file)


def _configure(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _drop(path: Path, tensor: str) -> None:
    file = _file_of(path, tensor)
    tensors = load_file(file)
    del tensors[tensor]
    save_file(tensors, file)
    index = json.loads((path / INDEX).read_text())
    del index["weight_map"][tensor]
    (path / INDEX).write_text(json.dumps(index))


def _promise(path: Path, tensor: str) -> None:
    index = json.loads((path / INDEX).read_text())
    index["weight_map"][tensor] = next(iter(index["weight_map"].values()))
    (path / INDEX).write_text(json.dumps(index))


def _truncate(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def _empty(path: Path) -> None:
    for file in path.glob("model*"):
        file.unlink()


@dataclass(frozen=True)
class Fault:
    """What is done to a good checkpoint, who must notice, and what the line must name."""

    damage: Callable[[Path], object]
    names: tuple[str, ...]
    noticed_by: tuple[str, ...] = ALL


FAULTS = {
    "missing shard file": Fault(
        lambda path: _file_of(path, DENSE).unlink(), ("model-0", ".safetensors", "missing", INDEX)
    ),
    "truncated file": Fault(
        lambda path: _truncate(_file_of(path, DENSE), _file_of(path, DENSE).stat().st_size - 100),
        ("model-0", ".safetensors", "truncated"),
    ),
    "file cut inside its header": Fault(
        lambda path: _truncate(_file_of(path, DENSE), 20), ("model-0", ".safetensors", "truncated"), LIGHT
    ),
    "empty file": Fault(
        lambda path: _truncate(_file_of(path, DENSE), 0), ("model-0", ".safetensors", "truncated"), LIGHT
    ),
    "file that is something else": Fault(
        lambda path: _file_of(path, DENSE).write_bytes(b"\x10" + b"\0" * 7 + b"<html></html>" * 40),
        ("model-0", ".safetensors", "not a safetensors file"),
        LIGHT,
    ),
    "damaged index": Fault(lambda path: _truncate(path / INDEX, 100), (INDEX, "damaged")),
    "index of another shape": Fault(
        lambda path: (path / INDEX).write_text('{"weight_map": [1]}'), (INDEX, "damaged"), LIGHT
    ),
    "index that promises too much": Fault(
        lambda path: _promise(path, "model.ghost.weight"), ("model.ghost", INDEX), LIGHT
    ),
    "no weights at all": Fault(_empty, ("model.safetensors",), LIGHT),
    "missing config": Fault(lambda path: (path / "config.json").unlink(), ("config.json", "missing")),
    "damaged config": Fault(lambda path: _truncate(path / "config.json", 50), ("config.json",), LIGHT),
    "config that is no object": Fault(lambda path: (path / "config.json").write_text("[]"), ("config.json",), LIGHT),
    "damaged generation config": Fault(
        lambda path: (path / "generation_config.json").write_text("{"), ("generation_config.json",), LIGHT
    ),
    "unsupported model_type": Fault(
        lambda path: _configure(path, model_type="llama"), ("config.json", "model_type", "'llama'", "olmoe")
    ),
    "unsupported rope type": Fault(
        lambda path: _configure(path, rope_parameters={"rope_type": "longrope", "factor": 2.0}),
        ("config.json", "rope", "'longrope'"),
    ),
    "quantized": Fault(
        lambda path: _configure(path, quantization_config={"quant_method": "gptq", "bits": 4}),
        ("config.json", "quantization_config"),
    ),
    "unsupported activation": Fault(lambda path: _configure(path, hidden_act="tanh"), ("hidden_act", "'tanh'"), LIGHT),
    "size as text": Fault(lambda path: _configure(path, hidden_size="32"), ("config.json", "hidden_size"), LIGHT),
    "negative size": Fault(
        lambda path: _configure(path, num_hidden_layers=-1), ("config.json", "num_hidden_layers"), LIGHT
    ),
    "more experts per token than experts": Fault(
        lambda path: _configure(path, num_experts_per_tok=7), ("num_experts_per_tok", "7"), LIGHT
    ),
    "missing tokenizer": Fault(lambda path: (path / "tokenizer.json").unlink(), ("tokenizer.json", "missing"), LIGHT),
    "damaged tokenizer": Fault(
        lambda path: (path / "tokenizer.json").write_text("{}"), ("tokenizer.json", "damaged"), LIGHT
    ),
    "damaged tokenizer config": Fault(
        lambda path: (path / "tokenizer_config.json").write_text("{"), ("tokenizer_config.json",), LIGHT
    ),
    "damaged chat template": Fault(
        lambda path: (path / "chat_template.jinja").write_text("{% for"), ("chat template",), LIGHT
    ),
    "dense tensor of the wrong shape": Fault(
        lambda path: _rewrite(path, DENSE, lambda tensor: tensor[:-1]),
        (DENSE, "[31, 32]", "[32, 32]"),
        ("router", "up"),
    ),
    "expert tensor of the wrong shape": Fault(
        lambda path: _rewrite(path, EXPERT, lambda tensor: tensor[..., :-1]),
        ("model.layers.1.", "experts", "31"),
        ("expert", "up"),
    ),
    "dense tensor of an unsupported type": Fault(
        lambda path: _rewrite(path, DENSE, lambda tensor: tensor.to(torch.int8)), (DENSE, "I8"), ("router", "up")
    ),
    "expert tensor of an unsupported type": Fault(
        lambda path: _rewrite(path, EXPERT, lambda tensor: tensor.to(torch.int8)), ("experts", "I8"), ("expert", "up")
    ),
    "missing dense tensor": Fault(lambda path: _drop(path, DENSE), (DENSE,), ("router", "up")),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_a_checkpoint_that_cannot_be_served_is_refused(fault: Fault, tmp_path: Path, nats_url: str) -> None:
    path = make_checkpoint(tmp_path / "m", "mixtral")
    fault.damage(path)
    settings = {"MODEL": str(path), "NATS_URL": nats_url}
    said = await asyncio.gather(
        *(refusal(tmp_path, what, settings) for what in fault.noticed_by), return_exceptions=True
    )
    wrong = [line for line in said if not isinstance(line, str) or not all(name in line for name in fault.names)]
    assert not wrong, "\n".join(str(each) for each in wrong)


async def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nowhere"
    for line in await asyncio.gather(*(refusal(tmp_path, what, {"MODEL": str(path)}) for what in ALL)):
        assert f"MODEL={path}" in line
