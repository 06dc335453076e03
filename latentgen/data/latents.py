"""Latents of examples, by shape: which rows of which arrays they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class CachedLatents:
    """Mean and standard deviation of raw latents, in one memory-mapped array for each shape of pictures.

    Args:
        arrays: `[variants * m, 2, c, h, w]` float16 each, m examples of one shape; variant 1 is mirrored.
        which: `[n]` the number of the array that an example is in.
        rows: `[n]` its row there; of its mirror image it is m more.
        mirrors: whether there are mirror images.
    """

    arrays: tuple[NDArray[np.float16], ...]
    which: NDArray[np.int64]
    rows: NDArray[np.int64]
    mirrors: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def __call__(self, indices: Sequence[int], mirrored: NDArray[np.bool_]) -> NDArray[np.float16]:
        """`[b, 2, c, h, w]` of examples that all have one shape; `mirrored` `[b]` asks for mirror images."""
        numbers = np.asarray(indices)
        (array,) = {int(which) for which in self.which[numbers]}
        values = self.arrays[array]
        half = len(values) // (1 + self.mirrors)
        return values[self.rows[numbers] + half * mirrored]


def of_one_shape(values: NDArray[np.float16], mirrors: bool = False) -> CachedLatents:
    """All examples in one array, in their order."""
    n = len(values) // (1 + mirrors)
    return CachedLatents((values,), np.zeros(n, dtype=np.int64), np.arange(n), mirrors)
