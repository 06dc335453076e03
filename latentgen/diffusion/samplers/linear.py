"""Linear multistep methods: the slope d = (x - x0_hat) / sigma is remembered, and its trend integrated over the step.

One evaluation a step (`plms`: two in the first). They start as Euler's method and gain an order with every step up to
their own, so with ever smaller steps order two remains, but with a small constant: at the first, largest sigma the
slope hardly changes. The step to 0 extrapolates like any other (`deis`, whose variable is log(sigma), cannot), which
helps where a schedule ends at a large level, as `trailing` does.
"""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.diffusion.parameterization import Denoiser
from latentgen.diffusion.samplers.common import (
    NoiseSource,
    OnStep,
    basis_integrals,
    batch_of,
    clock_of,
    levels_of,
    weighted,
)

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Weights of the last values, newest first, for evenly spaced steps (Adams and Bashforth, as in arXiv 2202.09778)."""


def lms(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    order: int = 4,
) -> Tensor:
    """Adams-Bashforth for uneven steps: the polynomial in sigma through the last `order` slopes, integrated exactly."""
    del noise
    _check_order("lms", order)
    levels = levels_of(sigmas, "lms")
    clock = clock_of(levels)
    history: list[tuple[float, Tensor]] = []
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        x0_hat = denoise(x, batch_of(sigma, x))
        history = [(clock.time(sigma), clock.slope(x, x0_hat, sigma)), *history[: order - 1]]
        if len(history) == 1 and sigma_next == 0:
            x = x0_hat
        else:
            nodes, ends = [at for at, _ in history], (clock.time(sigma), clock.time(sigma_next))
            weights = basis_integrals(nodes, *ends, lambda u: 1.0)
            x = clock.moved(x, sigma, sigma_next, weighted(weights, [slope for _, slope in history]))
        if on_step is not None:
            on_step(i, x, x0_hat)
    return x


def deis(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    order: int = 3,
) -> Tensor:
    """tAB-DEIS (arXiv 2204.13902) in rho = sigma, with polynomials in log(sigma) where the paper's are in its time t.

    The step to 0 is Euler's, as log(0) cannot be extrapolated to.
    """
    del noise
    _check_order("deis", order)
    history: list[tuple[float, Tensor]] = []
    for i, (sigma, sigma_next) in enumerate(pairwise(levels_of(sigmas, "deis"))):
        x0_hat = denoise(x, batch_of(sigma, x))
        history = [(math.log(sigma), (x - x0_hat) / sigma), *history[: order - 1]]
        if sigma_next == 0:
            x = x0_hat
        else:  # the integral of P(log s) ds, with ds = exp(u) du
            nodes = [at for at, _ in history]
            weights = basis_integrals(nodes, math.log(sigma), math.log(sigma_next), math.exp)
            x = x + weighted(weights, [slope for _, slope in history])
        if on_step is not None:
            on_step(i, x, x0_hat)
    return x


def ipndm(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    order: int = 4,
) -> Tensor:
    """Improved PNDM (named in arXiv 2204.13902): Adams-Bashforth weights for even steps, warmed up by lower orders."""
    del noise
    _check_order("ipndm", order)
    levels = levels_of(sigmas, "ipndm")
    clock = clock_of(levels)
    slopes: list[Tensor] = []
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        x0_hat = denoise(x, batch_of(sigma, x))
        slopes = [clock.slope(x, x0_hat, sigma), *slopes[: order - 1]]
        if i == 0 and sigma_next == 0:
            x = x0_hat
        else:
            step = clock.time(sigma_next) - clock.time(sigma)
            x = clock.moved(x, sigma, sigma_next, step * weighted(ADAMS_BASHFORTH[len(slopes) - 1], slopes))
        if on_step is not None:
            on_step(i, x, x0_hat)
    return x


def plms(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Pseudo linear multistep, PNDM without its Runge-Kutta start (arXiv 2202.09778).

    The first step is Heun's: an Euler step, then again with the mean of both slopes. Made for even steps in time
    (`leading`, `trailing`, `linspace`).
    """
    del noise
    levels = levels_of(sigmas, "plms")
    clock = clock_of(levels)
    slopes: list[Tensor] = []
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        x0_hat = denoise(x, batch_of(sigma, x))
        slopes = [clock.slope(x, x0_hat, sigma), *slopes[:3]]
        step = clock.time(sigma_next) - clock.time(sigma)
        if i == 0 and sigma_next == 0:
            x = x0_hat
        elif i == 0:
            x_euler = clock.moved(x, sigma, sigma_next, step * slopes[0])
            slope_next = clock.slope(x_euler, denoise(x_euler, batch_of(sigma_next, x)), sigma_next)
            x = clock.moved(x, sigma, sigma_next, step * 0.5 * (slopes[0] + slope_next))
        else:
            x = clock.moved(x, sigma, sigma_next, step * weighted(ADAMS_BASHFORTH[len(slopes) - 1], slopes))
        if on_step is not None:
            on_step(i, x, x0_hat)
    return x


def _check_order(who: str, order: int) -> None:
    if order not in (1, 2, 3, 4):
        raise UserError(f"order {order} of {who}: choose 1, 2, 3 or 4.")
