"""The world of coloured shapes: its words, its scenes, and the combinations kept out of training.

All lengths are in units of 1/64 of the picture's side, x to the right and y downwards from the upper left corner.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

SIDE = 64

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (240, 205, 40),
    "green": (40, 170, 70),
    "blue": (45, 90, 220),
    "purple": (145, 60, 190),
    "pink": (245, 130, 180),
    "black": (25, 25, 25),
}

BACKGROUNDS: dict[str, tuple[int, int, int]] = {"white": (250, 250, 250), "gray": (150, 150, 150)}

# Half of the larger side of an object's bounding box. The gap between the classes lets "small" and "large" be judged.
RADII: dict[str, tuple[float, float]] = {"small": (6.5, 8.5), "large": (12.0, 14.5)}

# GenEval's six categories (Ghosh et al. 2023, arXiv 2310.11513).
CATEGORIES = ("single", "two", "counting", "colours", "position", "attribution")

RELATIONS = ("above", "below", "left of", "right of")
INVERSE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}

SPLITS = ("train", "heldout", "all")

Kind = tuple[str, str]
"""A (shape, colour) pair."""

# Never shown in training: two of each shape, one or two of each colour.
HELDOUT_KINDS: frozenset[Kind] = frozenset(
    {
        ("circle", "orange"),
        ("circle", "purple"),
        ("square", "green"),
        ("square", "pink"),
        ("triangle", "red"),
        ("triangle", "black"),
        ("star", "blue"),
        ("star", "yellow"),
        ("heart", "green"),
        ("heart", "blue"),
        ("cross", "purple"),
        ("cross", "yellow"),
    }
)


@dataclass(frozen=True)
class Item:
    """One object: its words, the centre `(x, y)` of its bounding box and its radius, in 1/64 of the picture's side."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def kind(self) -> Kind:
        return self.shape, self.colour


@dataclass(frozen=True)
class Scene:
    """All that a picture shows; `items` is one object, two of different shapes, or two to four of one kind and size."""

    category: str
    background: str
    items: tuple[Item, ...]


def all_kinds() -> list[Kind]:
    """The 48 (shape, colour) pairs in a fixed order."""
    return [(shape, colour) for shape in SHAPES for colour in COLOURS]


def seen_kinds() -> list[Kind]:
    """The 36 (shape, colour) pairs that training shows."""
    return [kind for kind in all_kinds() if kind not in HELDOUT_KINDS]


def pair_of(a: Kind, b: Kind) -> tuple[Kind, Kind]:
    """The unordered pair of two kinds, in a fixed order."""
    return (a, b) if a <= b else (b, a)


@lru_cache(maxsize=1)
def heldout_pairs() -> frozenset[tuple[Kind, Kind]]:
    """The 54 unordered pairs of seen kinds that never stand in one training picture.

    There are 540 unordered pairs of seen kinds with different shapes; the tenth with the smallest hash is held out.
    Sizes, places and backgrounds play no part. Either kind of a held-out pair alone is an ordinary training object.
    """
    pairs = [pair_of(a, b) for a, b in combinations(seen_kinds(), 2) if a[0] != b[0]]
    pairs.sort(key=lambda pair: hashlib.blake2b(repr(pair).encode(), digest_size=8).digest())
    return frozenset(pairs[: len(pairs) // 10])


def is_heldout(kinds: tuple[Kind, ...]) -> bool:
    """Whether a picture with these kinds of object (one, or two different ones) is kept out of training."""
    if any(kind in HELDOUT_KINDS for kind in kinds):
        return True
    return len(kinds) == 2 and pair_of(kinds[0], kinds[1]) in heldout_pairs()


def scene_is_heldout(scene: Scene) -> bool:
    """Whether the scene shows a held-out kind or a held-out pair of kinds."""
    return is_heldout(tuple(sorted({item.kind for item in scene.items})))


def relation_of(a: Item, b: Item) -> str | None:
    """How `a` lies to `b` ("above", ...) where that is beyond dispute, else None.

    Beyond dispute: the bounding boxes are apart along that axis and the centres are at least 1.8 times as far apart
    along it as across it. At most one relation holds.
    """
    dx, dy = a.x - b.x, a.y - b.y
    apart = a.radius + b.radius
    if abs(dy) >= max(apart, 1.8 * abs(dx)):
        return "above" if dy < 0 else "below"
    if abs(dx) >= max(apart, 1.8 * abs(dy)):
        return "left of" if dx < 0 else "right of"
    return None
