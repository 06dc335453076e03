"""The edges of a picture, by Canny's method (A Computational Approach to Edge Detection, 1986), in numpy.

Thresholds and the measure of steepness are those of `cv2.Canny(picture, 100, 200)`, which the best known ControlNets of
this kind were trained on; nothing is smoothed beforehand.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LOW, HIGH = 100, 200
"""An edge is steeper than `LOW` all along, and somewhere steeper than `HIGH`: |dx| + |dy| of Sobel's filters."""

_TAN = 0.4142135623730951  # of 22.5 degrees


def edges(picture: NDArray[np.uint8], low: int = LOW, high: int = HIGH) -> NDArray[np.uint8]:
    """White lines on black.

    Args:
        picture: uint8 `[h, w, 3]`.
        low, high: see `LOW`, `HIGH`; smaller ones find more.

    Returns:
        uint8 `[h, w, 3]`, each pixel 0 or 255 in all channels. Mirrored pictures have mirrored edges, but for ties.
    """
    dx, dy = _steepest(picture)
    steep = np.abs(dx) + np.abs(dy)
    thin = _ridges(dx, dy, steep) & (steep > low)
    found = _connected(thin, thin & (steep > high))
    return np.repeat(np.where(found, 255, 0).astype(np.uint8)[..., None], 3, axis=2)


def _steepest(picture: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Sobel's horizontal and vertical differences `[h, w]`, each pixel's of the channel where they are largest."""
    p = np.pad(picture.astype(np.int32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    across, down = p[:, 2:] - p[:, :-2], p[2:] - p[:-2]
    dx = across[:-2] + 2 * across[1:-1] + across[2:]
    dy = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    channel = np.argmax(np.abs(dx) + np.abs(dy), axis=2)[..., None]
    return np.take_along_axis(dx, channel, 2)[..., 0], np.take_along_axis(dy, channel, 2)[..., 0]


def _ridges(dx: NDArray[np.int32], dy: NDArray[np.int32], steep: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Where it is steeper than one step back in the steepest direction, and at least as steep as one step on."""
    m = np.pad(steep, 1)
    h, w = steep.shape

    def at(down: int, right: int) -> NDArray[np.int32]:
        return m[1 + down : 1 + down + h, 1 + right : 1 + right + w]

    level = np.abs(dy) < _TAN * np.abs(dx)
    upright = np.abs(dx) < _TAN * np.abs(dy)
    falling = dx * dy >= 0  # the direction runs from the upper left to the lower right
    before = np.select([level, upright, falling], [at(0, -1), at(-1, 0), at(-1, -1)], at(-1, 1))
    behind = np.select([level, upright, falling], [at(0, 1), at(1, 0), at(1, 1)], at(1, -1))
    diagonal = ~(level | upright)
    return (steep > before) & ((steep > behind) | (~diagonal & (steep == behind)))


def _connected(thin: NDArray[np.bool_], strong: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What of `thin` hangs together with `strong`, over corners too."""
    h, w = thin.shape
    left = np.pad(thin, 1).ravel()
    steps = np.array([down * (w + 2) + right for down in (-1, 0, 1) for right in (-1, 0, 1)])
    found = np.zeros_like(left)
    front = np.flatnonzero(np.pad(strong, 1))
    while len(front):
        found[front], left[front] = True, False
        near = np.unique(front[:, None] + steps)
        front = near[left[near]]
    return found.reshape(h + 2, w + 2)[1:-1, 1:-1]
