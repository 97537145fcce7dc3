"""What `openmoe chaos` leaves: tables for a terminal or as Markdown, JSON, and the verdict.

The JSON object, all times in seconds: `command` (what was asked for), `machine`, `interrupted`, `undisturbed` and
`disturbed` (`seconds`, `requests`, `tokens_per_second`, `failed`, `wrong`, `waits`), `throughput_lost` (a share),
`strikes` (one object for each that was done: what was planned, whom it met, and its `wait` and `recovery`), `recovery`
(the rows of the second table), `left_out`, `unwell`, `leaks`, `failures` (texts and how often), `wrong_answers` and
`reasons` (why the run did not pass; empty if it did). `services.benchmark_figures` defines the quantiles.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from services.benchmark_report import machine
from services.chaos import Outcome
from services.chaos_fleet import Struck
from services.chaos_load import Asked
from services.chaos_schedule import ACTIONS, KINDS

SIGNALS = {"kill": "SIGKILL", "stop": "SIGSTOP"}
SHOWN_WRONG = 10
Window = tuple[float, float]


def tokens_per_second(asked: Sequence[Asked], window: Window) -> float:
    """Tokens that came within the window, for each second of it; a request's tokens are spread over its events."""
    start, end = window
    tokens = 0.0
    for each in asked:
        if each.times and each.tokens:
            inside = sum(start <= t < end for t in each.times)
            tokens += each.tokens * inside / len(each.times)
    return tokens / max(end - start, 1e-9)


def quantiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p95 and max by nearest rank; None where there are no values."""
    if not values:
        return {"p50": None, "p95": None, "max": None}
    ordered = sorted(values)

    def rank(share: float) -> float:
        return round(ordered[max(0, -(-int(share * 100) * len(ordered) // 100) - 1)], 3)

    return {"p50": rank(0.5), "p95": rank(0.95), "max": rank(1)}


def longest_waits(asked: Sequence[Asked], struck: Sequence[Struck], end: float) -> list[float]:
    """For each strike: the longest wait for a token of any stream between it and the next strike.

    A wait that lasts over several strikes counts for each of them.
    """
    if not struck:
        return []
    starts = [each.at for each in struck]
    found = [0.0] * len(struck)
    for each in asked:
        for begun, over in each.waits():
            first = max(0, bisect.bisect_right(starts, begun) - 1)
            for number in range(first, len(struck)):
                if starts[number] > over:
                    break
                until = starts[number + 1] if number + 1 < len(struck) else end
                if begun <= until and over >= starts[number]:
                    found[number] = max(found[number], over - begun)
    return found


def _part(asked: Sequence[Asked], window: Window) -> dict[str, Any]:
    waits = [over - begun for each in asked for begun, over in each.waits()]
    return {
        "seconds": round(window[1] - window[0], 1),
        "requests": len(asked),
        "tokens_per_second": round(tokens_per_second(asked, window), 1),
        "failed": sum(bool(each.failure) for each in asked),
        "wrong": sum(bool(each.wrong) for each in asked),
        "waits": quantiles(waits),
    }


def report(outcome: Outcome) -> dict[str, Any]:
    """All of it."""
    plan, start = outcome.plan, outcome.window[0]
    waits = longest_waits(outcome.asked, outcome.struck, outcome.window[1])
    strikes = []
    for each, wait in zip(outcome.struck, waits, strict=True):
        strikes.append(
            {
                **asdict(each.strike),
                "met": each.name,
                "done_at": round(each.at - start, 3),
                "postponed": round(each.postponed, 3),
                "wait": round(wait, 3),
                "recovery": None if each.ready is None else round(each.ready - each.at, 3),
            }
        )
    recovery = []
    for kind in KINDS:
        for action in ACTIONS:
            rows = [s for s in strikes if (s["kind"], s["action"]) == (kind, action)]
            if rows:
                came_back = [s["recovery"] for s in rows if s["recovery"] is not None]
                recovery.append(
                    {
                        "kind": kind,
                        "action": action,
                        "strikes": len(rows),
                        "wait": quantiles([s["wait"] for s in rows]),
                        "recovery": quantiles(came_back),
                    }
                )
    undisturbed, disturbed = (
        _part(outcome.baseline, outcome.baseline_window),
        _part(outcome.asked, outcome.window),
    )
    speed = undisturbed["tokens_per_second"]
    result = {
        "command": {**asdict(plan), "model": plan.model.name, "targets": list(plan.targets)},
        "machine": machine(),
        "interrupted": outcome.interrupted,
        "undisturbed": undisturbed,
        "disturbed": disturbed,
        "throughput_lost": round(1 - disturbed["tokens_per_second"] / speed, 4) if speed else None,
        "recovery": recovery,
        "strikes": strikes,
        "left_out": [asdict(strike) for strike in outcome.left_out],
        "unwell": outcome.unwell,
        "leaks": outcome.leaks,
        "failures": dict(Counter(a.failure for a in outcome.asked if a.failure).most_common()),
        "wrong_answers": [
            {"question": outcome.names[a.question], "at": round(a.sent - start, 3), "how": a.wrong}
            for a in [*outcome.baseline, *outcome.asked]
            if a.wrong
        ],
    }
    result["reasons"] = reasons(result)
    return result


def reasons(r: dict[str, Any]) -> list[str]:
    """Why the run did not pass; empty if it did."""
    found = []
    for name in ("undisturbed", "disturbed"):
        if r[name]["failed"]:
            found.append(f"{r[name]['failed']} requests failed, {name}")
        if r[name]["wrong"]:
            found.append(f"{r[name]['wrong']} answers were wrong, {name}")
    if not r["disturbed"]["requests"]:
        found.append("no request came back")
    if r["left_out"]:
        found.append(f"{len(r['left_out'])} strikes were left out: no peer was ready in time")
    found += [f"{name} did not recover" for name in r["unwell"]]
    return found + [f"left behind: {text}" for text in r["leaks"]]


Cells = list[list[str]]


def _seconds(values: dict[str, float | None]) -> list[str]:
    return ["-" if v is None else f"{v:.2f}" for v in values.values()]


def _rows(r: dict[str, Any]) -> list[tuple[str, list[str], Cells]]:
    """(title, heads, rows) of each table; the first column is text, all others numbers."""
    strikes = r["strikes"]
    load = []
    for name in ("undisturbed", "disturbed"):
        part = r[name]
        cells = [name, f"{part['seconds']:.0f}", str(part["requests"]), str(part["failed"]), str(part["wrong"])]
        lost = "-" if name == "undisturbed" or r["throughput_lost"] is None else f"{r['throughput_lost']:.1%}"
        load.append([*cells, f"{part['tokens_per_second']:.1f}", lost, *_seconds(part["waits"])])
    heads = ["load", "s", "requests", "failed", "wrong", "tokens/s", "lost", "wait p50", "p95", "max"]
    rows = [
        [
            f"{row['kind']}, {SIGNALS[row['action']]}",
            str(row["strikes"]),
            *_seconds(row["wait"]),
            *_seconds(row["recovery"]),
        ]
        for row in r["recovery"]
    ]
    title = f"{len(strikes)} strikes"
    others = sum(s["met"] is not None and s["postponed"] > 1 for s in strikes)
    title += f", {others} of them later than planned by more than 1 s" if others else ""
    recovery = ["struck", "times", "wait p50", "p95", "max", "ready p50", "p95", "max"]
    command = r["command"]
    what = f"{command['model']}, {command['streams']} streams, seed {command['seed']}"
    return [(what, heads, load), (title, recovery, rows)]


CAPTION = (
    "seconds; wait: for the next token of a stream, the first included, and by strike the longest of all streams up to "
    "the next strike; ready: from the signal until the process says again that it is ready"
)


def tables(r: dict[str, Any]) -> list[Table]:
    """For a terminal."""
    found = []
    for title, heads, rows in _rows(r):
        table = Table(title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for number, head in enumerate(heads):
            table.add_column(head, justify="right" if number else "left", no_wrap=number == 0)
        for row in rows:
            table.add_row(*row)
        found.append(table)
    found[-1].caption = CAPTION
    return found


def markdown(r: dict[str, Any]) -> str:
    """The same as Markdown."""
    parts = []
    for title, heads, rows in _rows(r):
        lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
        parts.append("\n".join([f"{title}:", "", *lines, *(f"| {' | '.join(row)} |" for row in rows)]))
    return "\n\n".join([*parts, f"({CAPTION}.)", *notes(r)]) + "\n"


def notes(r: dict[str, Any]) -> list[str]:
    """What the tables do not show: texts of failures, wrong answers, and why the run did not pass."""
    lines = [f"failed: {count} × {text}" for text, count in r["failures"].items()]
    wrong = r["wrong_answers"]
    lines += [f"wrong: {w['question']}, sent at {w['at']:.1f} s: {w['how']}" for w in wrong[:SHOWN_WRONG]]
    if len(wrong) > SHOWN_WRONG:
        lines.append(f"… and {len(wrong) - SHOWN_WRONG} more wrong answers, all in --json")
    return lines + [f"not passed: {reason}" for reason in r["reasons"]]
