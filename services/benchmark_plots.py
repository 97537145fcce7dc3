"""Plots as SVG in plain text: no library, no script; colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 44
TICKS = 5
COLOURS = 8
"""Classes c0 to c7 of the style sheet."""
Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a plot."""

    name: str
    points: Sequence[Point]
    dots: bool = True


@dataclass(frozen=True)
class Axis:
    """One axis; `log` only for values above 0."""

    label: str
    log: bool = False
    least: float | None = None
    """Where it begins at the latest; None: at the least value."""
    ticks: Sequence[float] | None = None
    """Where it is labelled; None: at round numbers."""


def nice_ticks(low: float, high: float, count: int = TICKS) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) from `low` to `high`, which they do not pass."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between `low` and `high`, with 2 and 5 times them if there is room; or round numbers."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1, 2, 5), (1,)):
        ticks = [m * 10.0**d for d in decades for m in multiples if low <= m * 10.0**d <= high]
        if len(ticks) <= 2 * TICKS:
            break
    return ticks if len(ticks) > 2 else nice_ticks(low, high)


def number(value: float) -> str:
    """As short as it can be read: 0.05, 7.5, 1200, 2.5M."""
    if value and abs(value) < 0.001:
        return f"{value:.1e}"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def _scale(axis: Axis, values: list[float], start: float, end: float) -> tuple[Callable[[float], float], list[float]]:
    """(value to pixel, ticks)."""
    low, high = min(values), max(values)
    if axis.least is not None:
        low = min(low, axis.least)
    if axis.log:
        high = high if high > low else low * 2
        span = math.log(high) - math.log(low)
        marks = list(axis.ticks or log_ticks(low, high))
        return lambda v: start + (math.log(max(v, low)) - math.log(low)) / span * (end - start), marks
    high = high if high > low else low + (abs(low) or 1)
    ticks = list(axis.ticks or nice_ticks(low, high))
    if axis.ticks is None and len(ticks) > 1 and ticks[-1] < high and axis.least is not None:
        high = ticks[-1] + ticks[1] - ticks[0]  # the topmost value stays below the topmost tick
        ticks.append(high)
    return lambda v: start + (v - low) / (high - low) * (end - start), ticks


def _kept(x: Axis, y: Axis, lines: Sequence[Line]) -> list[Line]:
    """The lines without what cannot be drawn."""

    def drawn(points: Sequence[Point]) -> list[Point]:
        kept = (p for p in points if math.isfinite(p[0]) and math.isfinite(p[1]))
        return [p for p in kept if (not x.log or p[0] > 0) and (not y.log or p[1] > 0)]

    return [Line(line.name, drawn(line.points), line.dots) for line in lines]


def drawing(title: str, x: Axis, y: Axis, lines: Sequence[Line]) -> str:
    """The plot itself, an svg element of WIDTH × HEIGHT without a legend; empty text if there is no point to draw.

    On a logarithmic axis points at or below 0 are left out.
    """
    kept = _kept(x, y, lines)
    points = [p for line in kept for p in line.points]
    if not points:
        return ""
    across, x_ticks = _scale(x, [p[0] for p in points], LEFT, WIDTH - RIGHT)
    up, y_ticks = _scale(y, [p[1] for p in points], HEIGHT - BOTTOM, TOP)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in y_ticks:
        at = up(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{right}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_ticks:
        at = across(tick)
        parts.append(f'<path class="grid" d="M{at:.1f} {TOP}V{bottom}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{number(tick)}</text>')
    middle, centre = (LEFT + right) / 2, (TOP + bottom) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x.label)}</text>')
    turned = f'transform="rotate(-90 14 {centre})"'
    parts.append(f'<text x="14" y="{centre}" text-anchor="middle" {turned}>{escape(y.label)}</text>')
    for index, line in enumerate(kept):
        colour = f"c{index % COLOURS}"
        path = "L".join(f"{across(px):.1f} {up(py):.1f}" for px, py in line.points)
        if len(line.points) > 1:
            parts.append(f'<path class="line {colour}" d="M{path}"/>')
        for px, py in line.points if line.dots or len(line.points) == 1 else ():
            told = escape(f"{line.name}: {number(px)}, {number(py)}")
            dot = f'<circle class="{colour}" cx="{across(px):.1f}" cy="{up(py):.1f}" r="3.5">'
            parts.append(f"{dot}<title>{told}</title></circle>")
    parts.append("</svg>")
    return "".join(parts)


def plot(title: str, x: Axis, y: Axis, lines: Sequence[Line]) -> str:
    """`drawing` as a figure with its caption and legend; empty text if there is no point to draw."""
    drawn = drawing(title, x, y, lines)
    if not drawn:
        return ""
    names = "".join(
        f'<span><i class="c{index % COLOURS}"></i>{escape(line.name)}</span>'
        for index, line in enumerate(_kept(x, y, lines))
        if line.points
    )
    return f'<figure><figcaption>{escape(title)}</figcaption>{drawn}<p class="legend">{names}</p></figure>'
