"""Samplers whose noise is not that of the plain reverse SDE: an extended SDE, and restarts of the ODE."""

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
    source_of,
    weighted,
)
from latentgen.diffusion.samplers.single import heun_step


def er_sde(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    s_noise: float = 1.0,
    max_stage: int = 3,
) -> Tensor:
    """ER-SDE-Solver-3 (arXiv 2309.06169): the reverse SDE whose noise is set by phi(s) = s (exp(s^0.3) + 10).

        x_next = r x + phi(s') * integral over [s', s] of x0_hat(u) phi'(u) / phi(u)^2 du + sqrt(s'^2 - r^2 s^2) z

    with r = phi(s') / phi(s); phi(s) = s would be the ODE, phi(s) = s^2 the usual SDE. x0_hat(u) is the polynomial in
    sigma through the last max_stage estimates, integrated exactly. (The paper's Taylor terms take both derivatives from
    backward differences, which is one order less.) One evaluation a step. Raises UserError unless max_stage is 1 to 3.
    """
    if max_stage not in (1, 2, 3):
        raise UserError(f"max_stage {max_stage} of er_sde: choose 1, 2 or 3.")
    history: list[tuple[float, Tensor]] = []
    for i, (sigma, sigma_next) in enumerate(pairwise(levels_of(sigmas, "er_sde", adds_noise=True))):
        x0_hat = denoise(x, batch_of(sigma, x))
        history = [(sigma, x0_hat), *history[: max_stage - 1]]
        if sigma_next == 0:
            x = x0_hat
        else:
            r = math.exp(_log_phi(sigma_next) - _log_phi(sigma))
            moved = x0_hat + r * (x - x0_hat)
            if len(history) > 1:
                weights = _er_weights([at for at, _ in history], sigma, sigma_next)
                moved = moved + weighted(weights[1:], [estimate - x0_hat for _, estimate in history[1:]])
            added = math.sqrt(sigma_next**2 - (r * sigma) ** 2)
            x = moved + added * s_noise * source_of(noise, "er_sde")(sigma, sigma_next)
        if on_step is not None:
            on_step(i, x, x0_hat)
    return x


def _er_weights(nodes: list[float], sigma: float, sigma_next: float) -> list[float]:
    """The integral of `er_sde` for each Lagrange polynomial of the nodes, in the variable v = log(u)."""
    end = _log_phi(sigma_next)

    def density(v: float) -> float:
        u = math.exp(v)
        rise = math.exp(u**0.3)
        return math.exp(end - _log_phi(u)) * (1 + 0.3 * u**0.3 * rise / (rise + 10))  # d log(phi) / d log(u)

    return basis_integrals(nodes, math.log(sigma_next), math.log(sigma), density, node_of=math.exp)


def _log_phi(sigma: float) -> float:
    """log of the noise scale phi (arXiv 2309.06169; SDE_5 in its code); e^(s^0.3) overflows only beyond 3e9."""
    return math.log(sigma) + math.log(math.exp(sigma**0.3) + 10)


def restart(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    restarts: int = 1,
    restart_steps: int = 9,
    t_min: float = 0.1,
    t_max: float = 2.0,
    s_noise: float = 1.0,
) -> Tensor:
    """Restart sampling (arXiv 2306.14878): Heun's method, and at t_min back up to t_max, `restarts` times.

    The way up adds fresh noise, which contracts the errors made so far; the way down takes `restart_steps` Heun steps
    on levels spaced as in arXiv 2206.00364, eq. 5. t_min is rounded to the nearest level of the schedule that is not
    its first or 0; a schedule with none below t_max does not restart. on_step comes once a step of the schedule, after
    its restarts. Raises UserError for a negative number of restarts, no steps, and t_min >= t_max.
    """
    if restarts < 0 or restart_steps < 1 or not 0 < t_min < t_max:
        raise UserError(
            f"restart: {restarts} restarts of {restart_steps} steps from t_max {t_max} to t_min {t_min}: choose "
            "restarts >= 0, restart_steps >= 1 and 0 < t_min < t_max."
        )
    levels = levels_of(sigmas, "restart", adds_noise=restarts > 0)
    clock = clock_of(levels)
    inner = [level for level in levels[1:] if 0 < level < t_max]
    foot = min(inner, key=lambda level: abs(level - t_min)) if inner else None
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        x, x0_hat = heun_step(denoise, x, sigma, sigma_next, clock)
        if foot is not None and sigma_next == foot:
            for _ in range(restarts):
                fresh = source_of(noise, "restart")(foot, t_max)
                x = x + math.sqrt(t_max**2 - foot**2) * s_noise * fresh  # back up, by the forward process
                for above, below in pairwise(_restart_levels(t_max, foot, restart_steps)):
                    x, _ = heun_step(denoise, x, above, below, clock)
        if on_step is not None:
            on_step(i, x, x0_hat)
    return x


def _restart_levels(high: float, low: float, n: int, rho: float = 7.0) -> list[float]:
    """n + 1 levels from high to low, both exact."""
    a, b = high ** (1 / rho), low ** (1 / rho)
    return [high, *((a + k / n * (b - a)) ** rho for k in range(1, n)), low]
