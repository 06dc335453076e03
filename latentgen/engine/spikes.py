"""Loss spikes: a finite loss far above what it has been is judged before the optimizer moves, like one that is not.

What it has been is a running mean and variance, on the device; every process has the same, of the loss over all of
them. Losses of diffusion vary several-fold from step to step where batches are small, and may be negative (balanced
ones are log-likelihoods). So a spike is only a loss that is `factor` standard deviations above the mean, and above it
by at least the mean's own size. However losses are distributed, at most 1 / (1 + factor^2) of them are (Cantelli's
inequality). For lognormal ones, with standard deviation s of the logarithm, it is the share

    Q(ln(mean + factor * deviation) / s),  mean = exp(s^2 / 2),  deviation = mean * sqrt(exp(s^2) - 1)

where Q is the normal distribution's upper tail: at factor 20, 1e-11 for s = 0.3, 1e-7 for 0.5, 2e-5 for 0.8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

WINDOW = 100
"""Steps over which a loss is remembered: after so many, the weight of the newest one stays 1 / WINDOW."""

WARM = 50
"""Losses that must be known before another one can be far from them."""

IN_ROW = 5
"""Bad steps in a row that are no accident of the data: the weights have gone bad, or the loss has a new level."""

ROW = "in_row"
"""Name of the count among the statistics of a checkpoint; no phase can have it."""


def compared(known: Tensor, loss: Tensor, factor: float, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compare a loss with the ones before it, and take it in unless it is a spike. Elementwise over `...`.

    Args:
        known: `[3, ...]` number of losses up to WINDOW, their mean, their variance.
        loss: `[...]`.
        counts: `[...]` bool; where it is False the loss is neither a spike nor taken in, whatever it is.

    Returns:
        Where it is a spike `[...]` bool, the limit it was held against `[...]`, and what is known now.
    """
    count, mean, variance = known
    limit = mean + torch.maximum(factor * variance.sqrt(), mean.abs())
    limit = torch.where(count >= WARM, limit, torch.inf)
    spike = counts & (loss > limit)
    count = (count + 1).clamp(max=WINDOW)
    off = loss - mean
    # With weight 1 / count these are the plain mean and variance of all so far.
    mean, variance = mean + off / count, (1 - 1 / count) * (variance + off.square() / count)
    return spike, limit, torch.where(counts & ~spike, torch.stack([count, mean, variance]), known)


@dataclass(frozen=True)
class Compared:
    """What became of one phase's loss; tensors that wait on the device.

    Attributes:
        spike: 1 where it is one, else 0.
        limit: above which it would be.
        anew: 1 where it was one too many: the losses before it are forgotten.
    """

    spike: Tensor
    limit: Tensor
    anew: Tensor


class Spikes:
    """The losses of every phase of a stage, and how many steps in a row were bad.

    After `IN_ROW` bad steps in a row a spike is taken for the loss's new level, and statistics begin anew; unless there
    is a good state to go back to (`engine.rollback`), which sets `patient`.

    Args:
        factor: standard deviations that make a spike; None never finds one.

    Attributes:
        row: bad steps in a row, of either kind, 0-d on the device.
    """

    def __init__(self, factor: float | None, device: torch.device) -> None:
        self.factor, self.device = factor, device
        self.patient = False
        self.row = torch.zeros((), device=device)
        self._known: dict[str, Tensor] = {}
        self._nothing = Compared(*torch.tensor([0.0, torch.inf, 0.0], device=device))

    def judge(self, phase: str, loss: Tensor, counts: Tensor) -> Compared:
        """Compare a phase's loss, the mean over all processes, with those before; see `compared`."""
        if self.factor is None:
            return self._nothing
        known = self._known.get(phase)
        if known is None:
            known = torch.zeros(3, device=self.device)
        spike, limit, known = compared(known, loss, self.factor, counts)
        anew = spike & (self.row + 1 >= IN_ROW) & (not self.patient)
        self._known[phase] = known
        self._known = {name: torch.where(anew, torch.zeros_like(own), own) for name, own in self._known.items()}
        return Compared(spike.float(), limit, anew.float())

    def forget(self) -> None:
        """The losses are about to mean something else: another phase begins to train."""
        self._known = {}

    def end(self, skip: Tensor) -> None:
        """After the last phase of a step, which was skipped where `skip` is 1."""
        self.row = torch.where(skip > 0, self.row + 1, torch.zeros_like(self.row))

    def state_dict(self) -> dict[str, Tensor]:
        return {ROW: self.row, **self._known}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        own = {name: value.to(self.device, copy=True) for name, value in state.items()}
        self.row, self._known = own.pop(ROW), own
