"""Shapes of pictures, and where in a picture what is shown of it lies."""

from __future__ import annotations

from typing import NamedTuple

Shape = tuple[int, int]
"""Height and width in pixels."""

Place = tuple[float, float]
"""Where a cut lies in what is left over: (0, 0) at the upper left, (1, 1) at the lower right."""

CENTRE: Place = (0.5, 0.5)


class Frame(NamedTuple):
    """Where a picture comes from, in pixels: what SDXL is told (arXiv 2307.01952, section 2.2).

    Attributes:
        original: height and width of the picture as it was, upright, before scaling.
        corner: top and left of the cut in the scaled picture.
    """

    original: Shape
    corner: tuple[int, int]
