"""Noise for stochastic samplers: one Brownian path for every picture, a function of the picture's seed alone.

The path's time is the signal-to-noise ratio c = 1 / sigma^2. The noise that the reverse SDE adds between two levels is
then the path's increment itself, weighted by nothing else: with w the Wiener process of dx = sqrt(2 s) dw (arXiv
2206.00364, eq. 6), the noise collected from sigma down to sigma' is

    sigma'^2 * integral of sqrt(2 s) / s^2 dw = sigma'^2 (B(1 / sigma'^2) - B(1 / sigma^2)),  d(1 / s^2) = 2 s / s^4 ds

So the same seed follows the same path however many steps cut it; while x0_hat stands still even the result is the same.

B is a virtual Brownian tree (arXiv 2001.01328, section 4): halving log(sigma) again and again down to the level asked
for, each midpoint drawn from the Brownian bridge between its neighbours with a generator keyed by the seed and the
midpoint's place. Nothing is stored, the tree does not depend on the schedule, and all draws are made on the CPU, so
neither the device nor the batch matters. Below 2^-25 octaves the path is a straight line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.core.rand import generator
from latentgen.diffusion.samplers.common import NoiseSource

OCTAVES = 32.0
"""The tree spans sigma from 2^-32 to 2^32."""
DEPTH = 31
"""Halvings of its 64 octaves; the last is finer than float32 tells levels apart (2^-23 of their size)."""


def brownian(seed: int, shape: Sequence[int], sigma: float) -> Tensor:
    """B at c = 1 / sigma^2, variance c: the path of `seed`. Shape `shape`, float64, on the CPU.

    Raises UserError for sigma outside 2^-32 .. 2^32.
    """
    if not 2.0**-OCTAVES <= sigma <= 2.0**OCTAVES:
        raise UserError(f"noise at sigma {sigma:g}: levels must lie between 2^-32 and 2^32.")
    place = (OCTAVES - math.log2(sigma)) / (
        2 * OCTAVES
    )  # 0 at the largest level, where c is smallest; 1 at the smallest
    left, right = 0.0, 1.0
    b_left = math.sqrt(_time_of(left)) * _normal(seed, shape, "start", 0)
    b_right = b_left + math.sqrt(_time_of(right) - _time_of(left)) * _normal(seed, shape, "end", 0)
    index = 1  # of the midpoint in a binary heap
    for _ in range(DEPTH):
        middle = (left + right) / 2
        c_left, c, c_right = _time_of(left), _time_of(middle), _time_of(right)
        share = (c - c_left) / (c_right - c_left)
        spread = math.sqrt((c - c_left) * (1 - share))  # the bridge's variance: (c - c_left)(c_right - c) / whole
        b_middle = torch.lerp(b_left, b_right, share) + spread * _normal(seed, shape, "middle", index)
        if place < middle:
            right, b_right, index = middle, b_middle, 2 * index
        else:
            left, b_left, index = middle, b_middle, 2 * index + 1
    c_left, c_right = _time_of(left), _time_of(right)
    return torch.lerp(b_left, b_right, (sigma**-2 - c_left) / (c_right - c_left))


def brownian_noise(seeds: Sequence[int], x: Tensor) -> NoiseSource:
    """A noise source for a batch x [b, c, h, w] whose pictures have these seeds.

    Down, noise(sigma, sigma_next) is the path's increment over that interval, divided by its spread: standard normal,
    the same for the same arguments. Up (churn and restarts, which pass a level more than once) every call draws afresh;
    it depends on the seed and on how many such calls came before. [b, c, h, w] with the dtype and device of x.
    """
    assert len(seeds) == len(x)
    shape = tuple(x.shape[1:])
    known: dict[float, Tensor] = {}  # the last levels asked for: a step begins where the one before ended
    ups = 0

    def path(sigma: float) -> Tensor:
        if sigma not in known:
            while len(known) > 2:
                del known[next(iter(known))]
            known[sigma] = torch.stack([brownian(seed, shape, sigma) for seed in seeds])
        return known[sigma]

    def noise(sigma: float, sigma_next: float) -> Tensor:
        nonlocal ups
        if sigma_next < sigma:
            drawn = (path(sigma_next) - path(sigma)) / math.sqrt(sigma_next**-2 - sigma**-2)
        else:
            ups += 1
            drawn = torch.stack([_normal(seed, shape, "up", ups) for seed in seeds])
        return drawn.to(dtype=x.dtype).to(device=x.device)

    return noise


def _time_of(place: float) -> float:
    """c = 1 / sigma^2 at a place of the tree."""
    return 2.0 ** (2 * OCTAVES * (2 * place - 1))


def _normal(seed: int, shape: Sequence[int], name: str, index: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "brownian", name, index)).double()
