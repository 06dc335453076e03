"""How training draws noise levels."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentgen.core.errors import UserError
from latentgen.diffusion.noise_levels import DENSITIES, log_normal, logit_normal, stratified, uniform
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


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_bad_spreads_are_refused(bad: float) -> None:
    u = torch.full((2,), 0.5)
    with pytest.raises(UserError, match="std"):
        logit_normal(u, make("flow"), std=bad)
    with pytest.raises(UserError, match="p_std"):
        log_normal(u, make("edm"), p_std=bad)
    with pytest.raises(UserError, match="global batch"):
        stratified(u, torch.zeros(2), 0)
