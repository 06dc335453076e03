"""How training draws noise levels.

A density maps a uniform draw u [b] in [0, 1] to sigma [b] through its inverse cumulative distribution. Randomness comes
from outside; stratifying u over the whole batch therefore stratifies every density. Rounding may bring u to 0 or 1
exactly: every density is finite there, because sigma stays in [sigma_min, sigma_max].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.diffusion.parameterization import Parameterization

Density = Callable[..., Tensor]
"""density(u: [b], parameterization, **knobs) -> sigma: [b]."""


def stratified(u: Tensor, positions: Tensor, global_batch: int) -> Tensor:
    """One uniform draw per stratum of the GLOBAL batch: (positions + u) / global_batch. [b].

    u [b] in [0, 1). positions [b] integers: the entries of one permutation of range(global_batch), drawn once per step,
    that belong to these examples. Each of the `global_batch` equal strata then gets exactly one level however the batch
    is split into ranks and micro-batches, and which example gets which stratum changes from step to step.
    """
    if global_batch < 1:
        raise UserError(f"global batch of {global_batch}: it must be at least 1.")
    return ((positions + u) / global_batch).to(u.dtype)


def uniform(u: Tensor, parameterization: Parameterization) -> Tensor:
    """Uniform in the parameterization's own time. [b].

    For eps, v and x0 time is continuous in [0, T-1] and the table is interpolated: integer times are a grid the paper
    needed and a network does not, and fractional ones keep the strata distinct when the batch is larger than T.
    """
    return parameterization.sigma_of_fraction(u)


def logit_normal(u: Tensor, parameterization: Parameterization, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Time t in (0, 1) with logit(t) ~ Normal(mean, std) (arXiv 2403.03206, eq. 19). [b].

    For flow t is the path's own time, so log(sigma) ~ Normal(mean, std); for eps, v and x0, t = timestep / (T - 1).
    """
    _positive(std, "std of the logit-normal density")
    t = torch.sigmoid(mean + std * torch.special.ndtri(u))
    return parameterization.sigma_of_fraction(t)


def log_normal(u: Tensor, parameterization: Parameterization, *, p_mean: float = -1.2, p_std: float = 1.2) -> Tensor:
    """log(sigma) ~ Normal(p_mean, p_std) (arXiv 2206.00364, table 1), held in [sigma_min, sigma_max]. [b]."""
    _positive(p_std, "p_std of the log-normal density")
    sigma = torch.exp(p_mean + p_std * torch.special.ndtri(u))
    return sigma.clamp(parameterization.sigma_min, parameterization.sigma_max)


def _positive(value: float, name: str) -> None:
    if not value > 0:
        raise UserError(f"{name} is {value}: it must be above 0.")


DENSITIES: Mapping[str, Density] = {
    "uniform": uniform,
    "logit_normal": logit_normal,
    "log_normal": log_normal,
}
