"""Curves as inline SVG: no library, no network; the colours and the letters are the page's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from latentgen.evals.run_report.read import Series

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 28
POINTS = 300
"""Points drawn of a curve at most: more than the screen has room for."""


@dataclass(frozen=True)
class Line:
    """One curve of a chart.

    Args:
        style: a class of the page: `c1` to `c8`.
        smooth: draw the points faintly and their moving mean over them.
        marks: draw a dot at each point (for curves with few).
        spread: standard error at each point.
    """

    label: str
    series: Series
    style: str = "c1"
    smooth: bool = False
    marks: bool = False
    spread: Sequence[float] | None = None


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high`, linear or logarithmic, over pixels `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        share = ((math.log10(max(value, 1e-300)) if self.log else value) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values to write beside the axis."""
        if self.log:
            powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            every = max(1, len(powers) // 5)
            marks = [10.0**power for power in powers][::every]
            if len(marks) >= 2:
                return marks
            fine = [k * 10.0**p for p in range(-12, 13) for k in (1, 2, 5) if self.low <= k * 10.0**p <= self.high]
            return fine if len(fine) >= 2 else [self.low, self.high]
        return nice_ticks(self.low, self.high)


def nice_ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high], about `wanted` of them."""
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(k * power for k in (1, 2, 5, 10) if k * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def told(value: float) -> str:
    """A number as a reader wants it: three or four digits."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        return f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}" if size < 1e4 else f"{value:,.0f}"


def tick_told(value: float) -> str:
    """A number beside an axis, as short as can be."""
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value / 1000:g}k" if abs(value) >= 10000 else f"{value:.4g}"


def thinned(series: Series, points: int = POINTS) -> Series:
    """At most `points` points: means of equal runs of the original ones, at the last step of each."""
    count = len(series.steps)
    if count <= points:
        return series
    edges = [round(k * count / points) for k in range(points + 1)]
    runs = list(itertools.pairwise(edges))
    return Series([series.steps[b - 1] for _, b in runs], [sum(series.values[a:b]) / (b - a) for a, b in runs])


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean over a window of about a twenty-fifth of the points, centred; narrower at the ends."""
    half = max(1, len(values) // 50)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    result = []
    for k in range(len(values)):
        reach = min(half, k, len(values) - 1 - k)
        result.append((sums[k + reach + 1] - sums[k - reach]) / (2 * reach + 1))
    return result


def value_axis(lines: Sequence[Line], *, linear: bool = False) -> Axis:
    """What the curves span. A few wild points, as at the start of training, may stick out of the picture.

    Where most of many values span more than an order of magnitude the axis is logarithmic, unless it must be `linear`.
    """
    values = sorted(v for line in lines for v in _reached(line))
    log = not linear and len(values) >= 20 and values[0] > 0
    log = log and values[-1] / values[0] > 50 and _percentile(values, 0.95) / _percentile(values, 0.05) > 20
    low, high = values[0], values[-1]
    inner_low, inner_high = _percentile(values, 0.02), _percentile(values, 0.98)
    if not log and inner_high > inner_low and high - low > 3 * (inner_high - inner_low):
        last = [line.series.values[-1] for line in lines]
        low, high = min(inner_low, *last), max(inner_high, *last)
    if high <= low:
        room = abs(high) * 0.1 or 1.0
        low, high = low - room, high + room
    elif not log:
        room = 0.06 * (high - low)
        low, high = (0.0 if 0 <= low < 0.3 * high else low - room), high + room
    return Axis(low, high, HEIGHT - BOTTOM, TOP, log)


def _reached(line: Line) -> list[float]:
    """The values of a curve, and the ends of its error bars."""
    values = line.series.values
    if line.spread is None:
        return values
    bars = zip(values, line.spread, strict=True)
    return values + [value + sign * error for value, error in bars for sign in (-1, 1)]


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[round(share * (len(ordered) - 1))]


def chart(title: str, lines: Sequence[Line], *, name: str, last_step: int | None = None, linear: bool = False) -> str:
    """An SVG of curves over steps.

    Args:
        lines: at least one, none of them empty.
        name: unique on the page, of letters, digits and hyphens.
        last_step: where the step axis ends; the last measured step when not given.
        linear: never a logarithmic axis of values.
    """
    assert lines
    lines = [replace(line, series=thinned(line.series)) for line in lines]
    last = max(max(line.series.steps[-1] for line in lines), last_step or 0, 1)
    x = Axis(0, last, LEFT, WIDTH - RIGHT)
    y = value_axis(lines, linear=linear)
    said = "; ".join(
        f"{line.label} from {told(line.series.values[0])} at step {line.series.steps[0]} "
        f"to {told(line.series.values[-1])} at step {line.series.steps[-1]}"
        for line in lines
    )
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}: {escape(said)}" '
        f'data-x="{x.low} {x.high} {x.start} {x.end}" data-y="{y.low!r} {y.high!r} {y.start} {y.end} {int(y.log)}">',
        f'<clipPath id="{name}"><rect x="{LEFT}" y="{TOP - 3}" width="{WIDTH - LEFT - RIGHT + 3}" '
        f'height="{HEIGHT - TOP - BOTTOM + 6}"/></clipPath>',
        *frame(x, y),
        f'<g clip-path="url(#{name})">',
        *(part for line in lines for part in _curve(line, x, y)),
        '</g><line class="cursor" y1="0" y2="0"/></svg>',
    ]
    return "".join(parts)


def frame(x: Axis, y: Axis) -> list[str]:
    """Rules and numbers of both axes."""
    parts = []
    for value in y.ticks():
        at = f"{y.at(value):.1f}"
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{at}" dy=".35em" text-anchor="end">{tick_told(value)}</text>'
        )
    ticks = nice_ticks(x.low, x.high)
    for step in ticks:
        anchor = "start" if step == 0 else "end" if x.at(step) > WIDTH - RIGHT - 12 else "middle"
        word = f"{step / 1000:g}k" if ticks[-1] >= 10000 and step else f"{step:g}"
        parts.append(f'<text class="tick" x="{x.at(step):.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">{word}</text>')
    return parts


def _curve(line: Line, x: Axis, y: Axis) -> list[str]:
    at = [x.at(step) for step in line.series.steps]
    parts = []
    shown = line.series.values
    if line.smooth and len(shown) > 8:
        parts.append(f'<polyline class="raw {line.style}" points="{_points(at, shown, y)}"/>')
        shown = smoothed(shown)
    for k, error in enumerate(line.spread or ()):
        low, high = y.at(shown[k] - error), y.at(shown[k] + error)
        parts.append(f'<path class="bar {line.style}" d="M{at[k]:.1f} {low:.1f}V{high:.1f}"/>')
    parts.append(
        f'<polyline class="line {line.style}" data-name="{escape(line.label)}" points="{_points(at, shown, y)}"/>'
    )
    if line.marks or len(shown) == 1:
        parts += [
            f'<circle class="dot {line.style}" cx="{a:.1f}" cy="{y.at(v):.1f}" r="3"/>'
            for a, v in zip(at, shown, strict=True)
        ]
    return parts


def _points(at: Sequence[float], values: Sequence[float], y: Axis) -> str:
    return " ".join(f"{a:.1f},{min(max(y.at(v), -999.0), 999.0):.1f}" for a, v in zip(at, values, strict=True))
