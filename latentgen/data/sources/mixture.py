"""Several sources as one, each with its share of every epoch, however many examples they have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from latentgen.core.errors import UserError
from latentgen.core.files import content_key
from latentgen.data.frame import CENTRE, Frame, Place, Shape
from latentgen.data.order import ByShape, Interleaved, Order, slots
from latentgen.data.sources.base import Source, shapes_of


@dataclass(frozen=True)
class Mixture:
    """The examples of several sources, numbered one source after the other.

    Args:
        parts: the sources.
        counts: examples of each in an epoch; fewer than there are leave the others to the next epochs, more show some
            again. Of one part all are shown equally often, give or take one.
        weights: what an example of each part counts in the loss; () is 1 for all.
    """

    parts: tuple[Source, ...]
    counts: tuple[int, ...]
    weights: tuple[float, ...] = ()
    _starts: NDArray[np.int64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert len(self.parts) == len(self.counts), "a count for each part"
        assert all(self.counts), "every part takes part"
        starts = np.concatenate([[0], np.cumsum([len(part) for part in self.parts])])
        object.__setattr__(self, "_starts", starts.astype(np.int64))

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def epoch(self) -> int:
        """Examples in an epoch."""
        return sum(self.counts)

    def key(self) -> str:
        """Of the pictures, captions and shares; what they weigh is none of them."""
        return content_key("mixture", [part.key() for part in self.parts], self.counts)

    def part_of(self, index: int) -> tuple[int, int]:
        """The number of the part that an example is of, and its number there."""
        if not 0 <= index < len(self):
            raise UserError(f"example {index} does not exist; there are {len(self)}, numbered from 0")
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return part, index - int(self._starts[part])

    def _at(self, index: int) -> tuple[Source, int]:
        part, number = self.part_of(index)
        return self.parts[part], number

    def name(self, index: int) -> str:
        source, number = self._at(index)
        return source.name(number)

    def digest(self, index: int) -> str:
        source, number = self._at(index)
        return source.digest(number)

    def picture_key(self, index: int) -> str:
        source, number = self._at(index)
        return source.picture_key(number)

    def shape(self, index: int) -> Shape:
        source, number = self._at(index)
        return source.shape(number)

    def frame(self, index: int, at: Place = CENTRE) -> Frame:
        source, number = self._at(index)
        return source.frame(number, at)

    def image(self, index: int, at: Place = CENTRE) -> NDArray[np.uint8]:
        source, number = self._at(index)
        return source.image(number, at)

    def mask(self, index: int, at: Place = CENTRE) -> NDArray[np.uint8] | None:
        source, number = self._at(index)
        return source.mask(number, at)

    def captions(self, index: int) -> tuple[str, ...]:
        source, number = self._at(index)
        return source.captions(number)

    def control(self, index: int, at: Place = CENTRE) -> NDArray[np.uint8] | None:
        source, number = self._at(index)
        return source.control(number, at)

    def contrasts(self, index: int, caption: str) -> tuple[tuple[str, ...], ...]:
        source, number = self._at(index)
        return source.contrasts(number, caption)

    def order(self, batch: int) -> Order:
        """Parts take turns, each in its own order. Where pictures differ in shape, batches are of one shape: shares
        are then exact but for what fills the last batch of each shape."""
        shapes, of = self._shapes
        if len(shapes) > 1:
            chosen = slots(self.counts, [len(part) for part in self.parts])
            return ByShape(of[chosen], batch, chosen)
        offsets = tuple(int(start) for start in self._starts[:-1])
        return Interleaved(tuple(part.order(batch) for part in self.parts), self.counts, offsets)

    @cached_property
    def _shapes(self) -> tuple[list[Shape], NDArray[np.int64]]:
        return shapes_of(self)

    def part_numbers(self) -> NDArray[np.int64]:
        """The number of the part that each example is of `[n]`."""
        return np.repeat(np.arange(len(self.parts)), [len(part) for part in self.parts])

    def example_weights(self) -> NDArray[np.float32]:
        """What each example counts in the loss `[n]`, those of mixtures in a mixture by both."""
        weights = self.weights or (1.0,) * len(self.parts)
        inside = [part.example_weights() if isinstance(part, Mixture) else np.ones(len(part)) for part in self.parts]
        return np.concatenate([weight * own for weight, own in zip(weights, inside, strict=True)]).astype(np.float32)


def equal_counts(own: int, beside: int) -> tuple[int, int]:
    """Counts of two sources that share an epoch in halves: all of `own` equally often, all of `beside` at least once
    (some once more than others, unless the numbers happen to fit)."""
    count = own * -(-beside // own)
    return count, count


def counts_of(lengths: Sequence[int], shares: Sequence[float]) -> tuple[int, ...]:
    """Counts that have these shares, to the nearest whole number: the smallest epoch that shows every example.

    Args:
        lengths: examples of each part.
        shares: of each part, above 0; only their ratios count.
    """
    whole = sum(shares)
    epoch = max(n * whole / share for n, share in zip(lengths, shares, strict=True))
    # 1e-9: a length that fits exactly is not to gain one from rounding.
    return tuple(max(1, int(np.ceil(epoch * share / whole - 1e-9))) for share in shares)
