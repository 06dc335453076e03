"""Captions of a draw: which one is shown, and what the network reads of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentgen.core.rand import Draw
from latentgen.data.sources.base import Source


class Words(Protocol):
    """What a network reads of the captions of a draw."""

    def __call__(self, draw: Draw) -> dict[str, Tensor]:
        """By name, `[b, ...]` each."""
        ...


def first_captions(source: Source, index: int, limit: int | None) -> tuple[str, ...]:
    """The captions that training may show for one example."""
    return source.captions(index)[:limit]


@dataclass(frozen=True)
class CachedWords:
    """Captions whose states (or token ids) are at hand: no text encoder runs here.

    Args:
        texts: by name what there is of m texts, [m, ...] each; row 0 is of the empty caption.
        rows: for each example, the rows of `texts` that describe it.
        dropout: share of captions replaced by the empty one.
    """

    texts: Mapping[str, NDArray]
    rows: Sequence[tuple[int, ...]]
    dropout: float

    def __call__(self, draw: Draw) -> dict[str, Tensor]:
        choice, drop = draw.uniform("caption").tolist(), (draw.uniform("dropout") < self.dropout).tolist()
        options = (self.rows[index] for index in draw.indices)
        rows = [0 if d else o[int(c * len(o))] for o, c, d in zip(options, choice, drop, strict=True)]
        return {name: as_tensor(table[rows]) for name, table in self.texts.items()}


def as_tensor(values: NDArray) -> Tensor:
    """Floating numbers as float32; whole ones and truth values as they are."""
    return torch.from_numpy(np.array(values, dtype=np.float32 if values.dtype.kind == "f" else None))
