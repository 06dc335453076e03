"""The sizes of the training pictures, and the shapes that they were given: a chart of `sizes.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentgen.evals.run_report.curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, frame, told
from latentgen.evals.run_report.read import lookup

STYLES = 8
"""Colours of the page."""


@dataclass(frozen=True)
class Shapes:
    """What `sizes.json` says.

    Args:
        pictures: (height, width, how many, number of their shape).
        shapes: (height, width, how many).
        cut_off: share of the pictures' area.
    """

    pictures: list[tuple[int, int, int, int]]
    shapes: list[tuple[int, int, int]]
    cut_off: float


def read_sizes(document: Any) -> Shapes | None:
    """The sizes of a run; None where there is no such file, or another one."""
    try:
        pictures = [(int(h), int(w), int(n), int(shape)) for h, w, n, shape in lookup(document, "pictures")]
        shapes = [(int(h), int(w), int(n)) for h, w, n in lookup(document, "shapes")]
        cut_off = float(lookup(document, "cut_off"))
    except (TypeError, ValueError):
        return None
    sound = all(min(picture[:3]) > 0 and 0 <= picture[3] < len(shapes) for picture in pictures)
    return Shapes(pictures, shapes, cut_off) if pictures and sound and min(map(min, shapes)) > 0 else None


def sizes_card(found: Shapes) -> str:
    """A dot for each size, as large as there are pictures of it; a ray for each shape, on which lie the sizes of which
    nothing is cut off."""
    keys = "".join(
        f'<li><span class="key {_style(number)}"></span>{width} x {height} <b>{count:,}</b></li>'
        for number, (height, width, count) in enumerate(found.shapes)
    )
    said = f"{len(found.pictures)} sizes of pictures, {len(found.shapes)} shapes in training"
    return (
        f'<section class="card"><h3>Sizes of pictures, width and height in pixels</h3><ul class="legend">{keys}</ul>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}">{"".join(_drawn(found))}</svg>'
        f'<p class="soft">Lines and colours are the shapes that training sees; {told(100 * found.cut_off)}% of the '
        "pictures' area is cut off.</p></section>"
    )


def _style(number: int) -> str:
    return f"c{number % STYLES + 1}"


def _drawn(found: Shapes) -> list[str]:
    x = Axis(0, 1.05 * max(width for _, width, _, _ in found.pictures), LEFT, WIDTH - RIGHT)
    y = Axis(0, 1.05 * max(height for height, _, _, _ in found.pictures), HEIGHT - BOTTOM, TOP)
    parts = frame(x, y)
    for number, (height, width, _) in enumerate(found.shapes):
        reach = min(x.high / width, y.high / height)
        parts.append(
            f'<path class="bar {_style(number)}" d="M{x.at(0):.1f} {y.at(0):.1f}'
            f'L{x.at(reach * width):.1f} {y.at(reach * height):.1f}"/>'
        )
    most = max(count for _, _, count, _ in found.pictures)
    for height, width, count, shape in found.pictures:
        radius = 1.5 + 4.5 * math.sqrt(count / most)
        parts.append(
            f'<circle class="dot {_style(shape)}" cx="{x.at(width):.1f}" cy="{y.at(height):.1f}" r="{radius:.1f}" '
            'fill-opacity=".6"/>'
        )
    return parts


def sizes_section(document: Mapping[str, Any] | None) -> str:
    """The part of the page; "" where the run has no `sizes.json`."""
    found = read_sizes(document)
    if found is None:
        return ""
    return f'<section id="sizes"><h2>Pictures</h2><div class="charts">{sizes_card(found)}</div></section>'
