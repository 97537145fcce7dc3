"""report.html: one file with everything in it, without scripts and without anything from a network."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

from services.benchmark_plots import Axis, Line, Point, plot

Report = dict[str, Any]
RowData = dict[str, Any]
KINDS = (("time_to_first_token", "time to first token"), ("latency", "end-to-end latency"))
PALETTE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --faint: #667; --rule: #d9dde3; --bad: #b3261e;
  --c0: #1f6fb4; --c1: #d1591c; --c2: #23855a; --c3: #8a4fbf; --c4: #b8860b; --c5: #c2387f; --c6: #3a8f9e;
  --c7: #6b7280; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e6e8eb; --faint: #9aa3ad; --rule: #30363d;
  --bad: #ff8a80; --c0: #6cb2f2; --c1: #ff9e64; --c2: #63cf9d; --c3: #c39bf0; --c4: #e5c158; --c5: #f58ac0;
  --c6: #6fd0df; --c7: #a8b0ba; } }
"""
MARKS = """
.grid { stroke: var(--rule); } path.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
""" + "".join(
    f".line.c{n} {{ stroke: var(--c{n}); }} .c{n} {{ fill: var(--c{n}); background: var(--c{n}); }}\n" for n in range(8)
)
"""Of the lines and dots that services/benchmark_plots.py draws."""
PAGE = """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1360px; padding: 24px 16px 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 18px; margin: 36px 0 8px; } p { margin: 4px 0; }
.faint, figcaption, th { color: var(--faint); } .bad { color: var(--bad); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 9px; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { font-weight: 500; vertical-align: bottom; } .group { text-align: center; }
th[rowspan]:first-child, td:first-child { text-align: left; padding-left: 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 20px; margin: 0; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 24px; }
figure { margin: 0; } svg { width: 100%; height: auto; } svg text { fill: var(--faint); font-size: 12px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px; }
.legend span { display: inline-flex; align-items: center; gap: 6px; } .legend i { width: 14px; height: 3px; }
"""
STYLE = PALETTE + PAGE + MARKS


def html(report: Report) -> str:
    """The page of a report (as services/benchmark_report.py has it)."""
    rows = report["rows"]
    title = f"{report['server']['model']}: {report['command']['shape']}"
    generates = report["command"]["shape"] != "forward"
    stopped = '<p class="bad">The run was interrupted: rows are missing.</p>' if report["interrupted"] else ""
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="faint">openmoe bench, {escape(report["date"])}, {escape(report["command"]["url"])}</p>',
        stopped,
        f"<h2>Figures</h2>{_table(rows, generates=generates)}{_failures(rows)}",
        f'<h2>Load</h2><div class="plots">{_by_load(rows, generates=generates)}</div>',
        f'<h2>Distributions</h2><div class="plots">{_curves(rows)}</div>',
        f'<h2>Inter-token latency over time</h2><div class="plots">{_over_time(rows)}</div>' if generates else "",
        f"<h2>Settings</h2>{_facts(report['command'])}",
        f"<h2>Server</h2>{_facts(report['server'])}",
        f"<h2>Machine of the load generator</h2>{_facts(report['machine'])}",
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>{escape(title)}</title><style>{STYLE}</style></head>\n'
        f"<body>\n{chr(10).join(sections)}\n</body></html>\n"
    )


def _ms(value: float | None) -> str:
    if value is None:
        return "–"
    ms = value * 1000
    return f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


def _table(rows: list[RowData], *, generates: bool) -> str:
    kinds = [("first token", "time_to_first_token"), ("inter-token", "inter_token_latency")] if generates else []
    kinds.append(("latency", "latency"))
    heads = ["load", "done", "failed", "requests/s", *(["output tokens/s"] if generates else []), "input tokens/s"]
    head = "".join(f'<th rowspan="2">{name}</th>' for name in heads)
    head += "".join(f'<th class="group" colspan="4">{name}, ms</th>' for name, _ in kinds)
    quantiles = "".join(f"<th>{q}</th>" for _ in kinds for q in ("p50", "p95", "p99", "max"))
    lines = []
    for row in rows:
        failed = f'<span class="bad">{row["failed"]}</span>' if row["failed"] else "0"
        cells = [escape(row["name"]), str(row["done"]), failed, f"{row['requests_per_second']:.2f}"]
        cells += [f"{row['output_tokens_per_second']:.1f}"] if generates else []
        cells += [f"{row['input_tokens_per_second']:.1f}"]
        for _, kind in kinds:
            cells += [_ms((row[kind] or {}).get(q)) for q in ("p50", "p95", "p99", "max")]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = f"<thead><tr>{head}</tr><tr>{quantiles}</tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>{"".join(lines)}</tbody></table></div>'


def _failures(rows: list[RowData]) -> str:
    lines = []
    for row in rows:
        for reason, count in row["failures"].items():
            said = f": {row['examples'][reason]}" if reason in row["examples"] else ""
            told = f"{row['name']}: {count} failed: {reason}{said}"
            lines.append(f'<p class="bad">{escape(told)}</p>')
    return "".join(lines)


def _by_load(rows: list[RowData], *, generates: bool) -> str:
    parts = []
    for mode, label in (("closed", "streams at once"), ("open", "requests due per second")):
        chosen = sorted((row for row in rows if row["mode"] == mode), key=lambda row: float(row["load"]))
        if not chosen:
            continue
        loads = sorted({float(row["load"]) for row in chosen})
        x = Axis(label, log=len(loads) > 1, ticks=loads)

        def line(name: str, value: Callable[[RowData], float | None], chosen: list[RowData] = chosen) -> Line:
            found = ((row["load"], value(row)) for row in chosen)
            return Line(name, [(load, v) for load, v in found if v is not None])

        if generates:
            made = line("output tokens/s", lambda row: row["output_tokens_per_second"])
            parts.append(plot(f"Throughput by {label}", x, Axis("tokens/s", least=0), [made]))
        else:
            made = line("requests/s", lambda row: row["requests_per_second"])
            parts.append(plot(f"Throughput by {label}", x, Axis("requests/s", least=0), [made]))
        kinds = [*KINDS, ("inter_token_latency", "inter-token latency")] if generates else list(KINDS[1:])
        for kind, name in kinds:
            lines = [
                line(q, lambda row, kind=kind, q=q: row[kind][q] * 1000 if row[kind] else None)  # type: ignore[misc]
                for q in ("p50", "p95", "p99")
            ]
            parts.append(plot(f"{name.capitalize()} by {label}", x, Axis("ms", least=0), lines))
    return "".join(parts)


def _curves(rows: list[RowData]) -> str:
    parts = []
    for kind, name in (*KINDS, ("inter_token_latency", "inter-token latency")):
        lines = []
        for row in rows:
            curve = row[kind]["curve"] if row[kind] else []
            points: list[Point] = [(v * 1000, step / (len(curve) - 1)) for step, v in enumerate(curve)]
            lines.append(Line(row["name"], points, dots=False))
        share = Axis("share of requests" if kind != "inter_token_latency" else "share of tokens", least=0)
        parts.append(plot(f"{name.capitalize()}: share that took at most so long", Axis("ms", log=True), share, lines))
    return "".join(parts)


def _over_time(rows: list[RowData]) -> str:
    parts = []
    for row in rows:
        lines = [
            Line(q, [(b["at"], b[q] * 1000) for b in row["over_time"] if b[q] is not None], dots=False)
            for q in ("p50", "p99", "max")
        ]
        parts.append(plot(row["name"], Axis("seconds since the start", least=0), Axis("ms", least=0), lines))
    return "".join(parts)


def _facts(facts: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(f"{each:g}" if isinstance(each, float) else str(each) for each in value) or "–"
        return "–" if value is None else str(value)

    pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(shown(value))}</dd>" for name, value in facts.items())
    return f"<dl>{pairs}</dl>"
