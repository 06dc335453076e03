"""Whether the losses of held-out and of training examples part: a warning that does not cry wolf.

Examples and noise are fixed, so that what changes from one validation to the next is told far more sharply than either
loss is known: by the mean of differences, example by example, and its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

PATIENCE = 3
"""Validations over which losses are compared, and for which they must have been parting before it is said."""
FEWEST = 8
"""Examples below which nothing is said."""


def standard_error(values: Tensor) -> float:
    """Of the mean of independent `values` [n], n > 1."""
    return float(values.std() / math.sqrt(len(values)))


def limit(z: float, count: int) -> float:
    """The number of standard errors that a mean of `count` values passes as seldom as a normal one passes z.

    They are estimated from the values themselves, so few values need more: Student's quantile, as a series in the
    inverse of its degrees of freedom (Abramowitz and Stegun, 26.7.5).
    """
    freedom = count - 1
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def above(values: Tensor, z: float) -> bool:
    """Whether the mean of `values` is above 0 beyond chance."""
    return float(values.mean()) > limit(z, len(values)) * standard_error(values)


class Parting:
    """Counts validations in a row that find the two losses parting.

    They are parting when all of this holds, the last two since the validation `PATIENCE` before:

    * the loss is higher on held-out examples, by 3 standard errors;
    * the gap has grown, by 2: held-out examples that are merely harder do not count;
    * the held-out loss has not fallen, by 2: two losses that fall at different speeds do not count.
    """

    def __init__(self) -> None:
        self.count = 0
        self._held_out: list[Tensor] = []
        self._seen: list[Tensor] = []

    @property
    def begins(self) -> bool:
        """True at the one validation at which a warning is due."""
        return self.count == PATIENCE

    def add(self, held_out: Tensor, seen: Tensor) -> int:
        """Take the losses of the next validation, `[n]` each, position by position; return the count."""
        if self._seen and len(self._seen[0]) != len(seen):
            self._held_out, self._seen, self.count = [], [], 0
        self._held_out = [*self._held_out[-PATIENCE:], held_out.double()]
        self._seen = [*self._seen[-PATIENCE:], seen.double()]
        self.count = self.count + 1 if self._parting() else 0
        return self.count

    def _parting(self) -> bool:
        if len(self._seen) <= PATIENCE or len(self._seen[0]) < FEWEST:
            return False
        gap = self._held_out[-1] - self._seen[-1]
        before = self._held_out[0] - self._seen[0]
        falling = above(self._held_out[0] - self._held_out[-1], 2)
        return above(gap, 3) and above(gap - before, 2) and not falling

    def state_dict(self) -> dict[str, Tensor]:
        """The last `PATIENCE + 1` validations and the count."""
        if not self._seen:
            return {}
        return {
            "count": torch.tensor(self.count),
            "held_out": torch.stack(self._held_out),
            "seen": torch.stack(self._seen),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if "count" not in state:
            return
        self.count = int(state["count"])
        self._held_out, self._seen = list(state["held_out"].unbind()), list(state["seen"].unbind())
