"""The page's HTML: each section by itself, so that the live script exchanges only what has changed. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from services.monitor.page.charts import Series, Value, chart, heat_strip, shown, span
from services.monitor.page.view import Snapshot
from services.monitor.report import LayerReport
from services.monitor.timeline import Point

SECTIONS = ("banner", "headline", "alerts", "charts", "shards", "experts", "fleet", "decisions", "about")
MAX_ROWS = 200
"""Of the fleet's table, and of each table of shards."""
BUSIEST = 3
REFRESH_SECONDS = 10
"""Of the whole page, where scripts are off."""


@dataclass(frozen=True)
class Figure:
    """A chart with its caption; `svg` is empty if there is nothing to draw."""

    title: str
    unit: str
    length: str
    """Of its time axis, in words."""
    lines: tuple[tuple[int, str, Value], ...]
    """(colour, name, latest value)."""
    svg: Markup


@dataclass(frozen=True)
class Verdict:
    """The fleet in one word (ok, warn, bad, unknown) and one sentence."""

    level: str
    text: str


def verdict(s: Snapshot) -> Verdict:
    """How the fleet is."""
    if not s.connected:
        heard = " What follows is the last that was heard." if s.report else ""
        return Verdict("unknown", f"NATS at {s.nats_url} does not answer since {clock(s.since)}.{heard}")
    if s.report is None or not any(i.service != "monitor" for i in s.report.instances):
        return Verdict(
            "unknown", "Nobody but the monitor reports yet. Start the other services, or check their NATS_URL."
        )
    missing = [
        f"{shard.shard} of {d.deployment}"
        for d in s.report.deployments
        for shard in d.shards
        if shard.needed and not shard.ready
    ]
    if missing:
        return Verdict("bad", f"No worker serves shard {', '.join(missing[:3])}: requests wait for one, or fail.")
    for service in ("gateway", "router", "expert"):
        if not any(x.service == service and x.ready for x in s.report.services):
            return Verdict("bad", f"No {service} is ready: requests cannot be answered.")
    if s.firing:
        level = "bad" if any(alert.severity == "critical" for alert in s.firing) else "warn"
        kinds = ", ".join(sorted({words(alert.kind) for alert in s.firing})[:3])
        return Verdict(level, f"{_count(len(s.firing), 'alert', 'fires', 'fire')[:-1]}: {kinds}.")
    silent = [name for x in s.report.services for name in x.silent]
    if silent:
        return Verdict("warn", _count(len(silent), "instance", "has fallen silent", "have fallen silent"))
    return Verdict("ok", "Every shard is served, and no alert fires.")


def _count(number: int, noun: str, one: str, many: str) -> str:
    return f"{number} {noun} {one}." if number == 1 else f"{number} {noun}s {many}."


def figures(points: Sequence[Point], now: float) -> list[Figure]:
    """The charts of the last hour."""

    def made(title: str, unit: str, *lines: tuple[str, str]) -> Figure:
        series = [Series(name, [(p.time, getattr(p, field)) for p in points]) for name, field in lines]
        legend = tuple((colour, line.name, line.latest) for colour, line in enumerate(series))
        length = span([p.time for p in points], now)[2]
        return Figure(title, unit, length, legend, Markup(chart(title, unit, series, now)))  # noqa: S704 - charts.py escapes

    return [
        made("Output", "tokens/s", ("tokens/s", "tokens_per_second")),
        made("Requests", "per second", ("finished", "requests_per_second"), ("failed", "failures_per_second")),
        made(
            "Time to first token",
            "ms",
            ("p50", "first_token_p50_ms"),
            ("p95", "first_token_p95_ms"),
            ("p99", "first_token_p99_ms"),
        ),
        made("Time per token", "ms, p95", ("p95", "inter_token_p95_ms")),
        made("Whole answer", "ms, p95", ("p95", "end_to_end_p95_ms")),
        made("Requests at the gateways", "now", ("running", "running"), ("waiting", "waiting")),
        made("Ready", "instances", ("expert workers", "ready_experts"), ("routers", "ready_routers")),
    ]


def strip(layer: LayerReport) -> Markup:
    """The heat map's row of one MoE layer."""
    told = f"busiest {busiest(layer)}" if sum(layer.tokens) else "no tokens"
    return Markup(heat_strip(layer.tokens, f"MoE layer {layer.layer}: {told}"))  # noqa: S704 - charts.py escapes


def busiest(layer: LayerReport) -> str:
    """`5 (31 %), 2 (20 %)`: the experts with most tokens."""
    total = sum(layer.tokens)
    order = sorted(range(len(layer.tokens)), key=lambda expert: -layer.tokens[expert])[:BUSIEST]
    return ", ".join(f"{e} ({layer.tokens[e] / total:.0%})" for e in order if layer.tokens[e]) if total else "–"


def clock(seconds: float) -> str:
    """Unix seconds as a time of day in UTC."""
    return _date(seconds, "%H:%M:%S UTC")


def moment(seconds: float) -> str:
    """Unix seconds as a date and time in UTC."""
    return _date(seconds, "%Y-%m-%d %H:%M:%S")


def machine_time(seconds: float) -> str:
    """Unix seconds for the attribute `datetime`."""
    return _date(seconds, "%Y-%m-%dT%H:%M:%SZ")


def _date(seconds: float, form: str) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime(form)
    except (ValueError, OverflowError, OSError):  # where no calendar has it
        return "–"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}" if 0 < value < 0.1 else f"{value:.0%}"


def size(value: int | None) -> str:
    """Bytes, as MiB or GiB."""
    if value is None:
        return "–"
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def ago(seconds: float) -> str:
    """An age: `2 s`, `3 min`, `5 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h"


def words(name: str) -> str:
    """`scale_up` as words."""
    return name.replace("_", " ")


def dash(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    made = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    made.filters |= {
        "ago": ago,
        "busiest": busiest,
        "clock": clock,
        "dash": dash,
        "machine_time": machine_time,
        "moment": moment,
        "percent": percent,
        "shown": shown,
        "size": size,
        "strip": strip,
        "words": words,
    }
    return made


TEMPLATES = _environment()


def sections(s: Snapshot) -> dict[str, str]:
    """The HTML of each of SECTIONS."""
    values = {
        "s": s,
        "report": s.report,
        "verdict": verdict(s),
        "figures": figures(s.points, s.time),
        "max_rows": MAX_ROWS,
    }
    return {name: TEMPLATES.get_template(f"{name}.html").render(values) for name in SECTIONS}


def page(s: Snapshot) -> str:
    """The whole document."""
    made = {name: Markup(html) for name, html in sections(s).items()}  # noqa: S704 - escaped by the templates
    return TEMPLATES.get_template("page.html").render(
        sections=made, connected=s.connected, refresh_seconds=REFRESH_SECONDS, level=verdict(s).level
    )
