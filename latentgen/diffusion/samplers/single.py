"""Single-step samplers: what a step needs, it evaluates itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.diffusion.parameterization import Denoiser
from latentgen.diffusion.samplers.common import (
    Clock,
    NoiseSource,
    OnStep,
    ancestral_split,
    batch_of,
    check_eta,
    churn_of,
    churned,
    clock_of,
    levels_of,
    line,
    source_of,
)

LogVariance = Callable[[Tensor, Tensor, Tensor], Tensor]


def ddim(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> Tensor:
    """Denoising diffusion implicit models (arXiv 2010.02502, eq. 12 and 16).

    With eta = 0 it is `euler` exactly: in these coordinates both draw the line through x and x0_hat. eta = 1 is
    ancestral sampling (arXiv 2006.11239). Raises UserError unless 0 <= eta <= 1, and for eta > 0 without noise.
    """
    check_eta(eta)
    for i, (sigma, sigma_next) in enumerate(pairwise(levels_of(sigmas, "ddim with eta > 0", adds_noise=eta > 0))):
        x0_hat = denoise(x, batch_of(sigma, x))
        down, up = ancestral_split(sigma, sigma_next, eta)
        x = line(x, x0_hat, sigma, down)  # eq. 12
        if up > 0:
            x = x + up * s_noise * source_of(noise, "ddim with eta > 0")(sigma, sigma_next)
        if on_step is not None:
            on_step(i, x, x0_hat)
    return x


def euler_ancestral(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """Ancestral sampling with Euler steps: in these coordinates `ddim`, by the name and default of k-diffusion."""
    return ddim(denoise, x, sigmas, noise=noise, on_step=on_step, eta=eta, s_noise=s_noise)


def ddpm(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    variance: str = "fixed_small",
    log_variance: LogVariance | None = None,
) -> Tensor:
    """Ancestral sampling: the mean of q(x_next | x, x0_hat) and noise of a chosen variance (arXiv 2006.11239, eq. 7).

    variance       fixed_small   that of q(x_next | x, x0), right if the data were one point; equals ddim with eta = 1
                   fixed_large   that of q(x_next | x), right if the data were white (section 3.2, beta tilde and beta)
    log_variance   log_variance(x, sigma [b], sigma_next [b]) -> the logarithm of the variance of x_next, [b, c, h, w],
                   as a network learned it (arXiv 2102.09672, eq. 15). It is asked right after denoise(x, sigma), so one
                   forward pass can serve both, and takes the place of `variance`.

    For the full chain give `trailing` as many steps as the model has times. The step to 0 adds no noise. Raises
    UserError for an unknown variance.
    """
    if variance not in ("fixed_small", "fixed_large"):
        raise UserError(f"variance {variance!r} of ddpm: choose fixed_small or fixed_large.")
    for i, (sigma, sigma_next) in enumerate(pairwise(levels_of(sigmas, "ddpm", adds_noise=True))):
        x0_hat = denoise(x, batch_of(sigma, x))
        kept = (sigma_next / sigma) ** 2
        mean = x0_hat + kept * (x - x0_hat)  # eq. 7 divided by alpha of the next level
        if sigma_next > 0:
            if log_variance is not None:
                spread = (0.5 * log_variance(x, batch_of(sigma, x), batch_of(sigma_next, x))).exp().to(x.dtype)
            elif variance == "fixed_small":
                spread = sigma_next * math.sqrt(1 - kept)
            else:  # (1 + s'^2) - (1 + s'^2)^2 / (1 + s^2): the variance of x' given x if both are white data plus noise
                spread = math.sqrt((1 + sigma_next**2) * (sigma**2 - sigma_next**2) / (1 + sigma**2))
            mean = mean + spread * source_of(noise, "ddpm")(sigma, sigma_next)
        x = mean
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
    levels = levels_of(sigmas, "s_churn > 0", adds_noise=s_churn > 0)
    gamma = churn_of(s_churn, len(levels) - 1)
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        if gamma > 0 and s_tmin <= sigma <= s_tmax:
            x, sigma = churned(x, sigma, gamma, s_noise, noise)
        x0_hat = denoise(x, batch_of(sigma, x))
        x = line(x, x0_hat, sigma, sigma_next)
        if on_step is not None:
            on_step(i, x, x0_hat)
    return x


def heun_step(denoise: Denoiser, x: Tensor, sigma: float, sigma_next: float, clock: Clock) -> tuple[Tensor, Tensor]:
    """One step of Heun's method and the estimate it started from (arXiv 2206.00364, algorithm 1, lines 4 to 8)."""
    x0_hat = denoise(x, batch_of(sigma, x))
    if sigma_next == 0:
        return x0_hat, x0_hat  # Euler: the slope is not defined at 0
    step = clock.time(sigma_next) - clock.time(sigma)
    slope = clock.slope(x, x0_hat, sigma)
    x_euler = clock.moved(x, sigma, sigma_next, step * slope)
    slope_next = clock.slope(x_euler, denoise(x_euler, batch_of(sigma_next, x)), sigma_next)
    return clock.moved(x, sigma, sigma_next, step * 0.5 * (slope + slope_next)), x0_hat


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
    levels = levels_of(sigmas, "s_churn > 0", adds_noise=s_churn > 0)
    gamma, clock = churn_of(s_churn, len(levels) - 1), clock_of(levels)
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        if gamma > 0 and s_tmin <= sigma <= s_tmax:
            x, sigma = churned(x, sigma, gamma, s_noise, noise)
        x, x0_hat = heun_step(denoise, x, sigma, sigma_next, clock)
        if on_step is not None:
            on_step(i, x, x0_hat)
    return x


def dpm2_step(denoise: Denoiser, x: Tensor, sigma: float, sigma_next: float, clock: Clock) -> tuple[Tensor, Tensor]:
    """A step along the slope at the geometric mean of both levels, and the estimate it started from."""
    x0_hat = denoise(x, batch_of(sigma, x))
    if sigma_next == 0:
        return x0_hat, x0_hat
    middle = math.sqrt(sigma * sigma_next)
    x_middle = line(x, x0_hat, sigma, middle)
    slope = clock.slope(x_middle, denoise(x_middle, batch_of(middle, x)), middle)
    return clock.moved(x, sigma, sigma_next, (clock.time(sigma_next) - clock.time(sigma)) * slope), x0_hat


def dpm2(
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
    """The midpoint rule with its midpoint in log(sigma): DPM-Solver-2 with r1 = 1/2 (arXiv 2206.00927).

    Second order; two evaluations a step, except the step to 0. Churn as in `heun`.
    """
    levels = levels_of(sigmas, "s_churn > 0", adds_noise=s_churn > 0)
    gamma, clock = churn_of(s_churn, len(levels) - 1), clock_of(levels)
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        if gamma > 0 and s_tmin <= sigma <= s_tmax:
            x, sigma = churned(x, sigma, gamma, s_noise, noise)
        x, x0_hat = dpm2_step(denoise, x, sigma, sigma_next, clock)
        if on_step is not None:
            on_step(i, x, x0_hat)
    return x


def dpm2_ancestral(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """`dpm2` down to the lower level of the ancestral split, then noise. Two evaluations a step, except to 0."""
    check_eta(eta)
    levels = levels_of(sigmas, "dpm2_ancestral", adds_noise=eta > 0)
    clock = clock_of(levels)
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        down, up = ancestral_split(sigma, sigma_next, eta)
        x, x0_hat = dpm2_step(denoise, x, sigma, down, clock)
        if up > 0:
            x = x + up * s_noise * source_of(noise, "dpm2_ancestral")(sigma, sigma_next)
        if on_step is not None:
            on_step(i, x, x0_hat)
    return x


def lcm(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    s_noise: float = 1.0,
) -> Tensor:
    """Multistep consistency sampling (arXiv 2303.01469, algorithm 1; arXiv 2310.04378, algorithm 3).

    For consistency networks, whose estimate is already a sample: take it and put fresh noise on it. (The first paper's
    time ends at a small epsilon and its noise is sqrt(sigma^2 - epsilon^2); here epsilon is 0, as in the second.)
    With an ordinary denoiser, whose estimate is a mean, the pictures come out smooth.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(levels_of(sigmas, "lcm", adds_noise=True))):
        x0_hat = denoise(x, batch_of(sigma, x))
        x = x0_hat
        if sigma_next > 0:
            x = x0_hat + sigma_next * s_noise * source_of(noise, "lcm")(sigma, sigma_next)
        if on_step is not None:
            on_step(i, x, x0_hat)
    return x
