"""How training draws noise levels."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentgen.core.errors import UserError
from latentgen.diffusion.noise_levels import (
    DENSITIES,
    cosine_interpolated,
    importance,
    log_normal,
    logit_normal,
    stratified,
    uniform,
)
from latentgen.diffusion.parameterization import PARAMETERIZATIONS, V, make


@given(n=st.integers(1, 300), seed=st.integers(0, 2**31), data=st.data())
def test_each_stratum_once_however_the_batch_is_split(n: int, seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    u, positions = torch.rand(n, generator=generator), torch.randperm(n, generator=generator)
    levels = stratified(u, positions, n)
    cut = data.draw(st.integers(0, n))
    parts = torch.cat([stratified(u[s], positions[s], n) for s in (slice(0, cut), slice(cut, n))])
    assert torch.equal(parts, levels)
    # an example sits in its own stratum, up to the rounding of the division
    offsets = levels.double() * n - positions
    assert ((offsets > -1e-4) & (offsets < 1 + 1e-4)).all()
    assert levels.dtype == u.dtype


@pytest.mark.parametrize("density", sorted(DENSITIES))
@pytest.mark.parametrize("target", sorted(PARAMETERIZATIONS))
def test_densities_are_finite_and_monotone_to_the_very_ends(density: str, target: str) -> None:
    p = make(target)
    u = torch.cat([torch.zeros(1), torch.linspace(1e-7, 1 - 1e-7, 501), torch.ones(1)])
    sigma = DENSITIES[density](u, p)
    assert sigma.shape == u.shape
    assert sigma.isfinite().all()
    assert (sigma.diff() >= 0).all()
    assert sigma.min() >= p.sigma_min * (1 - 1e-5)
    assert sigma.max() <= p.sigma_max * (1 + 1e-4)


def test_uniform_is_uniform_in_time() -> None:
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    p = V()
    torch.testing.assert_close(p.scalings(uniform(u, p)).c_noise, u * 999)
    flow = make("flow")
    torch.testing.assert_close(flow.scalings(uniform(u, flow)).c_noise, u * 1000)


def test_normal_densities_have_their_mean_and_spread() -> None:
    u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    flow_logit = logit_normal(u, make("flow"), mean=0.3, std=0.8).log()  # logit(t) = log(sigma)
    assert flow_logit.mean().item() == pytest.approx(0.3, abs=1e-3)
    assert flow_logit.std().item() == pytest.approx(0.8, abs=1e-3)
    edm_log = log_normal(u, make("edm"), p_mean=-0.4, p_std=1.0).log()
    assert edm_log.mean().item() == pytest.approx(-0.4, abs=1e-3)
    assert edm_log.std().item() == pytest.approx(1.0, abs=1e-3)
    v = V()
    t = v.scalings(logit_normal(u, v, mean=-0.5, std=1.1)).c_noise / 999
    assert torch.logit(t).median().item() == pytest.approx(-0.5, abs=1e-3)
    assert torch.logit(t).std().item() == pytest.approx(1.1, abs=1e-2)


@given(u=st.floats(0.001, 0.999), image=st.floats(8, 512), low=st.floats(8, 64), high=st.floats(8, 512))
def test_cosine_interpolated_is_the_papers_formula(u: float, image: float, low: float, high: float) -> None:
    """log SNR = t (shifted to low) + (1 - t) (shifted to high), each -2 log tan(pi t / 2) + 2 log(d / image)."""
    wide = make("edm", sigma_min=1e-9, sigma_max=1e9)  # so that t is u but for the ends
    t = torch.tensor([u], dtype=torch.float64)
    sigma = cosine_interpolated(t, wide, image_d=image, noise_d_low=low, noise_d_high=high)
    plain = -2 * torch.log(torch.tan(math.pi * t / 2))
    log_snr = t * (plain + 2 * math.log(low / image)) + (1 - t) * (plain + 2 * math.log(high / image))
    torch.testing.assert_close(-2 * sigma.log(), log_snr, rtol=0, atol=1e-4)


def test_larger_pictures_are_trained_at_more_noise() -> None:
    u, p = torch.linspace(0.05, 0.95, 19, dtype=torch.float64), make("edm", sigma_min=1e-5, sigma_max=1e5)
    small = cosine_interpolated(u, p, image_d=32, noise_d_low=32, noise_d_high=32)
    shifted = cosine_interpolated(u, p, image_d=256, noise_d_low=32, noise_d_high=32)
    torch.testing.assert_close(shifted / small, torch.full_like(u, 8.0), rtol=1e-2, atol=0)
    between = cosine_interpolated(u, p, image_d=256, noise_d_low=32, noise_d_high=256)
    assert ((between > small) & (between < shifted)).all()
    assert (between / small).diff().min() > 0, "the coarse features of the noisy end shift most"


@pytest.mark.parametrize("target", sorted(PARAMETERIZATIONS))
def test_cosine_interpolated_reaches_both_ends(target: str) -> None:
    """Sampling starts at sigma_max, so training must come near it whatever the shift."""
    p, u = make(target), torch.tensor([0.0, 1e-6, 1 - 1e-6, 1.0], dtype=torch.float64)
    for low, high in ((32.0, 256.0), (256.0, 256.0), (32.0, 32.0)):
        sigma = cosine_interpolated(u, p, image_d=256.0, noise_d_low=low, noise_d_high=high)
        expected = torch.tensor([p.sigma_min] * 2 + [p.sigma_max] * 2, dtype=torch.float64)
        torch.testing.assert_close(sigma, expected, rtol=2e-2, atol=0)


def bump(sigma: torch.Tensor) -> torch.Tensor:
    """A learned log-error with a maximum at sigma = 1."""
    return -(sigma.log() ** 2)


@given(target=st.sampled_from(sorted(PARAMETERIZATIONS)), height=st.floats(0, 8))
def test_importance_weights_undo_the_density(target: str, height: float) -> None:
    """E[weight * f(sigma)] is E[f(sigma)] of the uniform density, whatever was learned."""
    p, n = make(target), 20_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    sigma, weight = importance(u, p, lambda s: height * bump(s))
    uniform_sigma = uniform(u, p)
    for f in (torch.ones_like, torch.log, lambda s: 1 / (1 + s)):
        found, expected = (weight * f(sigma)).mean(), f(uniform_sigma).mean()
        torch.testing.assert_close(found, expected, rtol=5e-3, atol=5e-3)
    assert weight.max() <= 10 + 1e-3, "a tenth of the draws stays uniform"
    assert (sigma.diff() >= 0).all()
    assert sigma.min() >= p.sigma_min * (1 - 1e-4)
    assert sigma.max() <= p.sigma_max * (1 + 1e-4)


def test_levels_are_drawn_as_often_as_their_error_is_large() -> None:
    p, n = make("edm"), 40_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    sigma, weight = importance(u, p, bump)
    fraction = p.fraction_of_sigma(sigma)
    counts = torch.histc(fraction, bins=16, min=0, max=1) / n
    middles = p.sigma_of_fraction((torch.arange(256, dtype=torch.float64) + 0.5) / 256)
    expected = (0.9 * torch.softmax(bump(middles), 0) + 0.1 / 256).reshape(16, 16).sum(1)
    torch.testing.assert_close(counts, expected, rtol=0, atol=1e-3)
    where = weight.argmin()
    assert sigma[where].item() == pytest.approx(1.0, rel=0.1), "weighed down most where drawn most"


def test_before_anything_is_learned_importance_is_uniform() -> None:
    u, p = torch.rand(64), V()
    sigma, weight = importance(u, p, torch.zeros_like)
    torch.testing.assert_close(sigma, uniform(u, p), rtol=1e-4, atol=0)
    torch.testing.assert_close(weight, torch.ones(64))


def test_the_least_variance_is_that_of_importance() -> None:
    """For losses whose spread goes with their mean, drawing by the mean halves the estimate's variance and more."""
    p, n = make("edm"), 4000
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(n, generator=generator, dtype=torch.float64) * 2
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    sigma, weight = importance(u, p, bump)
    plain = bump(uniform(u, p)).exp() * spread
    drawn = bump(sigma).exp() * spread * weight
    assert drawn.mean().item() == pytest.approx(plain.mean().item(), rel=0.15)
    assert drawn.var() < 0.5 * plain.var()


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_bad_spreads_are_refused(bad: float) -> None:
    u = torch.full((2,), 0.5)
    with pytest.raises(UserError, match="std"):
        logit_normal(u, make("flow"), std=bad)
    with pytest.raises(UserError, match="p_std"):
        log_normal(u, make("edm"), p_std=bad)
    with pytest.raises(UserError, match="noise_d_low"):
        cosine_interpolated(u, make("edm"), noise_d_low=bad)
    with pytest.raises(UserError, match="global batch"):
        stratified(u, torch.zeros(2), 0)
