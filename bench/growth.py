"""How cost grows: `python -m bench.growth [AXIS[=VALUE,VALUE...] ...] [--output DIR]`.

One thing grows on each axis, all else stays; by default all axes are measured (a quarter of an hour):

- experts: of each layer;
- workers: that share 16 experts;
- routers: that share the streams;
- simulated: workers that *sleep* in place of computing (SIMULATED_PAIR_MS), so that more of them can be run than there
  are cores: a simulation of the experts, with the real router, bus and gateway. Every token goes to all 16 experts, so
  that each worker has the same to do, as with perfectly balanced gates;
- simulated-routers: the same with 16 workers and more than one router;
- context: tokens that each stream's KV cache holds, of 1 and of 4 streams;
- batch: streams that decode together.

The checkpoints are random and tiny (bench/checkpoints.py, "tiny": hidden 256, 4 layers, top-2), so that what is
measured is everything but the matrices. Every stack is asked for `streams` endless completions; once all of them
decode, the services' /metrics are read twice, two seconds or 64 tokens a stream apart. Printed is one JSON object for
each point:

- `tokens_per_second`: the median of the rounds, with the least and the greatest;
- `dispatch_ms`: one layer's experts as the router sees them, from sent to combined (mean of moe_dispatch_seconds);
- `compute_ms`: one call at a worker, of decoding, computing and encoding (mean of moe_expert_compute_seconds). On the
  simulated axes: what one worker sleeps for one layer;
- `overhead_ms`: dispatch_ms - compute_ms, per layer: the bus, the waiting for a core and, as a dispatch ends with its
  last answer, for the slowest of the calls;
- `step_ms`, `step_tokens`: one step of a router and its tokens (means);
- `cores`: how many cores each kind of process took (`generator` is this one);
- `ideal_tokens_per_second`, on the simulated axes: if nothing but the sleeping took time.

growth.json (the points), growth-tables.md and growth.svg are written to DIR. What DIR's growth.json has of other points
stays, so that axes can be measured one at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import psutil
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from bench.checkpoints import write
from bench.overhead import metrics_of
from bench.soak import processes
from bench.stack import stack
from services.benchmark import look_at
from services.benchmark_html import MARKS, PALETTE
from services.benchmark_http import Client
from services.benchmark_plots import COLOURS, HEIGHT, WIDTH, Axis, Line, drawing
from services.benchmark_report import machine
from services.benchmark_requests import Requests, ServedModel

LAYERS = 4
MAX_CONTEXT = 16384
MAX_TOKENS = 4096
"""Of a completion, which is broken off long before."""
PROMPT_TOKENS, SHORT_PROMPT_TOKENS = 32, 4
"""Short ones where one worker sleeps for every token of them."""
SETTLE_TOKENS = 4
"""Of each stream, before the window."""
WINDOW_SECONDS = 2.0
WINDOW_TOKENS = 64
"""Of each stream: the window's end, if it comes before its seconds: contexts must not grow past what they stand for."""
START_SECONDS = 120.0
SIMULATED_PAIR_MS = 0.5
"""As long as OLMoE's and Mixtral's experts took for a pair when 16 tokens decode (docs/performance.md, widened)."""
COUNTED = ("moe_dispatch_seconds", "moe_expert_compute_seconds", "moe_step_seconds", "moe_batch_size_tokens")
TOKENS = "moe_generation_tokens_total"
Result = dict[str, Any]


@dataclass(frozen=True)
class Fleet:
    """A stack."""

    experts: int = 16
    top_k: int = 2
    workers: int = 2
    routers: int = 1
    shards: int = 2
    simulated: bool = False

    @property
    def simulated_ms(self) -> float:
        """What a worker sleeps for each token and layer, if all have the same to do."""
        return SIMULATED_PAIR_MS * self.top_k / self.workers

    def ideal(self) -> float:
        """Tokens per second, if all workers slept all the time."""
        return 1000 / (LAYERS * self.simulated_ms)


@dataclass(frozen=True)
class Point:
    """One measurement."""

    axis: str
    line: str
    value: int
    fleet: Fleet
    streams: int = 16
    context: int = PROMPT_TOKENS


def _simulated(workers: int, routers: int = 1) -> Fleet:
    return Fleet(top_k=16, workers=workers, routers=routers, shards=16, simulated=True)


def _sleeping(axis: str, line: str, value: int, fleet: Fleet, streams: int) -> Point:
    return Point(axis, line, value, fleet, streams, context=SHORT_PROMPT_TOKENS)


def points() -> list[Point]:
    """All of them."""
    named = [
        *(Point("experts", "2 workers", n, Fleet(experts=n)) for n in (4, 8, 16, 64, 128)),
        *(Point("workers", "1 router", n, Fleet(workers=n, shards=n)) for n in (1, 2, 4, 8)),
        *(Point("routers", "2 workers", n, Fleet(routers=n)) for n in (1, 2)),
        *(_sleeping("simulated", "16 streams", n, _simulated(n), 16) for n in (1, 2, 4, 8, 16)),
        *(_sleeping("simulated", "64 streams", n, _simulated(n), 64) for n in (4, 8, 16)),
        *(_sleeping("simulated-routers", "16 streams", n, _simulated(16, n), 16) for n in (1, 2)),
    ]
    for streams in (1, 4):
        line = f"{streams} stream{'s' if streams > 1 else ''}"
        named += [
            Point("context", line, n, Fleet(), streams=streams, context=n) for n in (128, 512, 1024, 2048, 4096, 8192)
        ]
    return [*named, *(Point("batch", "2 workers", n, Fleet(), streams=n) for n in (1, 2, 4, 8, 16, 32, 64))]


@dataclass
class Reading:
    """The services' counters at one moment."""

    at: float
    counters: Counter[str]
    """Sums and counts of COUNTED, and TOKENS, over all processes."""
    cpu: Counter[str]
    """CPU seconds by kind of process."""


def read(texts: Iterable[str]) -> Counter[str]:
    """What is counted, over the /metrics of all processes and all labels."""
    names = {TOKENS, *(f"{name}_{part}" for name in COUNTED for part in ("sum", "count"))}
    found: Counter[str] = Counter()
    for text in texts:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name in names:
                    found[sample.name] += sample.value  # type: ignore[assignment]  # a Counter adds floats as well
    return found


def window(before: Reading, after: Reading) -> Result:
    """What happened between two readings."""

    def change(name: str) -> float:
        return after.counters[name] - before.counters[name]

    def mean(name: str) -> float:
        return change(f"{name}_sum") / (change(f"{name}_count") or 1)

    seconds = after.at - before.at
    return {
        "tokens_per_second": change(TOKENS) / seconds,
        "dispatch_ms": 1000 * mean("moe_dispatch_seconds"),
        "compute_ms": 1000 * mean("moe_expert_compute_seconds"),
        "step_ms": 1000 * mean("moe_step_seconds"),
        "step_tokens": mean("moe_batch_size_tokens"),
        "cores": {kind: (after.cpu[kind] - before.cpu[kind]) / seconds for kind in sorted(after.cpu)},
    }


def result(point: Point, windows: list[Result]) -> Result:
    """The medians over a point's windows."""

    def median(name: str) -> float:
        return float(statistics.median(w[name] for w in windows))

    speeds = [w["tokens_per_second"] for w in windows]
    fleet, computed = point.fleet, median("compute_ms")
    if fleet.simulated:  # the workers' own figure has the waiting for each other's calls
        computed = fleet.simulated_ms * median("step_tokens")
    found = {
        "axis": point.axis,
        "line": point.line,
        "value": point.value,
        "streams": point.streams,
        "simulated": fleet.simulated,
        "tokens_per_second": round(median("tokens_per_second"), 1),
        "least": round(min(speeds), 1),
        "greatest": round(max(speeds), 1),
        "dispatch_ms": round(median("dispatch_ms"), 2),
        "compute_ms": round(computed, 2),
        "overhead_ms": round(median("dispatch_ms") - computed, 2),
        "step_ms": round(median("step_ms"), 2),
        "step_tokens": round(median("step_tokens"), 1),
        "cores": {k: round(statistics.median(w["cores"][k] for w in windows), 2) for k in windows[0]["cores"]},
    }
    if fleet.simulated:
        found["ideal_tokens_per_second"] = round(fleet.ideal(), 1)
    return found


class Running:
    """A stack that runs, and its processes."""

    def __init__(self, client: Client, model: ServedModel, metrics: list[Client]) -> None:
        self._client, self._model, self._metrics = client, model, metrics
        self._processes = [(_kind(name), process) for name, process in processes().items()]
        self._processes.append(("generator", psutil.Process()))

    async def reading(self) -> Reading:
        texts = await asyncio.gather(*(_text(client) for client in self._metrics))
        cpu: Counter[str] = Counter()
        for kind, process in self._processes:
            cpu[kind] += sum(process.cpu_times()[:2])  # type: ignore[assignment]
        return Reading(time.perf_counter(), read(texts), cpu)

    async def measure(self, point: Point, number: int) -> Result:
        """One window of a point; `number` makes its prompts unlike those of others."""
        make = Requests(
            "completion", self._model, prompt_tokens=point.context, max_tokens=MAX_TOKENS, seed=0, layer=None
        )
        counts = [0] * point.streams
        async with self._decoding([make(number, n).body for n in range(point.streams)], counts) as check:
            end = time.perf_counter() + START_SECONDS
            while min(counts) < SETTLE_TOKENS:
                check(end)
                await asyncio.sleep(0.01)
            before, first = await self.reading(), sum(counts)
            end, last = before.at + WINDOW_SECONDS, first
            while True:
                check(None)
                await asyncio.sleep(0.01)
                seen = sum(counts)
                if seen - first >= WINDOW_TOKENS * point.streams or (seen > last and time.perf_counter() >= end):
                    break  # only when tokens came: a window has whole steps, which may be long
                last = seen
            after, seen = await self.reading(), sum(counts) - first
        counted = after.counters[TOKENS] - before.counters[TOKENS]
        if abs(seen - counted) > 0.1 * counted + 2 * point.streams:
            raise SystemExit(f"{seen} tokens came and the gateway counts {counted}")
        return window(before, after)

    @contextlib.asynccontextmanager
    async def _decoding(self, bodies: list[bytes], counts: list[int]) -> AsyncIterator[Any]:
        """Streams of completions, which are broken off at the end; gives what ends the run if one ends by itself."""

        async def stream(number: int, body: bytes) -> str:
            def take(piece: bytes) -> None:
                counts[number] += piece.count(b"data: {")

            status, refusal = await self._client.ask("POST", "/v1/completions", body, take)
            return f"HTTP {status} {refusal.decode(errors='replace')}"

        tasks = [asyncio.create_task(stream(n, body), name=f"stream:{n}") for n, body in enumerate(bodies)]

        def check(end: float | None) -> None:
            for task in tasks:
                if task.done():
                    raise SystemExit(f"a stream ended: {task.result()}")
            if end is not None and time.perf_counter() > end:
                raise SystemExit(f"not all streams decode within {START_SECONDS:g} s")

        try:
            yield check
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _kind(name: str) -> str:
    """router-3: router."""
    stem, _, number = name.rpartition("-")
    return stem if number.isdigit() else name


async def _text(client: Client) -> str:
    pieces: list[bytes] = []
    status, _ = await client.ask("GET", "/metrics", b"", pieces.append)
    if status != 200:
        raise SystemExit(f"{client.url}/metrics: HTTP {status}")
    return b"".join(pieces).decode()


async def measure(chosen: list[Point], rounds: int, folder: Path, keep: Callable[[list[Result]], None]) -> None:
    """Measure the points; a stack is started for each fleet, and `keep` gets the results of each."""
    for fleet in dict.fromkeys(point.fleet for point in chosen):
        group = [point for point in chosen if point.fleet == fleet]
        name = f"{fleet.experts}-experts-top-{fleet.top_k}"
        sizes = {"num_experts": fleet.experts, "num_experts_per_tok": fleet.top_k, "num_hidden_layers": LAYERS}
        path = write("tiny", folder / name, **sizes, max_position_embeddings=MAX_CONTEXT)
        simulated = str(SIMULATED_PAIR_MS) if fleet.simulated else ""
        sizes_of_stack = ("--experts", fleet.workers), ("--routers", fleet.routers), ("--shards", fleet.shards)
        options = [text for option, count in sizes_of_stack for text in (option, str(count))]
        async with stack("--model", str(path), *options, BATCH_SIZE="64", SIMULATED_PAIR_MS=simulated) as url:
            client = Client(url)
            metrics = (await metrics_of(url, ""))[1:]  # the first is the gateway's, which also has a port for them
            running = Running(client, (await look_at(client))[0], metrics)
            found = []
            for point in group:
                windows = [await running.measure(point, number) for number in range(rounds + 1)]
                found.append(result(point, windows[1:]))  # the first warms up
                print(json.dumps(found[-1]), flush=True)
            client.close()
        keep(found)


def merged(old: list[Result], new: list[Result]) -> list[Result]:
    """`new` in place of the same points in `old`, in the order of `points`; what is no point any more goes."""
    key = ("axis", "line", "value")
    known = {tuple(r[k] for k in key): r for r in (*old, *new)}
    order = [(p.axis, p.line, p.value) for p in points()]
    return [known[place] for place in order if place in known]


def _by_axis(results: list[Result]) -> dict[str, list[Result]]:
    return {axis: list(group) for axis, group in itertools.groupby(results, key=lambda r: str(r["axis"]))}


LABELS = {
    "experts": "experts of each layer",
    "workers": "expert workers",
    "routers": "routers",
    "simulated": "workers that sleep (simulation)",
    "simulated-routers": "routers, 16 workers that sleep (simulation)",
    "context": "tokens of context",
    "batch": "streams",
}
KINDS = ("router", "expert", "nats-server", "gateway", "generator")


def tables(results: list[Result]) -> str:
    """Markdown, a table for each axis."""
    parts = []
    for axis, rows in _by_axis(results).items():
        simulated, lines = rows[0]["simulated"], len({r["line"] for r in rows}) > 1
        heads = [LABELS[axis], *(["at"] if lines else []), "tokens/s (least to greatest)"]
        heads += ["ideal", "share"] if simulated else []
        heads += ["step ms", "dispatch ms", "slept ms" if simulated else "compute ms", "overhead ms a layer"]
        heads += [f"{kind} cores" for kind in KINDS]
        text = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        for r in rows:
            cells = [str(r["value"]), *([r["line"]] if lines else [])]
            cells.append(f"{r['tokens_per_second']:.0f} ({r['least']:.0f} to {r['greatest']:.0f})")
            if simulated:
                ideal = r["ideal_tokens_per_second"]
                cells += [f"{ideal:.0f}", f"{r['tokens_per_second'] / ideal:.0%}"]
            cells += [f"{r[name]:.1f}" for name in ("step_ms", "dispatch_ms", "compute_ms", "overhead_ms")]
            cells += [f"{r['cores'].get(kind, 0):.2f}" for kind in KINDS]
            text.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(text))
    return "\n\n".join(parts) + "\n"


def svg(results: list[Result]) -> str:
    """Small multiples: for each axis its tokens per second and its milliseconds per layer."""
    row_height, caption = HEIGHT + 72, "font-size: 15px; fill: var(--ink)"
    panels = []
    for row, (axis, rows) in enumerate(_by_axis(results).items()):
        values = sorted({float(r["value"]) for r in rows})
        x = Axis(LABELS[axis], log=len(values) > 1, ticks=values)
        names = list(dict.fromkeys(str(r["line"]) for r in rows))

        def line(name: str, field: str, label: str, rows: list[Result] = rows, names: list[str] = names) -> Line:
            found = [(float(r["value"]), float(r[field])) for r in rows if r["line"] == name]
            return Line(f"{label}, {name}" if len(names) > 1 else label, found)

        speeds = [line(name, "tokens_per_second", "measured") for name in names]
        if rows[0]["simulated"]:
            speeds += [line(name, "ideal_tokens_per_second", "ideal") for name in names]
        waiting = "slept" if rows[0]["simulated"] else "compute"
        times = [
            line(name, field, label)
            for name in names
            for field, label in (("overhead_ms", "overhead"), ("compute_ms", waiting))
        ]
        for column, (y, lines) in enumerate(
            ((Axis("tokens/s", least=0), speeds), (Axis("ms a layer", least=0), times))
        ):
            title = f"{y.label} by {x.label}"
            inner = drawing(title, x, y, lines).removeprefix("<svg ")
            parts = [f'<g transform="translate({column * WIDTH} {row * row_height})">']
            parts.append(f'<text x="16" y="28" style="{caption}">{escape(title)}</text>')
            for index, each in enumerate(lines):
                left = 16 + 156 * index
                parts.append(f'<rect class="c{index % COLOURS}" x="{left}" y="43" width="14" height="3"/>')
                parts.append(f'<text x="{left + 20}" y="49" style="font-size: 11px">{escape(each.name)}</text>')
            parts.append(f'<svg y="56" width="{WIDTH}" height="{HEIGHT}" {inner}</g>')
            panels.append("".join(parts))
    width, height = 2 * WIDTH, row_height * len(_by_axis(results))
    style = f"{PALETTE}text {{ fill: var(--faint); font: 12px system-ui, sans-serif; }}{MARKS}"
    body = "\n".join(panels)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    return f'{head}\n<style>{style}</style>\n<rect width="100%" height="100%" fill="var(--paper)"/>\n{body}\n</svg>\n'


def choose(wanted: list[str]) -> list[Point]:
    """The points of `AXIS` or `AXIS=VALUE,VALUE`; of all axes, if nothing is wanted.

    Raises:
        ValueError: there is no such axis or value; the text lists those that there are.

    """
    all_points = points()
    chosen = []
    for text in wanted or LABELS:
        axis, _, given = text.partition("=")
        if axis not in LABELS:
            raise ValueError(f"{axis} is none of the axes: {', '.join(LABELS)}")
        of_axis = [p for p in all_points if p.axis == axis]
        known = {str(p.value) for p in of_axis}
        values = set(given.split(",")) if given else known
        if values - known:
            raise ValueError(f"{text}: the values of {axis} are {', '.join(sorted(known, key=int))}")
        chosen += [p for p in of_axis if str(p.value) in values]
    return chosen


def save(found: list[Result], folder: Path) -> None:
    """Put the results into the folder's files; what they have of other points stays."""
    data = folder / "growth.json"
    old = json.loads(data.read_text(encoding="utf-8"))["points"] if data.exists() else []
    results = merged(old, found)
    data.write_text(json.dumps({"machine": machine(), "points": results}, indent=1) + "\n", encoding="utf-8")
    (folder / "growth-tables.md").write_text(tables(results), encoding="utf-8")
    (folder / "growth.svg").write_text(svg(results), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("axis", nargs="*", help="AXIS or AXIS=VALUE,VALUE (default: all)")
    parser.add_argument("--output", type=Path, default=Path("growth"), help="folder for the results")
    parser.add_argument("--checkpoints", type=Path, help="keep the checkpoints here (default: they are made anew)")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    try:
        chosen = choose(arguments.axis)
    except ValueError as error:
        parser.error(str(error))
    arguments.output.mkdir(parents=True, exist_ok=True)

    def keep(found: list[Result]) -> None:
        save(found, arguments.output)

    with tempfile.TemporaryDirectory(prefix="openmoe-bench-") as temporary:
        uvloop.run(measure(chosen, arguments.rounds, arguments.checkpoints or Path(temporary), keep))


if __name__ == "__main__":
    main()
