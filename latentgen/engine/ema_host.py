"""An average that lives in main memory, where a GPU's is short."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from latentgen.engine.ema import Ema
from latentgen.engine.guard import lerp_unless


class HostEma(Ema):
    """As `Ema`, of a module on any device that is not cut.

    An update only begins to copy the weights; they are added when the next update, or whoever wants to see the average,
    comes. So neither waits for the other: the GPU is doing its next step by then.
    """

    def __init__(self, module: nn.Module, decay: float | Callable[[int], float]) -> None:
        super().__init__(module, decay, torch.device("cpu"))
        pin = any(p.is_cuda for p in module.parameters())
        self._weights, self._buffers = (
            [torch.empty_like(value, device="cpu", requires_grad=False, pin_memory=pin) for value in values]
            for values in (self.changing.local(module), module.buffers())
        )
        self._skip = torch.empty((), pin_memory=pin)
        self._coming: tuple[float, torch.Event | None] | None = None

    @property
    def averaged(self) -> nn.Module:
        """The average with all updates, on the CPU but for what is frozen; waits for those that are under way."""
        self._settle()
        return self._average

    def on(self, device: torch.device) -> nn.Module:
        return self.averaged if device.type == "cpu" else self.changing.copied(self.averaged, device)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int, skip: Tensor) -> None:
        self._settle()
        pairs = [*zip(self._weights, self.changing.local(module), strict=True)]
        for kept, new in (*pairs, *zip(self._buffers, module.buffers(), strict=True), (self._skip, skip)):
            kept.copy_(new, non_blocking=True)
        arrived = None
        if skip.device.type != "cpu":
            arrived = torch.Event(skip.device)
            arrived.record()
        self._coming = self._share(step), arrived

    @torch.no_grad()
    def _settle(self) -> None:
        """Add what was copied."""
        if self._coming is None:
            return
        (share, arrived), self._coming = self._coming, None
        if arrived is not None:
            arrived.synchronize()
        lerp_unless(self._skip, self.changing.local(self._average), self._weights, share)
        if not self._skip:
            for kept, new in zip(self._average.buffers(), self._buffers, strict=True):
                kept.copy_(new)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._coming = None
        super().load_state_dict(state)
