"""Shapes for pictures of many aspect ratios: chosen from the data, so that as little as possible is cut off."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from latentgen.data.frame import Shape

LONGEST = 4.0
"""The most extreme aspect ratio of a shape."""


def candidates(resolution: int, step: int) -> tuple[Shape, ...]:
    """Every (height, width) in multiples of `step` of which one side cannot grow without more than resolution² pixels,
    from the tallest to the widest."""
    budget = resolution * resolution
    found = set()
    for width in range(step, int(resolution * LONGEST) + 1, step):
        height = budget // (width * step) * step
        if height and max(width / height, height / width) <= LONGEST:
            found |= {(height, width), (width, height)}
    square = resolution // step * step
    return tuple(sorted(found | {(square, square)}, key=lambda shape: (shape[1] / shape[0], shape)))


def cut_off(ratios: NDArray[np.float64], shape: Shape) -> NDArray[np.float64]:
    """The share of each picture that a shape cuts off, by its aspect ratio (width over height)."""
    own = shape[1] / shape[0]
    return 1 - np.minimum(ratios / own, own / ratios)


def choose_shapes(sizes: Sequence[Shape], resolution: int, most: int, step: int) -> tuple[Shape, ...]:
    """At most `most` shapes that together cut off least of these pictures: the best choice there is, found by dynamic
    programming along the aspect ratio.

    Args:
        sizes: height and width of every picture.
        resolution: no shape has more than its square in pixels.
        step: sides are multiples of it.

    Returns:
        From the tallest to the widest; each is the nearest one to some picture.
    """
    ratios = np.array(sorted(width / height for height, width in sizes))
    offered = candidates(resolution, step)
    losses = np.stack([cut_off(ratios, shape) for shape in offered])
    logs = np.log(ratios)
    own = np.log([width / height for height, width in offered])
    before = np.concatenate([np.zeros((len(offered), 1)), np.cumsum(losses, axis=1)], axis=1)

    def between(left: int | None, right: int | None) -> float:
        """What is cut off of the pictures between two neighbouring choices; None is no choice on that side."""
        start = 0 if left is None else int(np.searchsorted(logs, own[left]))
        end = len(logs) if right is None else int(np.searchsorted(logs, own[right]))
        if left is None or right is None:
            only = right if left is None else left
            assert only is not None
            return float(before[only, end] - before[only, start])
        middle = int(np.clip(np.searchsorted(logs, (own[left] + own[right]) / 2, side="right"), start, end))
        return float(before[left, middle] - before[left, start] + before[right, end] - before[right, middle])

    count = len(offered)
    best = np.array([between(None, j) for j in range(count)])
    history: list[NDArray[np.int64]] = []
    ends = np.array([between(j, None) for j in range(count)])
    answers = [(float((best + ends).min()), int((best + ends).argmin()), 0)]
    pairs = np.array([[between(i, j) if i < j else np.inf for j in range(count)] for i in range(count)])
    for number in range(1, min(most, count)):
        through = best[:, None] + pairs
        history.append(through.argmin(axis=0))
        best = through.min(axis=0)
        answers.append((float((best + ends).min()), int((best + ends).argmin()), number))
    # 1e-9: a shape that saves nothing is not added for what rounding leaves.
    _, last, number = min(answers, key=lambda answer: (round(answer[0], 9), answer[2]))
    chosen = [last]
    for back in reversed(history[:number]):
        chosen.append(int(back[chosen[-1]]))
    return _used(tuple(offered[i] for i in reversed(chosen)), logs)


def _used(shapes: tuple[Shape, ...], logs: NDArray[np.float64]) -> tuple[Shape, ...]:
    own = np.log([width / height for height, width in shapes])
    nearest = np.abs(logs[:, None] - own[None]).argmin(axis=1)
    return tuple(shape for number, shape in enumerate(shapes) if (nearest == number).any())
