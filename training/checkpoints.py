"""Training checkpoints: written atomically, the last few kept, enough in them to go on exactly.

Tensors are safetensors, the rest is JSON: nothing here is ever unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from shared.errors import StartError

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk."""

    path: Path
    step: int
    """Steps that are done."""
    plan: dict[str, Any]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _names(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save(
    folder: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, plan: dict[str, Any], keep: int
) -> Path:
    """Write the state after `step` steps into `folder`, then drop all but the newest `keep` checkpoints.

    A reader sees either no checkpoint of this step or a whole one: it is written beside, synced, and renamed.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    parameters = _names(model)
    save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, partial / "model.safetensors")
    moments = {
        f"{name}.{moment}": optimizer.state[p][moment].detach().cpu().reshape(-1).contiguous()
        for name, p in parameters.items()
        for moment in _MOMENTS
        if moment in optimizer.state.get(p, {})
    }
    save_file(moments, partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps({"step": step, "plan": plan}), encoding="utf-8")
    for file in partial.iterdir():
        _sync(file)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _sync(folder)
    for old in find(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def find(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def newest(folder: Path) -> Saved | None:
    """The checkpoint to go on from.

    Raises:
        StartError: it is damaged.

    """
    found = find(folder)
    if not found:
        return None
    try:
        state = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
        return Saved(found[-1], int(state["step"]), dict(state["plan"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StartError(f"{found[-1]} is damaged ({error}); delete it to go on from the one before") from None


def restore(saved: Saved, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load weights and moments into `model` and `optimizer`, in place.

    Raises:
        StartError: a file is damaged or is of another model.

    """
    try:
        weights = load_file(saved.path / "model.safetensors")
        moments = load_file(saved.path / "optimizer.safetensors")
    except Exception as error:  # safetensors raises its own type for a damaged file, OSError for a missing one
        raise StartError(f"{saved.path} is damaged ({error}); delete it to go on from the one before") from None
    with torch.no_grad():
        for name, parameter in _names(model).items():
            stored = weights.get(name)
            if stored is None or stored.shape != parameter.shape:
                raise StartError(f"{saved.path}: {name} is missing or has another shape")
            parameter.copy_(stored)
            state = {m: moments[f"{name}.{m}"] for m in _MOMENTS if f"{name}.{m}" in moments}
            if state:
                optimizer.state[parameter] = {
                    m: value.reshape(()) if m == "step" else value.reshape(parameter.shape).to(parameter.device)
                    for m, value in state.items()
                }
