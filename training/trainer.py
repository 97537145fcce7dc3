"""The training loop: prepare, step, evaluate, save, export."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from shared.errors import StartError
from training import checkpoints
from training.corpus import Tokens, Windows, encode, held_out_windows, read_texts
from training.evaluation import Evaluation, evaluate, use_table
from training.losses import losses
from training.model import checkpoint_model, count_parameters, export, fresh_model
from training.plan import Plan
from training.vocabulary import load_tokenizer, train_tokenizer

EVAL_WINDOWS = 64
"""Windows of an evaluation during training; the last one reads all."""
LOG_EVERY = 20
CLIP_NORM = 1.0
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Data:
    """The corpus, tokenized."""

    tokenizer: Tokenizer
    windows: Windows
    held_out: Tokens
    bytes_per_token: float


def prepare_data(plan: Plan) -> Data:
    """Read, split and tokenize the corpus; deterministic, so every process does it for itself."""
    texts = read_texts(plan.sources(), plan.pattern)
    if plan.init is not None:
        tokenizer = load_tokenizer(plan.init)
    else:
        tokenizer = train_tokenizer(texts.train, plan.shape.vocab_size)
    train, held_out = encode(tokenizer, texts.train), encode(tokenizer, texts.held_out)
    windows = Windows(train, batch_size=plan.batch_size, length=plan.sequence_length, seed=plan.seed)
    if len(held_out) <= plan.sequence_length:
        raise StartError(f"only {len(held_out)} held-out tokens; give more data or lower --sequence-length")
    rows = held_out_windows(held_out, plan.sequence_length)
    return Data(tokenizer, windows, rows, texts.held_out_bytes / len(held_out))


class Trainer:
    """One run, in this process; under torchrun, one of several that hold the same model."""

    def __init__(self, plan: Plan, console: Console) -> None:
        plan.shape.check()
        self._plan = plan
        self._folder = plan.out / "checkpoints"
        self._accelerator = Accelerator()
        if plan.batch_size % self._accelerator.num_processes:
            raise StartError(
                f"--batch-size {plan.batch_size} is no multiple of the {self._accelerator.num_processes} processes"
            )
        self._console = console
        self._say(f"reading {', '.join(str(source) for source in plan.sources())}")
        self._data = prepare_data(plan)
        model = fresh_model(plan.shape, plan.seed) if plan.init is None else checkpoint_model(plan.init)
        self._top_k = int(model.config.num_experts_per_tok)
        total, active = count_parameters(model)
        self._counts = {"parameters": total, "active_parameters": active}
        decayed = [p for p in model.parameters() if p.dim() > 1]
        plain = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=BETAS)
        self._step = self._restore(model, optimizer)
        self._model, self._optimizer = self._accelerator.prepare(model, optimizer)
        self._say(
            f"{total:,} parameters, {active:,} active per token; {self._data.windows.per_epoch} steps per epoch, "
            f"step {self._step} of {plan.steps}"
        )

    @property
    def _bare(self) -> Any:
        """The model without accelerate's wrapper."""
        return self._accelerator.unwrap_model(self._model)

    def _say(self, text: str) -> None:
        if self._accelerator.is_main_process:
            self._console.print(text, highlight=False, soft_wrap=True)

    def _restore(self, model: Any, optimizer: torch.optim.Optimizer) -> int:
        """Go on from the newest checkpoint, if there is one; returns the steps that are done."""
        saved = checkpoints.newest(self._folder)
        if saved is None:
            return 0
        mine = self._plan.fingerprint()
        different = sorted(key for key in mine if saved.plan.get(key) != mine[key])
        if different:
            raise StartError(
                f"{self._folder} holds a run with another {', '.join(different)}; "
                "give the same options to continue it, or another --out to start anew"
            )
        checkpoints.restore(saved, model, optimizer)
        self._say(f"going on from {saved.path}")
        return saved.step

    def run(self) -> Evaluation | None:
        """Train to the plan's last step and export; None if Ctrl-C or SIGTERM ended it early, with all saved."""
        plan = self._plan
        with _interruptible() as stop, _progress(self._console, self._accelerator.is_main_process) as bar:
            task = bar.add_task("training", total=plan.steps, completed=self._step, note="")
            started, first = time.monotonic(), self._step
            while self._step < plan.steps:
                figures = self._train_step()
                if self._step % LOG_EVERY == 0 or self._step == plan.steps:
                    rate = (self._step - first) * plan.batch_size * plan.sequence_length / (time.monotonic() - started)
                    self._log(bar, task, figures, rate)
                bar.update(task, completed=self._step)
                if stop.is_set() or self._step % plan.save_every == 0 or self._step == plan.steps:
                    self._save()
                if stop.is_set():
                    self._say(f"stopped after step {self._step}; the same command goes on from here")
                    return None
                if self._step % plan.eval_every == 0 and self._step < plan.steps:
                    result = self._evaluate(EVAL_WINDOWS)
                    self._say(f"step {self._step}: held-out perplexity {result.perplexity:.3f}")
        return self._finish()

    def _train_step(self) -> dict[str, float]:
        plan, accelerator = self._plan, self._accelerator
        rows = self._data.windows.batch(self._step, accelerator.process_index, accelerator.num_processes)
        tokens = torch.from_numpy(rows.astype(np.int64)).to(accelerator.device)
        # Whatever a model draws at random depends on the step and the process only: resuming needs no generator state.
        torch.manual_seed(plan.seed * 1_000_003 + self._step * 1009 + accelerator.process_index)
        for group in self._optimizer.param_groups:
            group["lr"] = plan.learning_rate_at(self._step)
        parts = losses(
            self._model,
            tokens,
            top_k=self._top_k,
            balance_coefficient=plan.balance_coefficient,
            z_coefficient=plan.z_coefficient,
        )
        accelerator.backward(parts.total)
        norm = float(accelerator.clip_grad_norm_(self._model.parameters(), CLIP_NORM))
        if not math.isfinite(norm):
            raise StartError(f"the loss diverged at step {self._step}; lower --learning-rate and run again")
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._step += 1
        return {
            name: float(value.detach())
            for name, value in (("loss", parts.cross_entropy), ("balance", parts.balance), ("z", parts.z))
        }

    def _log(self, bar: Progress, task: TaskID, figures: dict[str, float], rate: float) -> None:
        note = " ".join(f"{name} {value:.3f}" for name, value in figures.items()) + f" {rate:,.0f} tok/s"
        bar.update(task, note=note)
        if not self._console.is_terminal:
            self._say(f"step {self._step}/{self._plan.steps} {note}")

    def _save(self) -> None:
        if self._accelerator.is_main_process:
            plan = self._plan
            checkpoints.save(
                self._folder, self._step, self._bare, self._optimizer.optimizer, plan.fingerprint(), plan.keep
            )
        self._accelerator.wait_for_everyone()

    def _evaluate(self, most: int | None = None) -> Evaluation:
        return evaluate(
            self._bare,
            self._data.held_out,
            self._data.bytes_per_token,
            top_k=self._top_k,
            device=self._accelerator.device,
            most=most,
        )

    def _finish(self) -> Evaluation:
        """Export, and evaluate what was exported: the bfloat16 weights."""
        if self._accelerator.is_main_process:
            export(self._bare, self._data.tokenizer, self._plan.out / "model", init=self._plan.init)
            with torch.no_grad():
                for parameter in self._bare.parameters():
                    parameter.copy_(parameter.to(torch.bfloat16))
        self._accelerator.wait_for_everyone()
        result = self._evaluate()
        if self._accelerator.is_main_process:
            result.write(self._plan.out / "report.json", steps=self._plan.steps, **self._counts)
            self._console.print(use_table(result))
        self._say(
            f"held-out perplexity {result.perplexity:.3f}, {result.bits_per_byte:.3f} bits per byte, "
            f"next token right {result.top_1_accuracy:.1%}, over {result.tokens:,} tokens\n"
            f"model: {self._plan.out / 'model'}; try: openmoe up --model {self._plan.out / 'model'}"
        )
        return result


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets, so that the step in progress is finished and saved."""
    stop = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_signal(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])  # a second one ends the process

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _progress(console: Console, is_main: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=console, disable=not (is_main and console.is_terminal))


def train(plan: Plan) -> Evaluation | None:
    """Run `plan`.

    Raises:
        StartError: wrong options, no data, a damaged checkpoint, a diverging loss.

    """
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartError(f"--out {plan.out}: {error.strerror}") from None
    return Trainer(plan, Console()).run()
