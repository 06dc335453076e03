"""What every source of examples offers."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from latentgen.data.frame import CENTRE, Frame, Place, Shape
from latentgen.data.order import ByShape, Order, Shuffled


class Source(Protocol):
    """A fixed, ordered set of pictures with captions; reading one is a pure function of its number (and of a place,
    where pictures are cut at random places)."""

    def __len__(self) -> int:
        """How many examples there are."""
        ...

    def key(self) -> str:
        """Changes whenever a picture, a caption or their order does: runs are named by it."""
        ...

    def name(self, index: int) -> str:
        """What to call the example when it is at fault."""
        ...

    def digest(self, index: int) -> str:
        """What the picture is before it is cut: equal pictures have equal digests."""
        ...

    def picture_key(self, index: int) -> str:
        """Equal keys mean the same pixels of `image` at every place: what is computed from it is kept under it."""
        ...

    def shape(self, index: int) -> Shape:
        """Height and width of `image`, known without reading it."""
        ...

    def frame(self, index: int, at: Place = CENTRE) -> Frame:
        """Where `image` comes from, known without reading it."""
        ...

    def image(self, index: int, at: Place = CENTRE) -> NDArray[np.uint8]:
        """The picture `[h, w, 3]`, RGB."""
        ...

    def mask(self, index: int, at: Place = CENTRE) -> NDArray[np.uint8] | None:
        """What each pixel counts in the loss, `[h, w]` from 0 to 255; None where all count fully."""
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """Its captions, at least one."""
        ...

    def control(self, index: int, at: Place = CENTRE) -> NDArray[np.uint8] | None:
        """A second picture of the example for a ControlNet to follow, of the same size; None where there is none."""
        ...

    def contrasts(self, index: int, caption: str) -> tuple[tuple[str, ...], ...]:
        """Captions that are false of the example and differ from its `caption` in one respect, a tuple each respect.

        A source knows some for all its captions or, as with most pictures of the world outside, for none.
        """
        ...

    def order(self, batch: int) -> Order:
        """In which order training sees the examples, in global batches of `batch`, each of one shape."""
        ...


def shapes_of(source: Source) -> tuple[list[Shape], NDArray[np.int64]]:
    """The different shapes of a source, and for each example `[n]` the number of its own."""
    number: dict[Shape, int] = {}
    of = np.array([number.setdefault(source.shape(i), len(number)) for i in range(len(source))], dtype=np.int64)
    return list(number), of


def shape_counts(source: Source) -> dict[Shape, int]:
    """How many examples there are of each shape."""
    shapes, of = shapes_of(source)
    return dict(zip(shapes, np.bincount(of, minlength=len(shapes)).tolist(), strict=True))


def usual_order(source: Source, batch: int) -> Order:
    """The order of a source whose examples are all at hand."""
    shapes, of = shapes_of(source)
    return Shuffled(len(source)) if len(shapes) == 1 else ByShape(of, batch)
