"""Exponential moving average of the weights, in one fused update."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from latentgen.engine import sharding
from latentgen.engine.guard import lerp_unless


def decay_at(step: int, decay: float) -> float:
    """The decay after optimizer step `step` (from 0): short at first, so that the random start is soon forgotten."""
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """An averaged copy of `module`, in its own type.

    `averaged` is a module of the same class in eval mode.

    Args:
        decay: the largest one of a classic average, or a function: optimizer step (from 0) -> share of the new weights.
    """

    def __init__(self, module: nn.Module, decay: float | Callable[[int], float]) -> None:
        self._share = decay if callable(decay) else lambda step: 1 - decay_at(step, decay)
        self._average = copy.deepcopy(module).eval().requires_grad_(False)

    @property
    def averaged(self) -> nn.Module:
        """To be used as it is unless it has been cut."""
        return self._average

    def on(self, device: torch.device) -> nn.Module:
        """`averaged`, or a copy of it, to be used on this device."""
        assert all(p.device.type == device.type for p in self._average.parameters())
        return self.averaged

    def follow_sharded(self, module: nn.Module) -> None:
        """Begin anew from `module`, which was sharded meanwhile: cut like it, to be put together before use."""
        self._average = sharding.rebuilt(self._average, [p.detach().clone() for p in module.parameters()])

    @torch.no_grad()
    def update(self, module: nn.Module, step: int, skip: Tensor) -> None:
        """Move the average towards `module`'s weights after optimizer step `step`, unless `skip` is 1."""
        mine, theirs = sharding.local(self._average), sharding.local(module)
        lerp_unless(skip, mine, theirs, self._share(step))
        for kept, new in zip(self._average.buffers(), module.buffers(), strict=True):
            kept.copy_(torch.where(skip > 0, kept, new))

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.averaged.state_dict())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        sharding.load(self.averaged, state)
