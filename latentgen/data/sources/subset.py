"""Some of a source's examples as a source; and which of them to hold out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentgen.core.files import content_key
from latentgen.core.rand import seed_of
from latentgen.data.frame import CENTRE, Frame, Place, Shape
from latentgen.data.order import Order, ReadAhead
from latentgen.data.sources.base import Source, usual_order

SHARE = 10
"""At most one example in so many is held out ..."""
FEWEST = 8
"""... and none where that would be fewer than these, which would measure nothing."""


@dataclass(frozen=True)
class Subset:
    """The examples of `source` with these numbers, in this order; the first is number 0 here."""

    source: Source
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def key(self) -> str:
        return content_key("subset", self.source.key(), self.indices)

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def digest(self, index: int) -> str:
        return self.source.digest(self.indices[index])

    def picture_key(self, index: int) -> str:
        return self.source.picture_key(self.indices[index])

    def shape(self, index: int) -> Shape:
        return self.source.shape(self.indices[index])

    def frame(self, index: int, at: Place = CENTRE) -> Frame:
        return self.source.frame(self.indices[index], at)

    def image(self, index: int, at: Place = CENTRE) -> NDArray[np.uint8]:
        return self.source.image(self.indices[index], at)

    def mask(self, index: int, at: Place = CENTRE) -> NDArray[np.uint8] | None:
        return self.source.mask(self.indices[index], at)

    def captions(self, index: int) -> tuple[str, ...]:
        return self.source.captions(self.indices[index])

    def control(self, index: int, at: Place = CENTRE) -> NDArray[np.uint8] | None:
        return self.source.control(self.indices[index], at)

    def contrasts(self, index: int, caption: str) -> tuple[tuple[str, ...], ...]:
        return self.source.contrasts(self.indices[index], caption)

    def order(self, batch: int) -> Order:
        """In windows where the whole source is read so."""
        whole = self.source.order(batch)
        if isinstance(whole, ReadAhead) and list(self.indices) == sorted(set(self.indices)):
            return whole.among(self.indices)
        return usual_order(self, batch)


def hold_out(digests: Sequence[str], wanted: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Numbers of the examples to train on, and of about `wanted` to hold out, both ascending.

    Who is held out depends on the content alone: not on names, on order or on the run's seed, and adding examples moves
    no other across but the few at the border. Equal pictures are on one side.

    Args:
        digests: of every example's picture.
        wanted: pictures to hold out; a tenth of the different ones is the most, and fewer than `FEWEST` are none.
    """
    order = sorted(set(digests), key=lambda digest: (seed_of("held out", digest), digest))
    count = min(wanted, len(order) // SHARE)
    chosen = set(order[:count] if count >= FEWEST else ())
    kept = tuple(i for i, digest in enumerate(digests) if digest not in chosen)
    return kept, tuple(i for i, digest in enumerate(digests) if digest in chosen)
