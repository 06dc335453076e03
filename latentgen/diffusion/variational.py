"""The variational bound: how many bits the model spends on the data, and a variance learned by lowering it.

    -log p(x_0) <= KL(q(x_T | x_0), prior) + sum_t KL(q(x_s | x_t, x_0), p(x_s | x_t)) - log p(x_0 | x_1)
                                                                                     arXiv 2006.11239, eq. 5
    p(x_s | x_t) = Normal(mean of q with x0_hat for x0, exp(log_variance))

Here s is the level below t; the last step, to sigma = 0, is the decoder's. Everything is in variance-exploding
coordinates, where a KL divergence is what it is in any other. Results are in bits per dimension.

The data of this project are latents, real numbers, so the decoder is a Gaussian density and bits may be negative, as
differential entropy may. For pixels `discretised_log_likelihood` gives the probability of each of 256 values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from latentgen.diffusion.forward import diffuse, posterior
from latentgen.diffusion.parameterization import Denoiser, per_example

LogVariances = Callable[[Tensor, Tensor, Tensor], Tensor]
"""log_variances(x: [b, c, h, w], sigma: [b], sigma_next: [b]) -> log-variance of p(x_s | x_t), [b, c, h, w]."""


# --- variances of the reverse step ------------------------------------------------------------------------------------


def log_variance_range(sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of the smallest and the largest sensible variance of p(x_s | x_t). Each [b].

    The smallest, `beta-tilde`, is right for data that is a single point, the largest, `beta`, for standard normal data
    (arXiv 2006.11239, section 3.2), both of them exactly. At sigma_next = 0 the smallest would be 0; half of the
    largest stands for it, which is what the ratio is on the step before where betas are equal.
    """
    fresh = sigma**2 - sigma_next**2
    large = fresh * (1 + sigma_next**2) / (1 + sigma**2)
    small = torch.where(sigma_next > 0, fresh * (sigma_next / sigma) ** 2, large / 2)
    return small.log(), large.log()


def interpolated_log_variance(head: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """The learned variance: v log(beta) + (1 - v) log(beta-tilde) (arXiv 2102.09672, eq. 15). [b, c, h, w].

    head [b, c, h, w] is the second half of the network's channels, v = (head + 1) / 2: a head of -1 asks for the small
    variance, 1 for the large one, and nothing keeps it between.
    """
    small, large = (per_example(bound, head) for bound in log_variance_range(sigma, sigma_next))
    return torch.lerp(small.expand_as(head), large.expand_as(head), (head.to(small.dtype) + 1) / 2)


# --- likelihoods and divergences, elementwise -------------------------------------------------------------------------


def gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL(Normal(mean, variance), Normal(other_mean, other_variance)), elementwise, in nats."""
    gap = log_variance - other_log_variance
    return 0.5 * (torch.expm1(gap) - gap + (mean - other_mean) ** 2 * torch.exp(-other_log_variance))


def gaussian_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Logarithm of the normal density, elementwise, in nats."""
    return -0.5 * (math.log(2 * math.pi) + log_variance + (x - mean) ** 2 * torch.exp(-log_variance))


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Logarithm of the probability of a pixel's bin under a normal density, elementwise (arXiv 2006.11239, eq. 13).

    x holds the 256 values -1, ..., 1 in steps of 2/255; the bins of both ends reach to infinity, so that the 256
    probabilities sum to 1.
    """
    half, scale = 1 / 255, torch.exp(-0.5 * log_variance)
    above, below = (x + half - mean) * scale, (x - half - mean) * scale
    log_cdf = torch.special.log_ndtr
    # From the side where both tails are small, or the difference would be 1 - 1.
    mirrored = below > 0
    low, high = torch.where(mirrored, -above, below), torch.where(mirrored, -below, above)
    inside = log_cdf(high) + torch.log1p(-torch.exp(log_cdf(low) - log_cdf(high)).clamp(max=1 - 1e-7))
    ends = torch.where(x < -1 + half, log_cdf(above), log_cdf(-below))
    return torch.where((x < -1 + half) | (x > 1 - half), ends, inside)


# --- the bound --------------------------------------------------------------------------------------------------------


def bound_term(
    x0: Tensor,
    x: Tensor,
    x0_hat: Tensor,
    log_variance: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    decoder: Callable[[Tensor, Tensor, Tensor], Tensor] = gaussian_log_likelihood,
) -> Tensor:
    """One term of the bound, at x [b, c, h, w] of level sigma [b] on the way to sigma_next [b]. [b], bits a dimension.

    Where sigma_next is 0 it is the decoder's -log p(x_0 | x_1), elsewhere the KL divergence of the reverse step.
    log_variance [b, c, h, w] is the model's.
    """
    mean, variance = posterior(x, x0, sigma, sigma_next)
    mean_hat, _ = posterior(x, x0_hat, sigma, sigma_next)
    last = per_example(sigma_next == 0, x)
    log_true = per_example(torch.where(sigma_next == 0, torch.ones_like(variance), variance).log(), x)
    divergence = gaussian_kl(mean, log_true, mean_hat, log_variance)
    nats = torch.where(last, -decoder(x0, mean_hat, log_variance), divergence)
    return nats.flatten(1).mean(dim=1) / math.log(2)


def prior_term(x0: Tensor, sigma_max: Tensor) -> Tensor:
    """KL(q(x_T | x_0), Normal(0, 1 + sigma_max^2)): what the noisiest level still tells. [b], bits a dimension.

    The prior's variance is that of standard normal data at this level, so it is Normal(0, 1) in the coordinates of a
    variance-preserving network.
    """
    true, prior = per_example(2 * sigma_max.log(), x0), per_example(torch.log1p(sigma_max**2), x0)
    return gaussian_kl(x0, true, torch.zeros_like(x0), prior).flatten(1).mean(dim=1) / math.log(2)


class Bound(NamedTuple):
    """The variational bound of each example, in bits per dimension; `total` is what the model needs at most."""

    total: Tensor
    """[b]"""
    prior: Tensor
    """[b]"""
    terms: Tensor
    """[n, b], from the noisiest step to the decoder's."""


def variational_bound(
    denoise: Denoiser,
    log_variances: LogVariances,
    x0: Tensor,
    sigmas: Tensor,
    noise: Callable[[int], Tensor],
    decoder: Callable[[Tensor, Tensor, Tensor], Tensor] = gaussian_log_likelihood,
) -> Bound:
    """The whole bound for the steps sigmas [n + 1], descending to 0: n network calls and one draw of noise for each.

    noise(i) -> standard normal like x0 for step i. Every term is an unbiased estimate; average over draws for less
    spread. For a table's own T steps give its `sigmas` from the last to the first, and 0.
    """
    levels, terms = sigmas.to(x0.device), []
    for i in range(len(sigmas) - 1):
        sigma, sigma_next = levels[i].expand(len(x0)), levels[i + 1].expand(len(x0))
        x = diffuse(x0, noise(i), sigma)
        spread = log_variances(x, sigma, sigma_next)
        terms.append(bound_term(x0, x, denoise(x, sigma), spread, sigma, sigma_next, decoder))
    prior, stacked = prior_term(x0, levels[0].expand(len(x0))), torch.stack(terms)
    return Bound(prior + stacked.sum(dim=0), prior, stacked)
