"""Two sources in turn, so that each has half of every epoch, however many examples they have."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentgen.core.files import content_key
from latentgen.data.sources.base import Source


@dataclass(frozen=True)
class Alternating:
    """Even numbers are examples of `own`, odd ones of `beside`; the shorter source begins anew.

    All of `own` are there equally often, and all of `beside` at least once (some once more than others, unless the
    numbers happen to fit).

    Args:
        weight: what an example of `beside` counts in the loss; one of `own` counts 1.
    """

    own: Source
    beside: Source
    weight: float = 1.0

    def __len__(self) -> int:
        return length(len(self.own), len(self.beside))

    def key(self) -> str:
        """Of the pictures and captions; the weight is none of them."""
        return content_key("alternating", self.own.key(), self.beside.key())

    def _at(self, index: int) -> tuple[Source, int]:
        source = self.beside if index % 2 else self.own
        return source, index // 2 % len(source)

    def name(self, index: int) -> str:
        source, number = self._at(index)
        return source.name(number)

    def image(self, index: int) -> NDArray[np.uint8]:
        source, number = self._at(index)
        return source.image(number)

    def captions(self, index: int) -> tuple[str, ...]:
        source, number = self._at(index)
        return source.captions(number)

    def control(self, index: int) -> NDArray[np.uint8] | None:
        source, number = self._at(index)
        return source.control(number)

    def contrasts(self, index: int, caption: str) -> tuple[tuple[str, ...], ...]:
        source, number = self._at(index)
        return source.contrasts(number, caption)

    def is_beside(self) -> NDArray[np.bool_]:
        """Which examples are of `beside` `[n]`."""
        return np.arange(len(self)) % 2 == 1

    def weights(self) -> NDArray[np.float32]:
        """What each example counts `[n]`."""
        return np.where(self.is_beside(), self.weight, 1.0).astype(np.float32)


def length(own: int, beside: int) -> int:
    """How many examples two sources of so many make together."""
    return 2 * own * -(-beside // own)
