"""Samplers that add noise, and the names samplers go by."""

from __future__ import annotations

import pytest
import torch

from latentgen.core.errors import UserError
from latentgen.diffusion.parameterization import make
from latentgen.diffusion.samplers import SAMPLERS, ddim, euler, heun
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
    for name, knobs, match in (
        ("ddpm", {"variance": "learned"}, "fixed_small"),
        ("lms", {"order": 5}, "order 5 of lms"),
        ("deis", {"order": 0}, "order 0 of deis"),
        ("ipndm", {"order": 0}, "order 0 of ipndm"),
        ("unipc", {"order": 4}, "order 4 of unipc"),
        ("unipc", {"variant": "bh3"}, "bh1 or bh2"),
        ("dpmpp_sde", {"r": 0.0}, "r 0.0"),
        ("dpmpp_2m_sde", {"solver_type": "x"}, "midpoint or heun"),
        ("er_sde", {"max_stage": 4}, "max_stage 4"),
        ("restart", {"t_min": 3.0}, "0 < t_min < t_max"),
        ("dpm_adaptive", {"order": 1}, "order 1"),
        ("dpm_adaptive", {"rtol": 0.0}, "rtol 0.0"),
    ):
        with pytest.raises(UserError, match=match):
            SAMPLERS[name](white, x, SIGMAS, noise=lambda a, b: x, **knobs)


def test_the_adaptive_solver_gives_up_in_words() -> None:
    x = torch.ones(1, 1, 2, 2)
    with pytest.raises(UserError, match="not finite"):
        SAMPLERS["dpm_adaptive"](lambda x, sigma: x * float("nan"), x, SIGMAS)


def flow_network(x_t: torch.Tensor, t: float) -> torch.Tensor:
    """The exact velocity noise - x0 of x_t = (1 - t) x0 + t noise, for data ~ Normal(0, 1)."""
    x0_hat = (1 - t) * x_t / ((1 - t) ** 2 + t**2)
    return (x_t - x0_hat) / t


def test_ancestral_steps_are_those_of_a_flow_model_in_its_own_coordinates() -> None:
    """x_t stepped with the velocity to t_down, then signal and noise set right: the same as ancestral steps here.

    t_down is the time of the ancestral split's lower level. The step written in x_t: scale by
    (1 - t_next) / (1 - t_down) and add noise of variance t_next^2 - t_down^2 (1 - t_next)^2 / (1 - t_down)^2.
    """
    times = torch.linspace(0.99, 0, 9, dtype=torch.float64)
    sigmas = times / (1 - times)
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(1, 1, 3, 3, dtype=torch.float64, generator=generator) for _ in times]
    x_t = draws[-1]
    given = iter(draws)
    ours = SAMPLERS["euler_ancestral"](white, x_t * (1 + sigmas[0]), sigmas, noise=lambda a, b: next(given))
    for k in range(len(times) - 1):
        t, t_next = times[k].item(), times[k + 1].item()
        s, s_next = t / (1 - t), t_next / (1 - t_next)
        s_down = s_next**2 / s
        t_down = s_down / (1 + s_down)
        x_t = x_t + (t_down - t) * flow_network(x_t, t)
        ratio = (1 - t_next) / (1 - t_down)
        x_t = ratio * x_t + max(t_next**2 - (ratio * t_down) ** 2, 0) ** 0.5 * draws[k]
    torch.testing.assert_close(ours, x_t, rtol=1e-12, atol=1e-12)
