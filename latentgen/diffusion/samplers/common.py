"""What the samplers share: types, levels, ancestral noise, churn and the weights of multistep methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from latentgen.core.errors import UserError

NoiseSource = Callable[[float, float], Tensor]
"""noise(sigma, sigma_next) -> standard normal like x. Down (sigma_next < sigma) it is the normalised increment of a
path, so that touching intervals are independent and overlapping ones correlated; up, every call draws afresh."""

OnStep = Callable[[int, Tensor, Tensor], None]
"""on_step(i, x, x0_hat), called after step i with the new x and the estimate that step started from."""

Sampler = Callable[..., Tensor]

FAR = 200.0
"""A noise level above those of every process that steps in sigma were made for: EDM ends at 80. Flow models and tables
of zero terminal SNR start above it."""


def levels_of(sigmas: Tensor, who: str, *, adds_noise: bool = False) -> list[float]:
    """The levels of a schedule as floats, read once. They descend; or they ascend, for inversion.

    Raises UserError if they do neither, if an ascending schedule starts at 0 (no slope is defined there) and for an
    ascending schedule where the sampler adds noise, which belongs to the way down only.
    """
    levels = sigmas.tolist()
    if not all(math.isfinite(level) and level >= 0 for level in levels):
        raise UserError("sigmas: every level must be finite and not negative.")
    if all(a > b for a, b in pairwise(levels)):
        return levels
    if not all(a < b for a, b in pairwise(levels)):
        raise UserError("sigmas: the levels must descend, or all ascend for inversion, without repeating one.")
    if adds_noise:
        raise UserError(f"{who} adds noise and only goes down: invert with a deterministic sampler such as ddim.")
    if levels[0] == 0:
        raise UserError("sigmas: inversion cannot start at 0; start at the model's sigma_min.")
    return levels


def batch_of(sigma: float, x: Tensor) -> Tensor:
    """sigma for every example of x. [b], float32 or wider."""
    return torch.full((x.shape[0],), sigma, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def source_of(noise: NoiseSource | None, who: str) -> NoiseSource:
    """The source of noise that the sampler `who` cannot do without.

    Raises:
        UserError: there is none.
    """
    if noise is None:
        raise UserError(f"{who} adds noise at every step: pass noise=, a function of (sigma, sigma_next).")
    return noise


def check_eta(eta: float) -> None:
    """Raise `UserError` unless `eta`, the share of ancestral noise, is in [0, 1]."""
    if not 0 <= eta <= 1:
        raise UserError(f"eta {eta}: choose it between 0 (deterministic) and 1 (ancestral).")


def ancestral_split(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """(down, up) with down^2 + up^2 = sigma_next^2: the level to step down to, and the new noise that makes up for it.

    For eta = 1 `up` is the spread of q(x_next | x, x0) (arXiv 2010.02502, eq. 16, divided by alpha of the next level).
    The split is of noise over signal, so it holds for every process whose x / signal is x0 + sigma * noise: eps and v
    models and flow models alike. Where other tools need a second formula for flow (they split x_t itself and rescale
    the signal by (1 - t_next) / (1 - t_down)), that rescaling is the change of variable to these coordinates.
    """
    up = eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2) if eta > 0 else 0.0
    return math.sqrt(sigma_next**2 - up**2), up


def line(x: Tensor, x0_hat: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """The point at sigma_next on the line through x (at sigma) and x0_hat (at 0): an Euler step."""
    # x + (sigma_next - sigma) * (x - x0_hat) / sigma, so written that a step to 0 gives x0_hat itself
    return x0_hat + (sigma_next / sigma) * (x - x0_hat)


@dataclass(frozen=True)
class Clock:
    """What the slopes of a method are taken over, and averaged or extrapolated: sigma, or the time t of flow models.

        over sigma   dx / dsigma = (x - x0_hat) / sigma
        over t       dx_t / dt = (x - x0_hat) / sigma - x0_hat,   x_t = x / (1 + sigma),   t = sigma / (1 + sigma)

    For methods of first order and for those in log(sigma) this makes no difference. Others overshoot over sigma where
    the levels begin far above the data: the first of ten steps of a flow model leads from 999 to 9, and Heun's method
    would weigh the second estimate with 999 / (2 * 9).
    """

    over_t: bool

    def time(self, sigma: float) -> float:
        return sigma / (1 + sigma) if self.over_t else sigma

    def slope(self, x: Tensor, x0_hat: Tensor, sigma: float) -> Tensor:
        """[b, c, h, w], for sigma > 0."""
        slope = (x - x0_hat) / sigma
        return slope - x0_hat if self.over_t else slope

    def moved(self, x: Tensor, sigma: float, sigma_next: float, distance: Tensor) -> Tensor:
        """x at sigma_next, from x at sigma and the integral of the slope between. [b, c, h, w]."""
        return (x / (1 + sigma) + distance) * (1 + sigma_next) if self.over_t else x + distance


def clock_of(levels: Sequence[float]) -> Clock:
    """Over t for schedules that reach above FAR, over sigma for all others."""
    return Clock(over_t=max(levels) > FAR)


def churn_of(s_churn: float, n: int) -> float:
    """Relative rise of sigma before each step (arXiv 2206.00364, algorithm 2, gamma_i)."""
    if s_churn < 0:
        raise UserError(f"s_churn {s_churn}: it must not be negative (0 adds no noise).")
    return min(s_churn / n, math.sqrt(2) - 1) if n > 0 else 0.0


def churned(x: Tensor, sigma: float, gamma: float, s_noise: float, noise: NoiseSource | None) -> tuple[Tensor, float]:
    """x and sigma after fresh noise has raised the level by the factor 1 + gamma (lines 4 to 6 there)."""
    sigma_hat = sigma * (1 + gamma)
    fresh = source_of(noise, "s_churn > 0")(sigma, sigma_hat)
    return x + math.sqrt(sigma_hat**2 - sigma**2) * s_noise * fresh, sigma_hat


def weighted(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """The sum of weights * values."""
    assert len(weights) == len(values) > 0
    total = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = total + weight * value
    return total


def _same(u: float) -> float:
    return u


def basis_integrals(
    nodes: Sequence[float],
    start: float,
    end: float,
    density: Callable[[float], float],
    node_of: Callable[[float], float] = _same,
) -> list[float]:
    """Integrals over [start, end] of each Lagrange polynomial of `nodes`, times a density.

    A multistep method replaces its integrand by the polynomial through the last few values; these are the weights of
    those values. node_of(u) is the variable of the polynomials, where it is not the variable of integration.
    """
    weights = [0.0] * len(nodes)
    for point, share in _gauss_legendre(16):
        u = start + (end - start) * (point + 1) / 2
        scale = share * (end - start) / 2 * density(u)
        at = node_of(u)
        for j, node in enumerate(nodes):
            others = [other for k, other in enumerate(nodes) if k != j]
            weights[j] += scale * math.prod((at - other) / (node - other) for other in others)
    return weights


@lru_cache(maxsize=4)
def _gauss_legendre(n: int) -> tuple[tuple[float, float], ...]:
    """Points in (-1, 1) and weights of the n-point rule, by Newton's method on the Legendre polynomial."""
    rule = []
    for i in range(n):
        z = math.cos(math.pi * (i + 0.75) / (n + 0.5))
        slope = 1.0
        for _ in range(100):
            previous, value = 1.0, z
            for k in range(2, n + 1):
                previous, value = value, ((2 * k - 1) * z * value - (k - 1) * previous) / k
            slope = n * (z * value - previous) / (z * z - 1)
            step = value / slope
            z -= step
            if abs(step) < 1e-15:
                break
        rule.append((z, 2 / ((1 - z * z) * slope**2)))
    return tuple(rule)
