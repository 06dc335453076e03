"""How training draws noise levels.

A density maps a uniform draw u [b] in [0, 1] to sigma [b] through its inverse cumulative distribution. Randomness comes
from outside; stratifying u over the whole batch therefore stratifies every density. Rounding may bring u to 0 or 1
exactly: every density is finite there, because sigma stays in [sigma_min, sigma_max].
"""

from __future__ import annotations

import math
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


def cosine_interpolated(
    u: Tensor,
    parameterization: Parameterization,
    *,
    image_d: float = 64.0,
    noise_d_low: float = 32.0,
    noise_d_high: float = 64.0,
) -> Tensor:
    """The cosine process, shifted for the size of the picture and interpolated (arXiv 2301.11093). [b].

    With log SNR(t) = -2 log tan(pi t / 2) for pictures of side d, one of side image_d needs
    log SNR + 2 log(d / image_d) for the same noise on its coarse features. That is done for both noise_d_low and
    noise_d_high, each over the process's own sigma_min to sigma_max, and

        log SNR(u) = u * (log SNR shifted to noise_d_low) + (1 - u) * (log SNR shifted to noise_d_high)

    so noise_d_low counts at the noisy end, u = 1, noise_d_high at the clean end, whose fine features do not grow with
    the picture. The three sides are in one unit, pixels or latents; both equal to image_d is the plain cosine process.
    SNR is 1 / sigma^2, that of data of unit variance.
    """
    for name, side in (("image_d", image_d), ("noise_d_low", noise_d_low), ("noise_d_high", noise_d_high)):
        _positive(side, f"{name} of the cosine-interpolated density")
    ends = parameterization.sigma_min, parameterization.sigma_max
    low, high = (_log_sigma_cosine(u, *ends, image_d / side) for side in (noise_d_low, noise_d_high))
    return torch.lerp(high, low, u).exp().clamp(*ends)


def _log_sigma_cosine(u: Tensor, sigma_min: float, sigma_max: float, shift: float) -> Tensor:
    """log(sigma) of the cosine process times `shift`, from sigma_min at u = 0 to sigma_max at u = 1. [b]."""
    start, end = math.atan(sigma_min / shift), math.atan(sigma_max / shift)
    return torch.tan(start + u * (end - start)).log() + math.log(shift)


def importance(
    u: Tensor,
    parameterization: Parameterization,
    log_error: Callable[[Tensor], Tensor],
    *,
    share: float = 0.9,
    cells: int = 256,
) -> tuple[Tensor, Tensor]:
    """Draw levels as often as their loss is large, and weigh them down by as much. sigma [b], weight [b].

    The variance of the loss is least when p(level) ~ sqrt(E[loss^2]) (arXiv 2102.09672, eq. 18). log_error(sigma: [n])
    -> [n] is the logarithm of the mean loss, learned along (`LogVariance`): where the spread of the loss goes with its
    mean, exp of it is that root up to a factor. So there is no history to keep, and every process that holds the same
    weights draws the same levels. The weight is 1 / p, so that the expected loss is that of the `uniform` density.

    The process's own time is cut into `cells`; `1 - share` of the draws stay uniform, which bounds the weights.
    """
    middles = (torch.arange(cells, device=u.device, dtype=torch.float32) + 0.5) / cells
    learned = torch.softmax(log_error(parameterization.sigma_of_fraction(middles)).float(), dim=0)
    p = share * learned * cells + (1 - share)  # mean 1
    edges = torch.cat([p.new_zeros(1), torch.cumsum(p.double(), dim=0) / p.double().sum()])
    cell = (torch.searchsorted(edges, u.double(), right=True) - 1).clamp(0, cells - 1)
    inside = ((u - edges[cell]) / (edges[cell + 1] - edges[cell])).clamp(0, 1)
    fraction = ((cell + inside) / cells).to(u.dtype)
    return parameterization.sigma_of_fraction(fraction), (1 / p)[cell]


def _positive(value: float, name: str) -> None:
    if not value > 0:
        raise UserError(f"{name} is {value}: it must be above 0.")


DENSITIES: Mapping[str, Density] = {
    "uniform": uniform,
    "logit_normal": logit_normal,
    "log_normal": log_normal,
    "cosine_interpolated": cosine_interpolated,
}
