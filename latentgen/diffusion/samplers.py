"""Samplers: from noise to an image, one page per algorithm.

    sampler(denoise, x, sigmas, *, noise=None, on_step=None, **knobs) -> x

denoise(x [b, c, h, w], sigma [b]) -> x0_hat. sigmas [n + 1] descends and normally ends in 0; it is read once, so keep
it on the CPU. noise(sigma, sigma_next) -> standard normal like x, called only where an algorithm adds noise.
on_step(i, x, x0_hat) is called after step i with the new x and the estimate that step started from.

Pure functions: no progress bar, no `no_grad`, no state, and x is never changed in place. They compute in the dtype of x
(float32 is the sensible one, whatever the network uses) and take coefficients in double precision.

The process is dx/dsigma = (x - x0_hat) / sigma (arXiv 2206.00364, eq. 1 and 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.diffusion import lookup
from latentgen.diffusion.parameterization import Denoiser

NoiseSource = Callable[[float, float], Tensor]
OnStep = Callable[[int, Tensor, Tensor], None]
Sampler = Callable[..., Tensor]


def ddim(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    eta: float = 0.0,
) -> Tensor:
    """Denoising diffusion implicit models (arXiv 2010.02502, eq. 12 and 16).

    With eta = 0 it is `euler` exactly: in these coordinates both draw the line through x and x0_hat. eta = 1 is
    ancestral sampling (arXiv 2006.11239). Raises UserError unless 0 <= eta <= 1, and for eta > 0 without noise.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta {eta}: choose it between 0 (deterministic) and 1 (ancestral).")
    levels = sigmas.tolist()
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        x0_hat = denoise(x, _batch(sigma, x))
        # eq. 16 divided by alpha of the next level: the new noise, and what remains of the old
        added = eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
        kept = math.sqrt(sigma_next**2 - added**2)
        x = x0_hat + (kept / sigma) * (x - x0_hat)  # eq. 12
        if added > 0:
            x = x + added * _source(noise, "ddim with eta > 0")(sigma, sigma_next)
        if on_step is not None:
            on_step(i, x, x0_hat)
    return x


def euler(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Euler steps (arXiv 2206.00364, algorithm 2 without its correction). First order, one evaluation a step.

    s_churn > 0 adds fresh noise before each step at a level in [s_tmin, s_tmax], and then needs `noise`.
    """
    levels = sigmas.tolist()
    gamma = _gamma(s_churn, len(levels) - 1)
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        if gamma > 0 and s_tmin <= sigma <= s_tmax:
            x, sigma = _churned(x, sigma, gamma, s_noise, noise)
        x0_hat = denoise(x, _batch(sigma, x))
        # x + (sigma_next - sigma) * (x - x0_hat) / sigma, so written that the last step gives x0_hat itself
        x = x0_hat + (sigma_next / sigma) * (x - x0_hat)
        if on_step is not None:
            on_step(i, x, x0_hat)
    return x


def heun(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Heun's method (arXiv 2206.00364, algorithm 1; algorithm 2 when s_churn > 0).

    Second order; two evaluations a step, except the step to 0.
    """
    levels = sigmas.tolist()
    gamma = _gamma(s_churn, len(levels) - 1)
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        if gamma > 0 and s_tmin <= sigma <= s_tmax:
            x, sigma = _churned(x, sigma, gamma, s_noise, noise)
        x0_hat = denoise(x, _batch(sigma, x))
        if sigma_next == 0:
            x = x0_hat  # Euler: the slope is not defined at 0
        else:
            slope = (x - x0_hat) / sigma  # line 4 (7 of algorithm 2)
            x_euler = x + (sigma_next - sigma) * slope
            slope_next = (x_euler - denoise(x_euler, _batch(sigma_next, x))) / sigma_next
            x = x + (sigma_next - sigma) * 0.5 * (slope + slope_next)  # line 8 (11 of algorithm 2)
        if on_step is not None:
            on_step(i, x, x0_hat)
    return x


def dpmpp_2m(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), with lambda = -log(sigma).

    Second order with one evaluation a step: the previous estimate is extrapolated. First order on the first step, which
    has no previous estimate, and on the step to 0, which is infinitely long in lambda.
    """
    del noise
    levels = sigmas.tolist()
    previous: Tensor | None = None
    h_previous = 0.0
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        x0_hat = denoise(x, _batch(sigma, x))
        h = math.log(sigma / sigma_next) if sigma_next > 0 else math.inf
        estimate = x0_hat
        if previous is not None and sigma_next > 0:
            r = h_previous / h
            estimate = x0_hat + (x0_hat - previous) / (2 * r)  # D_i of algorithm 2: (1 + 1/2r) x0_hat - (1/2r) previous
        ratio = sigma_next / sigma  # = exp(-h), and alpha = 1
        x = estimate + ratio * (x - estimate)  # algorithm 2: ratio * x - (exp(-h) - 1) * estimate
        previous, h_previous = x0_hat, h
        if on_step is not None:
            on_step(i, x, x0_hat)
    return x


def find_sampler(name: str) -> Sampler:
    """The sampler a user named, by its name here or as other tools call it. Raises UserError."""
    return lookup(SAMPLERS, name, "sampler", ALIASES)


def _batch(sigma: float, x: Tensor) -> Tensor:
    """sigma for every example of x. [b], float32 or wider."""
    return torch.full((x.shape[0],), sigma, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def _source(noise: NoiseSource | None, who: str) -> NoiseSource:
    if noise is None:
        raise UserError(f"{who} adds noise at every step: pass noise=, a function of (sigma, sigma_next).")
    return noise


def _gamma(s_churn: float, n: int) -> float:
    """Relative rise of sigma before each step (arXiv 2206.00364, algorithm 2, the line above the loop)."""
    if s_churn < 0:
        raise UserError(f"s_churn {s_churn}: it must not be negative (0 adds no noise).")
    return min(s_churn / n, math.sqrt(2) - 1) if n > 0 else 0.0


def _churned(x: Tensor, sigma: float, gamma: float, s_noise: float, noise: NoiseSource | None) -> tuple[Tensor, float]:
    """x and sigma after fresh noise has raised the level by the factor 1 + gamma (algorithm 2, lines 4 to 6)."""
    sigma_hat = sigma * (1 + gamma)
    fresh = _source(noise, "s_churn > 0")(sigma, sigma_hat)
    return x + math.sqrt(sigma_hat**2 - sigma**2) * s_noise * fresh, sigma_hat


SAMPLERS: Mapping[str, Sampler] = {
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
}

ALIASES: Mapping[str, str] = {
    "k_euler": "euler",
    "k_heun": "heun",
    "k_dpmpp_2m": "dpmpp_2m",
    "dpm++2m": "dpmpp_2m",
    "dpm++ 2m": "dpmpp_2m",
    "dpm++_2m": "dpmpp_2m",
    "dpm-solver++": "dpmpp_2m",
    "dpmsolver++": "dpmpp_2m",
}
