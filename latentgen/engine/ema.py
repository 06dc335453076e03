"""Exponential moving average of the weights, in one fused update."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from latentgen.engine import sharding
from latentgen.engine.changing import Changing
from latentgen.engine.guard import lerp_unless


def decay_at(step: int, decay: float) -> float:
    """The decay after optimizer step `step` (from 0): short at first, so that the random start is soon forgotten."""
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """An average of what changes of `module`, in its own type.

    `averaged` is a module of the same class in eval mode. Its frozen parameters are the very ones of `module`: who
    writes to them, to merge an adapter say, must do so in a copy.

    Args:
        decay: the largest one of a classic average, or a function: optimizer step (from 0) -> share of the new weights.
        device: where the average is; None is where the module is.

    Attributes:
        changing: what is averaged, or, of buffers, kept as it was last.
    """

    def __init__(
        self, module: nn.Module, decay: float | Callable[[int], float], device: torch.device | None = None
    ) -> None:
        self._share = decay if callable(decay) else lambda step: 1 - decay_at(step, decay)
        self.changing = Changing(module)
        self._average = self.changing.copied(module, device)

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
        named, own = module.named_parameters(), self.changing.parameters
        self._average = sharding.rebuilt(self._average, [p.detach().clone() if name in own else p for name, p in named])

    @torch.no_grad()
    def update(self, module: nn.Module, step: int, skip: Tensor) -> None:
        """Move the average towards `module`'s weights after optimizer step `step`, unless `skip` is 1."""
        mine, theirs = self.changing.local(self._average), self.changing.local(module)
        lerp_unless(skip, mine, theirs, self._share(step))
        for kept, new in zip(self._average.buffers(), module.buffers(), strict=True):
            kept.copy_(torch.where(skip > 0, kept, new))

    def state_dict(self) -> dict[str, Tensor]:
        """What changes, itself."""
        return self.changing.tensors(self.averaged)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        sharding.load(self.state_dict(), state)
