"""Exponential moving average of the weights, in one fused update."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from latentgen.engine import sharding


def decay_at(step: int, decay: float) -> float:
    """The decay after optimizer step `step` (from 0): short at first, so that the random start is soon forgotten."""
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """An averaged copy of `module`, in its own type.

    `averaged` is a module of the same class in eval mode, to be used as it is unless it has been cut.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.averaged = copy.deepcopy(module).eval().requires_grad_(False)

    def follow_sharded(self, module: nn.Module) -> None:
        """Begin anew from `module`, which was sharded meanwhile: cut like it, to be put together before use."""
        self.averaged = sharding.rebuilt(self.averaged, [p.detach().clone() for p in module.parameters()])

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the average towards `module`'s weights after optimizer step `step`."""
        mine, theirs = sharding.local(self.averaged), sharding.local(module)
        torch._foreach_lerp_(mine, theirs, 1 - decay_at(step, self.decay))
        for kept, new in zip(self.averaged.buffers(), module.buffers(), strict=True):
            kept.copy_(new)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.averaged.state_dict())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        sharding.load(self.averaged, state)
