"""Means of scalars over steps, kept on the device until they are read."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor


class Meter:
    """Sums of named scalars since the last reading; part of a checkpoint, so that a resumed run logs the same means."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def add(self, name: str, value: Tensor, count: int = 1) -> None:
        """Add one observation (or a sum of `count`) without waiting for the device."""
        total, before = self._sums.get(name, (torch.zeros((), device=value.device), 0))
        self._sums[name] = (total + value.detach().float(), before + count)

    def forget(self, names: Iterable[str]) -> None:
        """Take back the count of one observation of each; it was added as zero."""
        for name in names:
            total, count = self._sums[name]
            if count > 1:
                self._sums[name] = (total, count - 1)
            else:
                del self._sums[name]

    def check(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all processes since the last reading; waits for the device.

        Raises:
            FloatingPointError: a mean is not finite.
        """
        if not self._sums:
            return {}
        names = sorted(self._sums)
        means = torch.stack([self._sums[name][0] / self._sums[name][1] for name in names])
        reduced = accelerator.reduce(means, "mean")
        assert isinstance(reduced, Tensor)
        values = dict(zip(names, reduced.tolist(), strict=True))
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(f"{', '.join(bad)} not finite; nothing was saved since; lower the learning rate")
        return values

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """`check`, then begin anew."""
        values = self.check(accelerator)
        self._sums = {}
        return values

    def state_dict(self, accelerator: Accelerator) -> dict[str, Tensor]:
        """The sums, averaged over processes: all of them must ask, and any number of them may take it back."""
        state: dict[str, Tensor] = {}
        for name, (total, count) in sorted(self._sums.items()):
            mean = accelerator.reduce(total, "mean")
            assert isinstance(mean, Tensor)
            state[f"{name}.{count}"] = mean
        return state

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device) -> None:
        for key, total in state.items():
            name, count = key.rsplit(".", 1)
            self._sums[name] = (total.to(device), int(count))
