"""What `openmoe bench` leaves: tables in the terminal, report.json, and report.html (services/benchmark_html.py).

report.json, all times in seconds:

- `schema`: 1; it grows when a field changes its meaning or goes.
- `date`: when the run ended, ISO 8601 with the offset from UTC.
- `command`: the settings: `url`, `shape`, `concurrency`, `rates`, `duration` or `requests` (the other is null),
  `prompt_tokens`, `max_tokens`, `layer`, `timeout`, `warmup`, `seed`. No key.
- `server`: `model`, `version`, `max_model_len`, `vocab_size`, `hidden_size`, `moe_layers`; null where it does not say.
- `machine`: that of the load generator: `cpu`, `cores` (those the process may use), `memory_bytes`, `system`, `python`,
  `openmoe`.
- `interrupted`: whether Ctrl-C ended the run before its last row.
- `rows`: one for each load; the fields of `services.benchmark_figures.Row`, with `time_to_first_token`,
  `inter_token_latency`, `latency` and `send_lag` as `Distribution` (null: nothing was measured) and `over_time` as a
  list of `Bucket`.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from services.benchmark import Outcome, Plan
from services.benchmark_figures import Distribution, Row
from services.benchmark_html import html
from shared.discovery import VERSION
from shared.errors import StartError

SCHEMA = 1
LATE_SECONDS = 0.05
BUSY = 0.8
JSON_NAME, HTML_NAME = "report.json", "report.html"


def machine() -> dict[str, Any]:
    """Where the load was made."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
        "openmoe": VERSION,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def report(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """All of it, as report.json has it."""
    return {
        "schema": SCHEMA,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": {
            "url": plan.url,
            "shape": plan.shape,
            "concurrency": list(plan.concurrency),
            "rates": list(plan.rates),
            "duration": plan.length.duration,
            "requests": plan.length.requests,
            "prompt_tokens": plan.prompt_tokens,
            "max_tokens": plan.max_tokens,
            "layer": plan.layer,
            "timeout": plan.timeout,
            "warmup": plan.warmup,
            "seed": plan.seed,
        },
        "server": {
            "model": outcome.model.id,
            "version": outcome.server_version,
            "max_model_len": outcome.model.max_model_len,
            "vocab_size": outcome.model.vocab_size,
            "hidden_size": outcome.model.hidden_size,
            "moe_layers": outcome.model.moe_layers,
        },
        "machine": machine(),
        "interrupted": outcome.interrupted,
        "rows": [{**asdict(row), "name": row.name} for row in outcome.rows],
    }


def folder(path: Path | None) -> Path:
    """The folder that the report goes to (by default a new one, named by the time); tried out before the run.

    Raises:
        StartError: it cannot be made, or nothing can be written there.

    """
    path = path or Path(f"openmoe-bench-{datetime.now().astimezone():%Y%m%d-%H%M%S}")
    existed = path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{JSON_NAME}"
        probe.touch()
        probe.unlink()
        if not existed:
            path.rmdir()  # a run that is refused leaves nothing behind
    except OSError as error:
        raise StartError(f"--output {path}: {error.strerror or error}") from None
    return path


def write(path: Path, content: dict[str, Any]) -> tuple[Path, Path]:
    """Write report.json and report.html; their paths.

    Raises:
        StartError: they cannot be written.

    """
    data, page = path / JSON_NAME, path / HTML_NAME
    try:
        path.mkdir(parents=True, exist_ok=True)
        data.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        page.write_text(html(content), encoding="utf-8")
    except OSError as error:
        raise StartError(f"--output {path}: {error.strerror or error}") from None
    return data, page


def milliseconds(seconds: float) -> str:
    """With three figures or so: 0.42, 7.31, 48.1, 1530."""
    value = seconds * 1000
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def tables(plan: Plan, rows: Sequence[Row]) -> list[Table]:
    """What the loads came to, and how long things took; each fits 80 columns."""
    generates = plan.shape != "forward"
    asked = f"{plan.prompt_tokens} tokens in, {plan.max_tokens} out" if generates else f"{plan.prompt_tokens} rows"
    rates = _table(f"{plan.shape}, {asked}", "load", "done", "failed", "requests/s")
    times = _table("milliseconds", "load")
    kinds = ["first", "between", "whole"] if generates else ["whole"]
    if generates:
        rates.add_column("output tokens/s", justify="right")
    rates.add_column("input tokens/s", justify="right")
    for kind in kinds:
        for quantile in ("p50", "p95", "p99", *(["max"] if kind == "between" else [])):
            times.add_column(f"{kind if quantile == 'p50' else ''}\n{quantile}", justify="right")
    if generates:
        times.caption = "first: to the first token; between: two tokens of a stream; whole: to the answer's end"
    for row in rows:
        failed = Text(f"{row.failed}", style="red" if row.failed else "")
        cells: list[str | Text] = [row.name, f"{row.done}", failed, f"{row.requests_per_second:.2f}"]
        cells += [f"{row.output_tokens_per_second:.1f}"] if generates else []
        rates.add_row(*cells, f"{row.input_tokens_per_second:.1f}")
        parts = [_times(row.time_to_first_token), _times(row.inter_token_latency, longest=True)] if generates else []
        times.add_row(row.name, *(cell for part in [*parts, _times(row.latency)] for cell in part))
    return [rates, times]


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _times(times: Distribution | None, *, longest: bool = False) -> list[str]:
    if times is None:
        return ["-"] * (4 if longest else 3)
    return [milliseconds(value) for value in (times.p50, times.p95, times.p99, *((times.max,) if longest else ()))]


def notes(rows: Sequence[Row]) -> list[Text]:
    """What the table does not show: the reasons of failures, and rows that the generator itself held up."""
    lines = []
    for row in rows:
        for reason, count in row.failures.items():
            said = f": {row.examples[reason]}" if reason in row.examples else ""
            lines.append(Text(f"failed: {row.name}: {count} × {reason}{said}", style="red"))
        lag = row.send_lag.p99 if row.send_lag else 0.0
        if row.generator_cpu > BUSY or (row.mode == "open" and lag > LATE_SECONDS):
            text = (
                f"{row.name}: the load generator was at its limit ({row.generator_cpu:.0%} of a core, p99 of sending "
            )
            text += f"late {milliseconds(lag)} ms); run it on another machine, or trust these figures less"
            lines.append(Text(text, style="yellow"))
    return lines
