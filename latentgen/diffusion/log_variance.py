"""How large an error to expect at each noise level, learned along, so that every level has an equal say.

The error of a trained network differs a hundredfold between noise levels: where noise hides the layout nothing can be
predicted, and there the gradient is mostly noise. Dividing by the expected error leaves what can still be learned.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

HARMONICS = 16
SPAN = math.log(200.0)
"""Levels from 1/200 to 200 are told apart; those beyond share the value at the end."""
GAIN = 10.0
"""The features' scale: the logarithm has to travel several units at the learning rate of a network's weights."""


class LogVariance(nn.Module):
    """u(sigma), the logarithm of the expected error; begins at 0 everywhere (arXiv 2312.02696, after 1705.07115).

    Minimising `error * exp(-u) + u` makes `exp(u)` the mean error at that level, and all levels' errors weigh the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.series = nn.Parameter(torch.zeros(HARMONICS))

    def forward(self, sigma: Tensor) -> Tensor:
        """Noise levels [b], above 0, to u [b]: a cosine series of log sigma."""
        at = (sigma.float().log() / SPAN).clamp(-1, 1) * 0.5 + 0.5
        waves = torch.arange(HARMONICS, device=sigma.device, dtype=torch.float32)
        return GAIN * (torch.cos(math.pi * at[:, None] * waves) * self.series).sum(dim=1)
