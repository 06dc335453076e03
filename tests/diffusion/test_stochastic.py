"""Samplers that add noise, and the names samplers go by."""

from __future__ import annotations

import pytest
import torch

from latentgen.core.errors import UserError
from latentgen.diffusion.parameterization import make
from latentgen.diffusion.samplers import ALIASES, SAMPLERS, ddim, euler, find_sampler, heun
from latentgen.diffusion.schedules import exponential, karras

SIGMAS = karras(12, make("eps"))


def white(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Exact denoiser for data ~ Normal(0, 1)."""
    return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)


def test_ddim_without_eta_is_euler() -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64) * SIGMAS[0]
    torch.testing.assert_close(ddim(white, x, SIGMAS), euler(white, x, SIGMAS), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("sampler", "knobs"), [(ddim, {"eta": 1.0}), (euler, {"s_churn": 20.0}), (heun, {"s_churn": 20.0, "s_noise": 1.0})]
)
def test_added_noise_keeps_the_variance_of_the_data(sampler, knobs: dict[str, float]) -> None:
    """From the exact distribution at sigma_max, a stochastic sampler with small steps must land on Normal(0, 1)."""
    generator = torch.Generator().manual_seed(0)
    n = 20_000
    sigmas = exponential(600, make("eps"))

    def noise(sigma: float, sigma_next: float) -> torch.Tensor:
        assert sigma > 0
        assert sigma_next > 0
        return torch.randn(n, 1, 1, 1, generator=generator)

    x = torch.randn(n, 1, 1, 1, generator=generator) * (1 + sigmas[0] ** 2).sqrt()
    out = sampler(white, x, sigmas, noise=noise, **knobs)
    assert out.var().item() == pytest.approx(1.0, abs=0.05)
    correlation = (out * x).mean() / (out.std() * x.std())
    assert abs(correlation.item()) < (0.1 if sampler is ddim else 0.95)  # fresh noise replaced the old


def test_churn_only_inside_its_range() -> None:
    levels: list[float] = []

    def noise(sigma: float, sigma_next: float) -> torch.Tensor:
        levels.append(sigma)
        assert sigma_next > sigma
        return torch.zeros(1, 1, 1, 1)

    euler(white, torch.ones(1, 1, 1, 1), SIGMAS, noise=noise, s_churn=5.0, s_tmin=0.1, s_tmax=3.0)
    assert levels == [s for s in SIGMAS.tolist() if 0.1 <= s <= 3.0]
    assert levels


def test_mistakes() -> None:
    x = torch.ones(1, 1, 2, 2)
    with pytest.raises(UserError, match="eta"):
        ddim(white, x, SIGMAS, eta=1.5)
    with pytest.raises(UserError, match="noise"):
        ddim(white, x, SIGMAS, eta=0.5)
    with pytest.raises(UserError, match="noise"):
        heun(white, x, SIGMAS, s_churn=1.0)
    with pytest.raises(UserError, match="s_churn"):
        euler(white, x, SIGMAS, s_churn=-1.0)


def test_names_of_samplers() -> None:
    assert find_sampler("DPM++ 2M") is find_sampler(" dpm++2m") is SAMPLERS["dpmpp_2m"]
    assert find_sampler("Euler") is find_sampler("k_euler") is euler
    assert set(ALIASES.values()) <= set(SAMPLERS)
    assert not set(ALIASES) & set(SAMPLERS)
    with pytest.raises(UserError, match="did you mean 'euler'"):
        find_sampler("eular")
