"""The forward process: steps compose to the closed form, and the posterior undoes one of them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentgen.diffusion.forward import diffuse, posterior, step, transition
from latentgen.diffusion.noise_tables import BETAS, NoiseTable
from latentgen.diffusion.parameterization import PARAMETERIZATIONS, V, make

names = st.sampled_from(sorted(PARAMETERIZATIONS))


@given(name=names, n=st.integers(1, 200))
def test_steps_compose_to_the_closed_form_exactly(name: str, n: int) -> None:
    """The chain's coefficients in the network's coordinates, multiplied out: y_n = A x0 + noise of variance B."""
    p = make(name)
    sigmas = p.sigma_of_fraction(torch.linspace(0, 1, n, dtype=torch.float64))
    levels = torch.cat([torch.full((1,), 1e-12, dtype=torch.float64), sigmas])  # begins at the clean image
    signal, variance = 1.0, 0.0
    c_in = p.scalings(levels).c_in
    closed = zip((c_in / c_in[0]).tolist(), ((c_in * levels) ** 2).tolist(), strict=True)
    steps = zip(*(values.tolist() for values in transition(p, levels[:-1], levels[1:])), strict=True)
    next(closed)
    for (a, b), (closed_signal, closed_variance) in zip(steps, closed, strict=True):
        signal, variance = a * signal, a**2 * variance + b**2
        assert signal == pytest.approx(closed_signal, rel=1e-9)
        assert variance == pytest.approx(closed_variance, rel=1e-9)


@pytest.mark.parametrize("kind", sorted(BETAS))
@pytest.mark.parametrize("zero", [False, True])
def test_the_chain_of_a_table_is_that_of_its_betas(kind: str, zero: bool) -> None:
    """q(x_t | x_{t-1}) = Normal(sqrt(1 - beta_t) x, beta_t) (arXiv 2006.11239, eq. 2), and alpha^2 + sigma_vp^2 = 1."""
    table = NoiseTable(kind, zero_terminal_snr=zero)
    sigmas, p = table.sigmas, V(table)
    a, b = transition(p, sigmas[:-1], sigmas[1:])
    torch.testing.assert_close(a**2, 1 - table.betas[1:], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(b**2, table.betas[1:], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(a**2 + b**2, torch.ones_like(a))


def test_drawn_step_by_step_it_has_the_closed_forms_mean_and_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.tensor([-0.7, 1.3], dtype=torch.float64).reshape(2, 1, 1, 1).expand(2, 1, 200, 200)
    levels = [0.0, 0.1, 0.35, 0.9, 2.0]
    x = x0
    for now, then in itertools.pairwise(levels):
        noise = torch.randn(x0.shape, dtype=torch.float64, generator=generator)
        x = step(x, noise, *(torch.full((2,), level, dtype=torch.float64) for level in (now, then)))
    noise = torch.randn(x0.shape, dtype=torch.float64, generator=generator)
    jump = diffuse(x0, noise, torch.full((2,), levels[-1], dtype=torch.float64))
    n = 200 * 200
    for drawn in (x, jump):
        # five standard errors; the spread of one step alone would be off by dozens
        assert ((drawn.mean((1, 2, 3)) - x0[:, 0, 0, 0]).abs() < 5 * 2.0 / math.sqrt(n)).all()
        assert ((drawn.var((1, 2, 3)) / 4.0 - 1).abs() < 5 * math.sqrt(2 / n)).all()


@given(high=st.floats(-3, 4), gap=st.floats(0.01, 5))
def test_the_posterior_is_bayes_rule(high: float, gap: float) -> None:
    """q(x_s | x_t, x_0) q(x_t | x_0) = q(x_t | x_s) q(x_s | x_0), as a function of x_s, up to no constant at all."""
    sigma, sigma_next = (torch.tensor([v], dtype=torch.float64).exp() for v in (high, high - gap))
    generator = torch.Generator().manual_seed(1)
    x0, x, x_s = torch.randn(3, 1, 1, 4, 4, dtype=torch.float64, generator=generator)
    mean, variance = posterior(x, x0, sigma, sigma_next)

    def log_normal(at: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        return torch.distributions.Normal(mean, variance.sqrt()).log_prob(at)

    left = log_normal(x_s, mean, variance) + log_normal(x, x0, sigma**2)
    right = log_normal(x, x_s, sigma**2 - sigma_next**2) + log_normal(x_s, x0, sigma_next**2)
    torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


def test_the_posterior_is_the_papers_formula() -> None:
    """arXiv 2006.11239, eq. 6 and 7, in its own coordinates at t = 400 of Stable Diffusion's table."""
    table, t = NoiseTable(), 400
    beta, bar, before = table.betas[t], table.alpha_bar[t], table.alpha_bar[t - 1]
    generator = torch.Generator().manual_seed(2)
    x0, x_vp = torch.randn(2, 1, 1, 4, 4, dtype=torch.float64, generator=generator)
    mean_vp = before.sqrt() * beta / (1 - bar) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - bar) * x_vp
    variance_vp = (1 - before) / (1 - bar) * beta
    mean, variance = posterior(x_vp / bar.sqrt(), x0, table.sigmas[t : t + 1], table.sigmas[t - 1 : t])
    torch.testing.assert_close(mean * before.sqrt(), mean_vp)
    torch.testing.assert_close(variance * before, variance_vp[None])


def test_the_last_step_lands_on_the_image() -> None:
    x, x0 = torch.randn(2, 3, 1, 2, 2)
    mean, variance = posterior(x, x0, torch.full((3,), 0.2), torch.zeros(3))
    assert torch.equal(mean, x0)
    assert torch.equal(variance, torch.zeros(3))
