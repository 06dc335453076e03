"""Example number -> scene: which objects, how large, where. A pure function of its arguments on every machine."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import TypeVar

from latentgen.core.errors import UserError
from latentgen.data.sources.shapes_scene import (
    BACKGROUNDS,
    CATEGORIES,
    HELDOUT_KINDS,
    RADII,
    RELATIONS,
    SIDE,
    SPLITS,
    Item,
    Kind,
    Scene,
    all_kinds,
    heldout_pairs,
    is_heldout,
    seen_kinds,
)

T = TypeVar("T")

MARGIN = 1.5
"""Least distance from an object's bounding box to the frame."""

GAP = 3.0
"""Least distance between two bounding boxes, along x or y."""


class Draws:
    """Uniform draws that depend on `parts` alone: hash blocks, so no library's generator has to stay as it is."""

    def __init__(self, *parts: int | str) -> None:
        self._key = "\x1f".join(map(str, parts)).encode()
        self._block = 0
        self._values: list[int] = []

    def unit(self) -> float:
        """A number in [0, 1)."""
        if not self._values:
            digest = hashlib.blake2b(self._key, salt=self._block.to_bytes(8, "big")).digest()
            self._values = list(struct.unpack(">8Q", digest))
            self._block += 1
        return (self._values.pop() >> 11) * 2.0**-53

    def between(self, low: float, high: float) -> float:
        """A number in [low, high); `low` where the interval is empty."""
        return low + max(high - low, 0.0) * self.unit()

    def pick(self, options: Sequence[T]) -> T:
        """One of the options, all equally likely."""
        return options[int(self.unit() * len(options))]

    def chance(self, probability: float) -> bool:
        return self.unit() < probability


Box = tuple[float, float, float]
"""Centre x, centre y, radius."""


def draw_scene(number: int, *, seed: int = 0, split: str = "train", category: str | None = None) -> Scene:
    """The scene of example `number`.

    Args:
        number: any integer; the scene depends on it, the seed, the split and the category only.
        seed: another seed is another data set from the same world.
        split: "train" (no held-out kind or pair), "heldout" (always one), "all" (whatever comes).
        category: one of `CATEGORIES`; None draws one, all six equally likely.

    Raises:
        UserError: the split or the category is not one of those named.
    """
    if split not in SPLITS:
        raise UserError(f"shapes: unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    if category is not None and category not in CATEGORIES:
        raise UserError(f"shapes: unknown category {category!r}; choose one of {', '.join(CATEGORIES)}")
    draws = Draws("scene", seed, split, category or "", number)
    category = category or draws.pick(CATEGORIES)
    background = draws.pick(tuple(BACKGROUNDS))
    if category in ("single", "colours"):
        kinds, boxes, sizes = _one(draws, split)
    elif category == "counting":
        kinds, boxes, sizes = _several(draws, split)
    else:
        kinds, boxes, sizes = _two(draws, split, category)
    items = tuple(
        Item(shape, colour, size, x, y, radius)
        for (shape, colour), (x, y, radius), size in zip(kinds, boxes, sizes, strict=True)
    )
    return Scene(category, background, items)


Layout = tuple[list[Kind], list[Box], list[str]]


def _kind(draws: Draws, split: str) -> Kind:
    """The kind of a lone object, or of a group."""
    if split == "heldout":
        return draws.pick(sorted(HELDOUT_KINDS))
    return draws.pick(seen_kinds() if split == "train" else all_kinds())


def _two_kinds(draws: Draws, split: str, colours_differ: bool) -> list[Kind]:
    """Two kinds of different shapes; for "heldout", half of them a held-out pair and half with a held-out kind."""
    options = all_kinds() if split == "all" else seen_kinds()
    as_pair = draws.chance(0.5)
    while True:
        if split == "heldout" and as_pair:
            first, second = draws.pick(sorted(heldout_pairs()))
        else:
            first = draws.pick(sorted(HELDOUT_KINDS)) if split == "heldout" else draws.pick(options)
            second = draws.pick(all_kinds() if split == "heldout" else options)
        if first[0] == second[0] or (colours_differ and first[1] == second[1]):
            continue
        if split == "train" and is_heldout((first, second)):
            continue
        return [first, second] if draws.chance(0.5) else [second, first]


def _size(draws: Draws, p_small: float = 0.5) -> tuple[str, float]:
    size = "small" if draws.chance(p_small) else "large"
    return size, draws.between(*RADII[size])


def _inside(draws: Draws, radius: float) -> float:
    """A coordinate that keeps an object of this radius inside the frame."""
    return draws.between(MARGIN + radius, SIDE - MARGIN - radius)


def _one(draws: Draws, split: str) -> Layout:
    kind = _kind(draws, split)
    size, radius = _size(draws)
    return [kind], [(_inside(draws, radius), _inside(draws, radius), radius)], [size]


def _two(draws: Draws, split: str, category: str) -> Layout:
    kinds = _two_kinds(draws, split, colours_differ=category == "attribution")
    (size_a, radius_a), (size_b, radius_b) = _size(draws), _size(draws)
    boxes = _place_two(draws, radius_a, radius_b, clear=category == "position")
    return kinds, boxes, [size_a, size_b]


def _place_two(draws: Draws, radius_a: float, radius_b: float, clear: bool) -> list[Box]:
    """Two boxes apart along one axis; `clear` keeps them close enough across it for `relation_of` to have an answer."""
    relation = draws.pick(RELATIONS)
    low, high = (radius_a, radius_b) if relation in ("above", "left of") else (radius_b, radius_a)
    room = SIDE - 2 * MARGIN
    apart = draws.between(low + high + GAP, room - low - high)
    first = draws.between(MARGIN + low, SIDE - MARGIN - high - apart)
    across_low = _inside(draws, low)
    if clear:
        # 1.8 is the ratio that `relation_of` asks for; 1.81 keeps rounding on the right side of it.
        across_high = draws.between(
            max(MARGIN + high, across_low - apart / 1.81), min(SIDE - MARGIN - high, across_low + apart / 1.81)
        )
    else:
        across_high = _inside(draws, high)
    along, across = (first, first + apart), (across_low, across_high)
    if relation in ("below", "right of"):
        along, across = along[::-1], across[::-1]
    xs, ys = (across, along) if relation in ("above", "below") else (along, across)
    return [(xs[0], ys[0], radius_a), (xs[1], ys[1], radius_b)]


def _several(draws: Draws, split: str) -> Layout:
    """Two to four objects of one kind and one size; three and four are mostly small so that they fit easily."""
    kind = _kind(draws, split)
    count = draws.pick((2, 3, 4))
    size = "small" if draws.chance({2: 0.5, 3: 0.85, 4: 0.9}[count]) else "large"
    radii = [draws.between(*RADII[size]) for _ in range(count)]
    if count == 2:
        boxes = _place_two(draws, radii[0], radii[1], clear=False)
    else:
        boxes = _scatter(draws, radii) if size == "small" else _quadrants(draws, radii)
    return [kind] * count, boxes, [size] * count


def _scatter(draws: Draws, radii: list[float]) -> list[Box]:
    """Boxes anywhere, drawn again until they keep their distance; quadrants if that takes too long."""
    boxes: list[Box] = []
    for _ in range(60):
        radius = radii[len(boxes)]
        x, y = _inside(draws, radius), _inside(draws, radius)
        if all(max(abs(x - bx), abs(y - by)) >= radius + r + GAP for bx, by, r in boxes):
            boxes.append((x, y, radius))
            if len(boxes) == len(radii):
                return boxes
    return _quadrants(draws, radii)


def _quadrants(draws: Draws, radii: list[float]) -> list[Box]:
    """One box in each of the first quadrants of a shuffled list."""
    half, corners = SIDE / 2, [(0, 0), (0, 1), (1, 0), (1, 1)]
    boxes: list[Box] = []
    for radius in radii:
        column, row = corners.pop(int(draws.unit() * len(corners)))
        low, high = MARGIN + radius, half - MARGIN - radius
        boxes.append((column * half + draws.between(low, high), row * half + draws.between(low, high), radius))
    return boxes
