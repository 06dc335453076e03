"""Masks to learn inpainting from: what is to be drawn anew is 1, what stays is 0.

Five kinds, as often as `SHARES` says: rectangles, ellipses, strokes of a brush (boxes and strokes as in arXiv
2109.07161), the border round a rectangle (to draw on beyond a picture's edge), and all of the picture, which keeps the
network able to draw from words alone (a quarter of the masks, as Stable Diffusion's inpainting model was trained).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentgen.core.rand import Draw

SHARES = {"rectangles": 0.2, "ellipses": 0.15, "strokes": 0.25, "border": 0.15, "all": 0.25}
"""Kind -> share of the examples."""

NUMBERS = 48
"""Random numbers that a mask is a function of; no kind needs more."""

MOST = 4
"""Rectangles or ellipses of one mask, at most."""
TURNS = 3
"""Straight pieces of a stroke, at most."""

Numbers = NDArray[np.float64]
Grid = tuple[NDArray[np.float64], NDArray[np.float64]]


def draw_masks(draw: Draw, height: int, width: int) -> Tensor:
    """One mask for each example of the draw, `[b, 1, height, width]` float32, 0 or 1: a function of the seed, the step
    and the position in the global batch."""
    numbers = draw.uniform("mask", (NUMBERS,)).double().numpy()
    kinds = tuple(SHARES)
    ends = np.cumsum([SHARES[kind] for kind in kinds])
    masks = []
    for own in numbers:
        number = min(int(np.searchsorted(ends, own[0], side="right")), len(kinds) - 1)
        masks.append(mask_of(kinds[number], own[1:], height, width))
    return torch.from_numpy(np.stack(masks)[:, None].astype(np.float32))


def mask_of(kind: str, numbers: Numbers, height: int, width: int) -> NDArray[np.bool_]:
    """A mask `[height, width]` of one kind, true where to draw anew; never empty.

    Args:
        kind: a name of `SHARES`.
        numbers: at least `NUMBERS` - 1 of [0, 1).
    """
    y = (np.arange(height) + 0.5)[:, None] / height
    x = (np.arange(width) + 0.5)[None, :] / width
    return _KINDS[kind](numbers, (y, x))


def _rectangles(u: Numbers, grid: Grid) -> NDArray[np.bool_]:
    return _any(_box, u, grid)


def _ellipses(u: Numbers, grid: Grid) -> NDArray[np.bool_]:
    return _any(_ellipse, u, grid)


def _any(shape: Callable[[Numbers, Grid], NDArray[np.bool_]], u: Numbers, grid: Grid) -> NDArray[np.bool_]:
    """One to `MOST` shapes, the fewer the likelier."""
    count = 1 + int(MOST * u[0] ** 2)
    found = [shape(u[1 + 4 * i : 5 + 4 * i], grid) for i in range(count)]
    return np.logical_or.reduce(found)


def _sides(u: Numbers, least: float, most: float) -> tuple[float, float, float, float]:
    """Middle (y, x) and half sides (y, x) of a box inside the picture whose sides are shares of the picture's."""
    down, across = (least + (most - least) * u[k] for k in (0, 1))
    return down / 2 + (1 - down) * u[2], across / 2 + (1 - across) * u[3], down / 2, across / 2


def _box(u: Numbers, grid: Grid) -> NDArray[np.bool_]:
    middle_y, middle_x, half_y, half_x = _sides(u, 0.15, 0.7)
    return (np.abs(grid[0] - middle_y) <= half_y) & (np.abs(grid[1] - middle_x) <= half_x)


def _ellipse(u: Numbers, grid: Grid) -> NDArray[np.bool_]:
    middle_y, middle_x, half_y, half_x = _sides(u, 0.2, 0.8)
    return ((grid[0] - middle_y) / half_y) ** 2 + ((grid[1] - middle_x) / half_x) ** 2 <= 1


def _border(u: Numbers, grid: Grid) -> NDArray[np.bool_]:
    """All but a rectangle, which may touch the picture's edges, but not all four."""
    middle_y, middle_x, half_y, half_x = _sides(u, 0.3, 0.85)
    return (np.abs(grid[0] - middle_y) > half_y) | (np.abs(grid[1] - middle_x) > half_x)


def _strokes(u: Numbers, grid: Grid) -> NDArray[np.bool_]:
    """One to three strokes of one brush with round ends; each turns a few times."""
    count, radius = 1 + int(3 * u[0]), 0.045 + 0.06 * u[1]
    found = np.zeros((grid[0].shape[0], grid[1].shape[1]), dtype=bool)
    for i in range(count):
        own = u[2 + i * (4 + 2 * TURNS) :]
        turns = 1 + int(TURNS * own[0])
        at = 0.05 + 0.9 * own[1:3]
        heading = 2 * np.pi * own[3]
        for k in range(turns):
            heading += np.pi * (own[4 + 2 * k] - 0.5)
            length = 0.15 + 0.35 * own[5 + 2 * k]
            to = np.clip(at + length * np.array([np.sin(heading), np.cos(heading)]), 0.05, 0.95)
            found |= _near_line(grid, at, to, radius)
            at = to
    return found


def _near_line(grid: Grid, start: Numbers, end: Numbers, radius: float) -> NDArray[np.bool_]:
    """What lies within `radius` of the straight line between two points (y, x)."""
    along = end - start
    square = max(float(along @ along), 1e-12)
    share = np.clip(((grid[0] - start[0]) * along[0] + (grid[1] - start[1]) * along[1]) / square, 0, 1)
    away = (grid[0] - start[0] - share * along[0]) ** 2 + (grid[1] - start[1] - share * along[1]) ** 2
    return away <= radius**2


def _all(u: Numbers, grid: Grid) -> NDArray[np.bool_]:
    del u
    return np.ones((grid[0].shape[0], grid[1].shape[1]), dtype=bool)


_KINDS = {"rectangles": _rectangles, "ellipses": _ellipses, "strokes": _strokes, "border": _border, "all": _all}
