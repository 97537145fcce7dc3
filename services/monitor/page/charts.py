"""Charts of the last hour and the experts' heat map, as SVG in plain text; colours come from the style sheet. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from services.benchmark_plots import nice_ticks, number
from services.monitor.timeline import STEP_SECONDS

WIDTH, HEIGHT = 320, 150
LEFT, RIGHT, TOP, BOTTOM = 42, 8, 8, 22
SPANS = ((300, 60, "5 minutes"), (900, 300, "15 minutes"), (3600, 900, "hour"))
"""(seconds, seconds between labels, in words)."""
GAP_SECONDS = 2.5 * STEP_SECONDS
"""Points further apart are not joined."""

Value = float | int | None
HEAT = (0.25, 0.5, 0.75, 1.25, 1.5, 2.0, 3.0)
"""Tokens over the layer's mean: the bounds of the classes h1 to h8; h0 is no token at all."""


@dataclass(frozen=True)
class Series:
    """One line: (Unix seconds, value), the oldest first; None is a gap."""

    name: str
    points: Sequence[tuple[float, Value]]

    @property
    def latest(self) -> Value:
        return self.points[-1][1] if self.points else None


def span(times: Sequence[float], now: float) -> tuple[int, int, str]:
    """The shortest of SPANS that shows all `times`."""
    oldest = now - min(times, default=now)
    return next((each for each in SPANS if oldest <= each[0]), SPANS[-1])


def chart(title: str, unit: str, series: Sequence[Series], now: float) -> str:
    """An svg element: time to `now` on the x axis, from zero on the y axis; empty text if there is nothing to draw."""
    values = [value for line in series for _, value in line.points if value is not None]
    if not values:
        return ""
    seconds, step, words = span([at for line in series for at, _ in line.points], now)
    ticks = nice_ticks(0, max([*values, 1e-9]), 3)
    top = ticks[-1] if ticks[-1] >= max(values) and len(ticks) > 1 else ticks[-1] + (ticks[1] if len(ticks) > 1 else 1)
    if top > ticks[-1]:
        ticks.append(top)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def across(at: float) -> float:
        return right - (now - at) / seconds * (right - LEFT)

    def up(value: float) -> float:
        return bottom - value / top * (bottom - TOP)

    latest = ", ".join(f"{line.name} {shown(line.latest)}" for line in series)
    label = escape(f"{title} in the last {words}, {unit}; now: {latest}")
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">']
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {up(tick):.1f}H{right}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for ago in range(0, seconds + 1, step):
        anchor = "end" if not ago else "middle"
        told = "now" if not ago else f"−{ago // 60}" + (" min" if ago == seconds else "")
        parts.append(f'<text x="{across(now - ago):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{told}</text>')
    for index, line in enumerate(series):
        for run in runs([(at, value) for at, value in line.points if at >= now - seconds]):
            drawn = [f"{across(at):.1f} {up(value):.1f}" for at, value in run]
            if len(drawn) == 1:
                x, y = drawn[0].split()
                parts.append(f'<circle class="c{index}" cx="{x}" cy="{y}" r="2"/>')
            else:
                parts.append(f'<path class="line c{index}" d="M{"L".join(drawn)}"/>')
    return "".join([*parts, "</svg>"])


def runs(points: Sequence[tuple[float, Value]]) -> list[list[tuple[float, float]]]:
    """`points` cut where one is unknown, or where the next is too far away to be joined."""
    found: list[list[tuple[float, float]]] = []
    last: float | None = None
    for at, value in points:
        if value is None:
            last = None
            continue
        if last is None or at - last > GAP_SECONDS:
            found.append([])
        found[-1].append((at, float(value)))
        last = at
    return found


def shown(value: Value) -> str:
    """A number as short as it can be read; a dash if it is unknown."""
    if value is None:
        return "–"
    return number(float(f"{value:.3g}") if abs(value) < 1000 else value)


def heat_class(count: int, mean: float) -> int:
    """0 of nothing, else 1 to 8 by how the count compares with the mean."""
    if not count:
        return 0
    return 1 + sum(count / mean >= bound for bound in HEAT)


def heat_strip(tokens: Sequence[int], label: str) -> str:
    """One MoE layer's experts as cells, from left to right."""
    mean = sum(tokens) / len(tokens) if tokens else 0.0
    cells: dict[int, list[str]] = {}
    for expert, count in enumerate(tokens):
        cells.setdefault(heat_class(count, mean), []).append(f"M{expert} 0h1v1h-1z")
    paths = "".join(f'<path class="h{level}" d="{"".join(cell)}"/>' for level, cell in sorted(cells.items()))
    size = f'viewBox="0 0 {max(1, len(tokens))} 1" preserveAspectRatio="none"'
    return f'<svg class="strip" {size} role="img" aria-label="{escape(label)}">{paths}</svg>'
