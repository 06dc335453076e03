"""DPM-Solver++ and its stochastic relatives: exponential integrators of the estimate x0_hat in lambda = -log(sigma).

With alpha = 1 all of them discretise one formula (arXiv 2211.01095: the exact solution for data prediction, and for
eta = 1 its SDE-DPM-Solver++), where k = 1 + eta and h = lambda_next - lambda:

    x_next = exp(-k h) x + integral over [0, h] of k exp(-k (h - u)) x0_hat(u) du + added * z
    added^2 = sigma_next^2 (1 - exp(-2 eta h))

eta = 0 is the probability flow and eta = 1 the reverse SDE; both have the same marginals. Between them this eta is that
of `dpmpp_2m_sde` and `dpmpp_3m_sde`, as in k-diffusion; the other two split each step as `ancestral_split` does, whose
eta^2 corresponds to it in small steps.
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
    ancestral_split,
    basis_integrals,
    batch_of,
    check_eta,
    levels_of,
    line,
    source_of,
    weighted,
)


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
    previous: Tensor | None = None
    h_previous = 0.0
    for i, (sigma, sigma_next) in enumerate(pairwise(levels_of(sigmas, "dpmpp_2m"))):
        x0_hat = denoise(x, batch_of(sigma, x))
        h = math.log(sigma / sigma_next) if sigma_next > 0 else math.inf
        estimate = x0_hat
        if previous is not None and sigma_next > 0:
            r = h_previous / h
            estimate = x0_hat + (x0_hat - previous) / (2 * r)  # D_i of algorithm 2: (1 + 1/2r) x0_hat - (1/2r) previous
        x = line(x, estimate, sigma, sigma_next)  # algorithm 2: ratio * x - (exp(-h) - 1) * estimate, ratio = exp(-h)
        previous, h_previous = x0_hat, h
        if on_step is not None:
            on_step(i, x, x0_hat)
    return x


def dpmpp_2s_ancestral(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """DPM-Solver++(2S) (arXiv 2211.01095, algorithm 1, r = 1/2) down to the ancestral level, then noise.

    Second order for eta = 0. Two evaluations a step, except the step to 0.
    """
    check_eta(eta)
    levels = levels_of(sigmas, "dpmpp_2s_ancestral", adds_noise=eta > 0)
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        x0_hat = denoise(x, batch_of(sigma, x))
        down, up = ancestral_split(sigma, sigma_next, eta)
        estimate = x0_hat
        if down > 0:
            middle = math.sqrt(sigma * down)
            estimate = denoise(line(x, x0_hat, sigma, middle), batch_of(middle, x))  # D_i with 1 / (2 r) = 1
        x = line(x, estimate, sigma, down)
        if up > 0:
            x = x + up * s_noise * source_of(noise, "dpmpp_2s_ancestral")(sigma, sigma_next)
        if on_step is not None:
            on_step(i, x, x0_hat)
    return x


def dpmpp_sde(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
) -> Tensor:
    """A stochastic DPM-Solver++(2S), as in k-diffusion: both stages are ancestral and follow one noise path.

    r places the middle stage in log(sigma). Second order for eta = 0. Two evaluations a step, except the step to 0.
    """
    check_eta(eta)
    if not 0 < r <= 1:
        raise UserError(f"r {r} of dpmpp_sde: choose it above 0 and at most 1 (0.5 is usual).")
    for i, (sigma, sigma_next) in enumerate(pairwise(levels_of(sigmas, "dpmpp_sde", adds_noise=eta > 0))):
        x0_hat = denoise(x, batch_of(sigma, x))
        estimate = x0_hat
        down, up = ancestral_split(sigma, sigma_next, eta)
        if sigma_next > 0:
            middle = sigma * (sigma_next / sigma) ** r
            middle_down, middle_up = ancestral_split(sigma, middle, eta)
            x_middle = line(x, x0_hat, sigma, middle_down)
            if middle_up > 0:
                x_middle = x_middle + middle_up * s_noise * source_of(noise, "dpmpp_sde")(sigma, middle)
            x0_middle = denoise(x_middle, batch_of(middle, x))
            estimate = x0_hat + (x0_middle - x0_hat) / (2 * r)  # D_i of algorithm 1
        x = line(x, estimate, sigma, down)
        if up > 0:
            x = x + up * s_noise * source_of(noise, "dpmpp_sde")(sigma, sigma_next)
        if on_step is not None:
            on_step(i, x, x0_hat)
    return x


def dpmpp_2m_sde(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver_type: str = "midpoint",
) -> Tensor:
    """SDE-DPM-Solver++(2M): `dpmpp_2m` for the reverse SDE. One evaluation a step, second order for eta = 0.

    solver_type   midpoint | heun: how the slope of x0_hat enters; they differ by third-order terms.
    """
    check_eta(eta)
    if solver_type not in ("midpoint", "heun"):
        raise UserError(f"solver_type {solver_type!r} of dpmpp_2m_sde: choose midpoint or heun.")
    previous: Tensor | None = None
    h_previous = 0.0
    for i, (sigma, sigma_next) in enumerate(pairwise(levels_of(sigmas, "dpmpp_2m_sde", adds_noise=eta > 0))):
        x0_hat = denoise(x, batch_of(sigma, x))
        if sigma_next == 0:
            x = x0_hat
        else:
            h = math.log(sigma / sigma_next)
            kh = (1 + eta) * h
            slope_weight = 0.5 * -math.expm1(-kh) if solver_type == "midpoint" else 1 + math.expm1(-kh) / kh
            moved = x0_hat + math.exp(-kh) * (x - x0_hat)
            if previous is not None:
                moved = moved + slope_weight * (h / h_previous) * (x0_hat - previous)
            if eta > 0:
                added = sigma_next * math.sqrt(-math.expm1(-2 * eta * h))
                moved = moved + added * s_noise * source_of(noise, "dpmpp_2m_sde")(sigma, sigma_next)
            x, previous, h_previous = moved, x0_hat, h
        if on_step is not None:
            on_step(i, x, x0_hat)
    return x


def dpmpp_3m_sde(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """DPM-Solver++(3M) for the reverse SDE: the parabola in lambda through three estimates, integrated exactly.

    One evaluation a step, third order for eta = 0. k-diffusion and diffusers give the second derivative half its
    weight (1/2 f'' u^2 needs f'' = 2 f[u0, u1, u2]; they use f[u0, u1, u2]), which leaves second order; this does not.
    """
    check_eta(eta)
    history: list[tuple[float, Tensor]] = []  # newest first: lambda, x0_hat
    for i, (sigma, sigma_next) in enumerate(pairwise(levels_of(sigmas, "dpmpp_3m_sde", adds_noise=eta > 0))):
        x0_hat = denoise(x, batch_of(sigma, x))
        history = [(-math.log(sigma), x0_hat), *history[:2]]
        if sigma_next == 0:
            x = x0_hat
        else:
            start, h, k = -math.log(sigma), math.log(sigma / sigma_next), 1 + eta
            moved = x0_hat + math.exp(-k * h) * (x - x0_hat)
            if len(history) > 1:
                nodes = [at - start for at, _ in history]
                weights = basis_integrals(nodes, 0.0, h, lambda u, h=h, k=k: k * math.exp(-k * (h - u)))
                moved = moved + weighted(weights[1:], [estimate - x0_hat for _, estimate in history[1:]])
            if eta > 0:
                added = sigma_next * math.sqrt(-math.expm1(-2 * eta * h))
                moved = moved + added * s_noise * source_of(noise, "dpmpp_3m_sde")(sigma, sigma_next)
            x = moved
        if on_step is not None:
            on_step(i, x, x0_hat)
    return x
