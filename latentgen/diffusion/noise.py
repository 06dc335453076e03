"""The noise that training adds, where it is not simply standard normal.

Each function turns standard normal noise [b, c, h, w] into another kind. Randomness comes from outside, so that a draw
is a function of the step and of the example's place in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from latentgen.core.errors import UserError
from latentgen.diffusion.parameterization import per_example


def offset(noise: Tensor, shift: Tensor, strength: float) -> Tensor:
    """noise + strength * shift: also the mean of each channel is noised, so that brightness is learned.

    shift is standard normal [b, c, 1, 1]. It is the "noise offset" of other trainers, usually 0.05 to 0.1.
    """
    if not strength >= 0:
        raise UserError(f"offset_noise is {strength}: it must not be negative (0 is none, 0.1 is usual).")
    return noise + strength * shift


def pyramid_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """The coarser grids of `pyramid`: halved again and again, down to one cell."""
    sizes = []
    while (height, width) != (1, 1):
        height, width = math.ceil(height / 2), math.ceil(width / 2)
        sizes.append((height, width))
    return sizes


def pyramid(noise: Tensor, coarser: Sequence[Tensor], discount: float) -> Tensor:
    """noise plus blocks of ever coarser noise, each grid `discount` times as strong as the one before. [b, c, h, w].

    coarser is standard normal, [b, c, *size] for each of `pyramid_sizes`. Divided by its standard deviation, which is
    known, so every value stays standard normal by itself; neighbours go together. Known as pyramid or multi-resolution
    noise; other trainers use a discount of 0.3 to 0.8.
    """
    if not 0 <= discount < 1:
        raise UserError(f"pyramid_discount is {discount}: choose it between 0 (none) and 1.")
    total, strength, variance = noise, 1.0, 1.0
    for grid in coarser:
        strength *= discount
        total = total + strength * functional.interpolate(grid, noise.shape[-2:], mode="nearest")
        variance += strength**2
    return total / math.sqrt(variance)


def perturbed(noise: Tensor, fresh: Tensor, strength: float) -> Tensor:
    """The noise that the network's INPUT gets: noise + strength * fresh (arXiv 2301.11706: gamma = 0.1).

    The target keeps the noise itself, so the network learns to work with inputs that are slightly off, as they are
    while sampling.
    """
    if not strength >= 0:
        raise UserError(f"input_perturbation is {strength}: it must not be negative (0 is none, 0.1 is usual).")
    return noise + strength * fresh


def student(noise: Tensor, u: Tensor, augmented_dim: float) -> Tensor:
    """The noise of PFGM++ with D = augmented_dim: noise * `student_scale`. [b, c, h, w], from u [b] in [0, 1)."""
    return noise * per_example(student_scale(u, augmented_dim), noise).to(device=noise.device, dtype=noise.dtype)


def student_scale(u: Tensor, augmented_dim: float) -> Tensor:
    """sqrt(D / chi2), chi2 being chi-square distributed with D degrees of freedom. u [b] in [0, 1) -> [b], float64.

    The kernel of PFGM++ is p_r(x | x0) ~ 1 / (|x - x0|^2 + r^2)^((N + D) / 2), and r = sigma sqrt(D) (arXiv
    2302.04265). That is a multivariate Student t: R^2 / r^2 = |x - x0|^2 / r^2, there drawn through a beta
    variable, is distributed as chi2_N / chi2_D, so x - x0 = sigma * g * sqrt(D / chi2_D) with g standard normal. With D
    to infinity the factor goes to 1. u is the quantile of chi2: one number for an example.
    """
    if not 0 < augmented_dim < math.inf:
        raise UserError(f"augmented_dim is {augmented_dim}: it must be above 0, and finite (thousands are near EDM).")
    # float32 draws are multiples of 2^-24: the middle of each keeps the quantile off 0 and 1
    u = (u.double() + 2.0**-25).clamp(max=1 - 2.0**-53)
    half = augmented_dim / 2
    shape, low = torch.full_like(u, half), torch.full_like(u, -745.0)
    high = torch.full_like(u, math.log(half + 40 * math.sqrt(half + 40)))
    for _ in range(64):  # halving, in log(chi2 / 2): gammainc is its distribution function
        middle = (low + high) / 2
        under = torch.special.gammainc(shape, middle.exp()) < u
        low, high = torch.where(under, middle, low), torch.where(under, high, middle)
    return torch.exp(0.5 * (math.log(half) - (low + high) / 2))
