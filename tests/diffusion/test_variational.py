"""The variational bound against data whose likelihood is known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from latentgen.diffusion.forward import posterior
from latentgen.diffusion.noise_tables import NoiseTable
from latentgen.diffusion.parameterization import make
from latentgen.diffusion.schedules import exponential
from latentgen.diffusion.variational import (
    bound_term,
    discretised_log_likelihood,
    gaussian_kl,
    gaussian_log_likelihood,
    interpolated_log_variance,
    log_variance_range,
    prior_term,
    variational_bound,
)

X0 = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(9, 1, 1, 1)


def standard_normal(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The exact denoiser for data ~ Normal(0, 1)."""
    return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)


def large(x: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
    return log_variance_range(sigma, sigma_next)[1].reshape(-1, 1, 1, 1).expand_as(x)


def bits(x0: torch.Tensor, sigmas: torch.Tensor, log_variances=large, denoise=standard_normal) -> torch.Tensor:
    """The expectation over noise, exactly: terms are quadratic in it, so noise of -1 and 1 has all that counts."""
    noise = torch.cat([torch.ones_like(x0), -torch.ones_like(x0)])
    bound = variational_bound(denoise, log_variances, torch.cat([x0, x0]), sigmas, lambda i: noise)
    return bound.total.reshape(2, -1).mean(dim=0)


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_the_bound_is_tight_for_standard_normal_data(n: int) -> None:
    """Denoiser, variance (`beta`) and prior are all exact there, so bits are -log2 of the density, at each x0."""
    sigmas = exponential(n, make("edm")).double()
    expected = -Normal(0.0, 1.0).log_prob(X0).flatten() / math.log(2)
    torch.testing.assert_close(bits(X0, sigmas), expected, rtol=1e-9, atol=1e-9)


def test_any_other_model_needs_more_bits() -> None:
    sigmas = exponential(10, make("edm")).double()
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(4000, 1, 1, 1, dtype=torch.float64, generator=generator)
    best = bits(x0, sigmas).mean()

    def small(x: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        return log_variance_range(sigma, sigma_next)[0].reshape(-1, 1, 1, 1).expand_as(x)

    assert bits(x0, sigmas, log_variances=small).mean() > best + 0.1
    worse = bits(x0, sigmas, denoise=lambda x, sigma: 0.8 * standard_normal(x, sigma)).mean()
    assert worse > best + 0.1


def test_the_whole_table_may_be_summed() -> None:
    """T = 1000 steps of Stable Diffusion's table: prior and decoder included, nothing lost to rounding."""
    table = NoiseTable()
    sigmas = torch.cat([table.sigmas.flip(0), torch.zeros(1, dtype=torch.float64)])
    expected = -Normal(0.0, 1.0).log_prob(X0).flatten() / math.log(2)
    torch.testing.assert_close(bits(X0, sigmas), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bits(X0.float(), sigmas.float()), expected.float(), rtol=2e-2, atol=2e-2)


def test_the_parts_add_up() -> None:
    sigmas = exponential(5, make("edm")).double()
    bound = variational_bound(standard_normal, large, X0, sigmas, lambda i: torch.full_like(X0, float(i)))
    assert bound.terms.shape == (5, 9)
    torch.testing.assert_close(bound.total, bound.prior + bound.terms.sum(0))
    torch.testing.assert_close(bound.prior, prior_term(X0, torch.full((9,), 80.0, dtype=torch.float64)))


@given(log_sigma=st.floats(-3, 4), gap=st.floats(0.01, 3), spread=st.floats(-1, 1), error=st.floats(-1, 1))
def test_a_term_is_the_divergence_of_two_normals(log_sigma: float, gap: float, spread: float, error: float) -> None:
    sigma, sigma_next = (torch.tensor([v], dtype=torch.float64).exp() for v in (log_sigma, log_sigma - gap))
    x0 = torch.tensor([[[[0.3]]]], dtype=torch.float64)
    x, x0_hat = x0 + 0.7 * sigma, x0 + error
    mean, variance = posterior(x, x0, sigma, sigma_next)
    mean_hat, _ = posterior(x, x0_hat, sigma, sigma_next)
    log_variance = variance.log().reshape(1, 1, 1, 1) + spread
    expected = kl_divergence(Normal(mean, variance.sqrt()), Normal(mean_hat, (log_variance / 2).exp()))
    found = bound_term(x0, x, x0_hat, log_variance, sigma, sigma_next)
    torch.testing.assert_close(found, expected.flatten() / math.log(2), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        gaussian_kl(mean, variance.log(), mean_hat, log_variance).flatten(), expected.flatten(), rtol=1e-6, atol=1e-9
    )


def test_variances_are_those_of_the_papers() -> None:
    """beta and beta-tilde of arXiv 2006.11239 in variance-preserving coordinates, and eq. 15 of 2102.09672 between."""
    table = NoiseTable()
    t = torch.arange(1, 1000)
    before = table.alpha_bar[:-1]
    small, large = log_variance_range(table.sigmas[1:], table.sigmas[:-1])
    torch.testing.assert_close(large.exp() * before, table.betas[t], rtol=1e-6, atol=0)
    tilde = (1 - before) / (1 - table.alpha_bar[1:]) * table.betas[t]
    torch.testing.assert_close(small.exp() * before, tilde, rtol=1e-6, atol=0)
    head = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    sigma, below = table.sigmas[500].expand(3), table.sigmas[499].expand(3)
    found = interpolated_log_variance(head, sigma, below).flatten() + before[499].log()
    expected = torch.stack([tilde[499].log(), (tilde[499].log() + table.betas[500].log()) / 2, table.betas[500].log()])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_decoders_variance_is_finite_and_small_stays_below_large() -> None:
    sigma = torch.logspace(-3, 3, 50)
    small, large = log_variance_range(sigma, torch.zeros(50))
    assert small.isfinite().all()
    assert (small < large).all()
    steps = log_variance_range(sigma.double(), sigma.double() * 0.9)
    assert (steps[0] < steps[1]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-4, 0.01, 0.3, 5.0])
@pytest.mark.parametrize("mean", [-1.7, -0.2, 0.0, 0.9])
def test_pixels_probabilities_sum_to_one(mean: float, scale: float, dtype: torch.dtype) -> None:
    x = (torch.arange(256, dtype=dtype) * 2 / 255 - 1).reshape(256, 1, 1, 1)
    log_variance = torch.full_like(x, 2 * math.log(scale))
    log_p = discretised_log_likelihood(x, torch.full_like(x, mean), log_variance)
    assert log_p.isfinite().all()
    assert log_p.exp().sum().item() == pytest.approx(1.0, abs=1e-3 if dtype == torch.float32 else 1e-9)
    if scale == 0.3:  # where a bin is narrow it is density times width
        inside = slice(60, 200)
        density = gaussian_log_likelihood(x, torch.full_like(x, mean), log_variance) + math.log(2 / 255)
        torch.testing.assert_close(log_p[inside], density[inside], rtol=1e-3, atol=1e-3)


def test_the_bound_of_pixels_takes_their_decoder() -> None:
    x0 = torch.tensor([-1.0, 3 / 255, 1.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    sigma, zero = torch.full((3,), 0.01, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    log_variance = torch.full_like(x0, 2 * math.log(0.01))
    found = bound_term(x0, x0, x0, log_variance, sigma, zero, discretised_log_likelihood)
    expected = -discretised_log_likelihood(x0, x0, log_variance).flatten() / math.log(2)
    torch.testing.assert_close(found, expected)
    assert (found > 0).all(), "a probability, not a density"


def test_the_head_learns_the_variance_that_is_right() -> None:
    """Lowering the bound alone finds the variance of p(x_s | x_t): for data of spread 0.5 neither end, but between."""
    torch.manual_seed(0)
    sigma, below = torch.full((4096,), 1.0), torch.full((4096,), 0.6)
    x0 = 0.5 * torch.randn(4096, 1, 1, 1)
    x = x0 + torch.randn_like(x0)
    x0_hat = x * 0.25 / 1.25
    head = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([head], lr=0.1)
    for _ in range(60):
        spread = interpolated_log_variance(head.expand(4096).reshape(4096, 1, 1, 1), sigma, below)
        loss = bound_term(x0, x, x0_hat, spread, sigma, below).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ratio = 0.36
    right = 0.36 * (1 - ratio) + (1 - ratio) ** 2 * 0.25 / 1.25  # of x_s given x_t: the law of total variance
    found = interpolated_log_variance(head.detach().reshape(1, 1, 1, 1), sigma[:1], below[:1]).exp().item()
    assert found == pytest.approx(right, rel=0.03)
