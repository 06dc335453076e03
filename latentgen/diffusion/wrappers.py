"""Denoisers made of denoisers."""

from __future__ import annotations

from torch import Tensor

from latentgen.diffusion.parameterization import Denoiser


def masked(denoise: Denoiser, known: Tensor, mask: Tensor) -> Denoiser:
    """Draw only where the mask is 1, and end at what is known elsewhere.

    Args:
        known: `[b, c, h, w]`, the picture's latents.
        mask: `[b, 1, h, w]` of 0 and 1.
    """

    def inside(x: Tensor, sigma: Tensor) -> Tensor:
        times = len(x) // len(known)  # samplers that take many steps at once show every picture once a step
        own, rest = mask.repeat(times, 1, 1, 1), known.repeat(times, 1, 1, 1)
        return own * denoise(x, sigma) + (1 - own) * rest

    return inside
