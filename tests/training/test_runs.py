"""Whole runs: exact resumption, atomic checkpoints, export, several processes."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from services.router.messages import GenerateRequest, Sampling
from shared.errors import StartError
from tests.oracle import Oracle, make_checkpoint
from tests.router.inprocess import local_engine
from training import checkpoints
from training.model import count_parameters, fresh_model
from training.plan import Plan, Shape
from training.trainer import train

DEADLINE_SECONDS = 120


def weights(plan: Plan, step: int) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = load_file(plan.out / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
    return loaded


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def command(plan: Plan, *launcher: str) -> list[str]:
    """The command line of `plan`, started by `launcher`."""
    s = plan.shape
    return [
        *(launcher or (sys.executable, "-m", "services.cli", "train")),
        *("--out", str(plan.out), "--data", str(plan.data[0]), "--steps", str(plan.steps)),
        *("--batch-size", str(plan.batch_size), "--sequence-length", str(plan.sequence_length)),
        *("--warmup-steps", str(plan.warmup_steps), "--save-every", str(plan.save_every)),
        *("--hidden-size", str(s.hidden_size), "--layers", str(s.layers), "--heads", str(s.heads)),
        *("--experts", str(s.experts), "--top-k", str(s.top_k), "--expert-size", str(s.expert_size)),
        *("--vocab-size", str(s.vocab_size)),
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


async def finish(args: list[str], **more: str) -> None:
    """Run a command to its good end."""
    process = await asyncio.create_subprocess_exec(
        *args, env={**environment(), **more}, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(DEADLINE_SECONDS):
        _, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()[-3000:]


async def test_a_resumed_run_ends_with_the_same_weights_to_the_bit(plan: Plan, tmp_path: Path) -> None:
    train(plan)
    other = dataclasses.replace(plan, out=tmp_path / "other")
    shutil.copytree(plan.out / "checkpoints" / "step-00000003", other.out / "checkpoints" / "step-00000003")
    train(other)
    assert same(weights(plan, 6), weights(other, 6))
    assert not same(weights(plan, 3), weights(plan, 6))
    report = json.loads((plan.out / "report.json").read_text())
    assert report["perplexity"] == json.loads((other.out / "report.json").read_text())["perplexity"]


async def test_a_killed_run_goes_on_from_its_last_checkpoint(plan: Plan, tmp_path: Path) -> None:
    plan = dataclasses.replace(plan, steps=12, save_every=1)
    process = await asyncio.create_subprocess_exec(
        *command(plan), env=environment(), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    async with asyncio.timeout(DEADLINE_SECONDS):
        while len(checkpoints.find(plan.out / "checkpoints")) < 2:
            await asyncio.sleep(0.01)
    process.kill()
    await process.wait()
    saved = checkpoints.newest(plan.out / "checkpoints")
    assert saved is not None
    assert 0 < saved.step < 12
    for args in (command(plan), command(dataclasses.replace(plan, out=tmp_path / "whole"))):
        await finish(args)
    assert same(weights(plan, 12), weights(dataclasses.replace(plan, out=tmp_path / "whole"), 12))
    assert not list((plan.out / "checkpoints").glob(".partial*"))


async def test_a_first_sigterm_saves_and_ends_well(plan: Plan) -> None:
    plan = dataclasses.replace(plan, steps=100_000, save_every=5)
    process = await asyncio.create_subprocess_exec(
        *command(plan), env=environment(), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not checkpoints.find(plan.out / "checkpoints"):
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        said, _ = await process.communicate()
    assert process.returncode == 0
    saved = checkpoints.newest(plan.out / "checkpoints")
    assert saved is not None
    assert f"stopped after step {saved.step}" in said.decode()


@pytest.mark.parametrize("processes", [2])
async def test_two_processes_learn_the_same_as_one(plan: Plan, tmp_path: Path, processes: int) -> None:
    train(plan)
    many = dataclasses.replace(plan, out=tmp_path / "many")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    await finish(command(many, *launcher, "-m", "training"), ACCELERATE_USE_CPU="true")
    # The balance loss is of each process' own rows, and Adam makes much of small differences: close, not equal.
    one, two = (json.loads((p.out / "report.json").read_text()) for p in (plan, many))
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=2e-3)


async def test_the_last_checkpoints_are_kept_and_no_more(plan: Plan) -> None:
    train(dataclasses.replace(plan, save_every=1, keep=2))
    assert [path.name for path in checkpoints.find(plan.out / "checkpoints")] == ["step-00000005", "step-00000006"]


async def test_another_plan_in_the_same_folder_is_refused(plan: Plan) -> None:
    train(plan)
    with pytest.raises(StartError, match="another learning_rate"):
        train(dataclasses.replace(plan, learning_rate=0.5))


async def test_a_damaged_checkpoint_is_named(plan: Plan) -> None:
    train(plan)
    (plan.out / "checkpoints" / "step-00000006" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(StartError, match="step-00000006 is damaged"):
        train(dataclasses.replace(plan))


async def test_the_exported_model_is_served_as_transformers_runs_it(plan: Plan) -> None:
    train(plan)
    path = plan.out / "model"
    config = json.loads((path / "config.json").read_text())
    assert config["model_type"] == "olmoe"
    assert config["dtype"] == "bfloat16"
    prompt = list(range(3, 23))
    want = Oracle(path, torch.bfloat16).greedy(prompt, 1)
    async with local_engine(path) as engine:
        request = GenerateRequest(id="a", token_ids=prompt, max_tokens=1, sampling=Sampling(temperature=0))
        result = await engine.generate(request)
    top = want.prompt_logits[-1].topk(5).indices.tolist()
    assert result.tokens[0] in top  # bf16: rounding may swap near-equal ones, of which a new model has many


@pytest.mark.parametrize("variant", ["mixtral", "qwen2"])
async def test_a_checkpoint_can_be_fine_tuned(variant: str, plan: Plan, tmp_path: Path) -> None:
    init = make_checkpoint(tmp_path / "init", variant)
    # Its byte tokenizer knows no characters beyond its small alphabet; text within it is enough here.
    result = train(dataclasses.replace(plan, init=init, sequence_length=16))
    assert result is not None
    assert (plan.out / "model" / "tokenizer.json").read_bytes() == (init / "tokenizer.json").read_bytes()
    config: dict[str, Any] = json.loads((plan.out / "model" / "config.json").read_text())
    assert config["model_type"] == json.loads((init / "config.json").read_text())["model_type"]


def test_the_dense_twin_has_as_many_active_parameters() -> None:
    shape = Shape()
    _, sparse = count_parameters(fresh_model(shape, 1))
    total, dense = count_parameters(fresh_model(shape.dense(), 1))
    assert total == dense
    gates = shape.layers * shape.hidden_size * (shape.experts - 1)
    assert sparse - dense == gates
    assert gates < 0.01 * sparse
