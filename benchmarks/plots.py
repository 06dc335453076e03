"""Line charts drawn with pillow, so that figures need no further library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from latentgen.pipelines.pictures import save_png

COLOURS = ("#c0392b", "#1f6fb2", "#1e8449", "#8e44ad", "#b9770e", "#17807e", "#5d6d7e", "#a0307a", "#6b4f2a", "#2c3e50")
SCALE = 2
"""Drawn at twice the size and reduced, which smooths the lines."""


@dataclass(frozen=True)
class Line:
    """One curve; a strong one is drawn thick."""

    title: str
    points: Sequence[tuple[float, float]]
    strong: bool = False


@dataclass(frozen=True)
class Axis:
    """From values to pixels, in a line or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def at(self, value: float) -> float:
        f: Callable[[float], float] = math.log if self.log else float
        return self.start + (f(value) - f(self.low)) / (f(self.high) - f(self.low)) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Powers of ten, with 2 and 5 where they are few; round numbers on a straight axis."""
        if not self.log:
            step = 10 ** math.floor(math.log10((self.high - self.low) / 2))
            step *= next(s for s in (1, 2, 5, 10) if (self.high - self.low) / (step * s) <= 8)
            first = math.ceil(self.low / step - 1e-9)
            return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        factors = (1, 2, 5) if len(powers) <= 4 else (1,)
        found = [m * 10.0**k for k in powers for m in factors]
        return [value for value in found if self.low * 0.999 <= value <= self.high * 1.001]


def line_chart(
    path: Path, title: str, x_label: str, y_label: str, lines: Sequence[Line], *, log: bool = False, log_x: bool = False
) -> None:
    """Write a PNG of 760x440 pixels. log, log_x: the axes by logarithm."""
    save_png(draw_chart(title, x_label, y_label, lines, log=log, log_x=log_x), path)


def draw_chart(
    title: str,
    x_label: str,
    y_label: str,
    lines: Sequence[Line],
    *,
    log: bool = False,
    log_x: bool = False,
    size: tuple[int, int] = (760, 440),
) -> Image.Image:
    width, height = (SCALE * side for side in size)
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12 * SCALE)
    xs, ys = ([p[i] for line in lines for p in line.points] for i in (0, 1))
    legend = max(pen.textlength(line.title, font=font) for line in lines) + 40 * SCALE
    across = Axis(min(xs), max(xs), 62 * SCALE, width - legend - 14 * SCALE, log_x)
    low, high = min(ys), max(ys)
    margin = (high / low) ** 0.04 if log else 0.04 * (high - low)
    up = Axis(low / margin if log else low - margin, high * margin if log else high + margin, height - 46 * SCALE,
              30 * SCALE, log)  # fmt: skip
    _frame(pen, font, across, up, x_label, y_label, title)
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        dots = [(across.at(x), up.at(y)) for x, y in line.points]
        pen.line(dots, fill=colour, width=(4 if line.strong else 2) * SCALE, joint="curve")
        if len(dots) <= 12:
            for x, y in dots:
                pen.circle((x, y), (4 if line.strong else 3) * SCALE, fill=colour)
        top, left = (34 + 20 * number) * SCALE, across.end + 12 * SCALE
        pen.line([(left, top + 8 * SCALE), (left + 18 * SCALE, top + 8 * SCALE)], fill=colour, width=3 * SCALE)
        pen.text((left + 24 * SCALE, top), line.title, fill="black", font=font)
    return sheet.resize(size, Image.Resampling.LANCZOS)


def _frame(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    across: Axis,
    up: Axis,
    x_label: str,
    y_label: str,
    title: str,
) -> None:
    for value in up.ticks():
        pen.line([(across.start, up.at(value)), (across.end, up.at(value))], fill="#dddddd", width=SCALE)
        pen.text((across.start - 6 * SCALE, up.at(value)), f"{value:g}", fill="black", font=font, anchor="rm")
    for value in across.ticks():
        pen.line([(across.at(value), up.start), (across.at(value), up.end)], fill="#eeeeee", width=SCALE)
        pen.text((across.at(value), up.start + 6 * SCALE), f"{value:g}", fill="black", font=font, anchor="mt")
    pen.rectangle([across.start, up.end, across.end, up.start], outline="#888888", width=SCALE)
    pen.text(((across.start + across.end) / 2, up.start + 26 * SCALE), x_label, fill="black", font=font, anchor="mt")
    pen.text((8 * SCALE, up.end - 8 * SCALE), y_label, fill="black", font=font, anchor="lb")
    pen.text(((across.start + across.end) / 2, up.end - 8 * SCALE), title, fill="black", font=font, anchor="mb")
