"""`openmoe train` and `python -m training`: the command line of a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from shared.errors import StartError
from shared.settings import refuse
from training.plan import Plan, Shape

_SHAPE, _PLAN = Shape(), Plan(Path())


def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, the report and the exported model.")],
    data: Annotated[
        list[Path] | None, typer.Option(help="Folder or file of text; may be repeated. Default: Python's own library.")
    ] = None,
    pattern: Annotated[str, typer.Option(help="Files of a folder that are read.")] = _PLAN.pattern,
    init: Annotated[Path | None, typer.Option(help="Fine-tune this checkpoint instead of a fresh model.")] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Train the dense twin: equal active parameters.")] = False,
    steps: Annotated[int, typer.Option(min=1)] = _PLAN.steps,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per step, all processes together.")] = (
        _PLAN.batch_size
    ),
    sequence_length: Annotated[int, typer.Option(min=8)] = _PLAN.sequence_length,
    learning_rate: Annotated[float, typer.Option(min=1e-8, max=1)] = _PLAN.learning_rate,
    warmup_steps: Annotated[int, typer.Option(min=0)] = _PLAN.warmup_steps,
    weight_decay: Annotated[float, typer.Option(min=0, max=1)] = _PLAN.weight_decay,
    balance_coefficient: Annotated[float, typer.Option(min=0, help="Of the load-balancing loss.")] = (
        _PLAN.balance_coefficient
    ),
    z_coefficient: Annotated[float, typer.Option(min=0, help="Of the router z loss.")] = _PLAN.z_coefficient,
    seed: Annotated[int, typer.Option(min=0)] = _PLAN.seed,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = _PLAN.save_every,
    keep: Annotated[int, typer.Option(min=1, help="Checkpoints that are kept.")] = _PLAN.keep,
    eval_every: Annotated[int, typer.Option(min=1, help="Steps between evaluations.")] = _PLAN.eval_every,
    hidden_size: Annotated[int, typer.Option(min=8)] = _SHAPE.hidden_size,
    layers: Annotated[int, typer.Option(min=1)] = _SHAPE.layers,
    heads: Annotated[int, typer.Option(min=1)] = _SHAPE.heads,
    experts: Annotated[int, typer.Option(min=1)] = _SHAPE.experts,
    top_k: Annotated[int, typer.Option(min=1)] = _SHAPE.top_k,
    expert_size: Annotated[int, typer.Option(min=8, help="Inner size of one expert.")] = _SHAPE.expert_size,
    vocab_size: Annotated[int, typer.Option(min=300)] = _SHAPE.vocab_size,
) -> None:
    """Train a small MoE, or fine-tune one, and export it as a Hugging Face folder that `openmoe up` serves.

    Interrupted, the same command goes on from its last checkpoint, exactly.

    The demo model: openmoe train --out build/demo
    Many GPUs: torchrun --nproc-per-node 8 -m training --out build/demo
    """
    shape = Shape(hidden_size, layers, heads, expert_size, experts, top_k, vocab_size)
    plan = Plan(
        out=out.expanduser().resolve(),
        data=tuple(path.expanduser().resolve() for path in data or ()),
        pattern=pattern,
        init=None if init is None else init.expanduser().resolve(),
        shape=shape.dense() if dense else shape,
        steps=steps,
        batch_size=batch_size,
        sequence_length=sequence_length,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        balance_coefficient=balance_coefficient,
        z_coefficient=z_coefficient,
        seed=seed,
        save_every=save_every,
        keep=keep,
        eval_every=eval_every,
    )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local; a look-up would only wait for a network
    try:
        from training import trainer
    except ModuleNotFoundError as error:
        refuse(StartError(f"openmoe train needs {error.name}; install it: .venv/bin/pip install -e '.[train]'"))
    try:
        trainer.train(plan)
    except StartError as error:
        refuse(error)
