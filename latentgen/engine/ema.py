"""Exponential moving average of the weights, in one fused update."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def decay_at(step: int, decay: float) -> float:
    """The decay after optimizer step `step` (from 0): short at first, so that the random start is soon forgotten."""
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """An averaged copy of `module`, in its own type.

    `averaged` is a module of the same class in eval mode, to be used as it is.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.averaged = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the average towards `module`'s weights after optimizer step `step`."""
        torch._foreach_lerp_(
            list(self.averaged.parameters()), list(module.parameters()), 1 - decay_at(step, self.decay)
        )
        for mine, theirs in zip(self.averaged.buffers(), module.buffers(), strict=True):
            mine.copy_(theirs)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.averaged.state_dict())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.averaged.load_state_dict(state)
