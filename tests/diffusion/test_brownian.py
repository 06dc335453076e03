"""Brownian paths: their law, and that a picture's noise is a function of its seed."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentgen.core.errors import UserError
from latentgen.diffusion.brownian import brownian, brownian_noise
from latentgen.diffusion.parameterization import make
from latentgen.diffusion.samplers import SAMPLERS
from latentgen.diffusion.schedules import karras

MANY = (20_000,)
levels = st.floats(1e-3, 1e3)


@pytest.mark.parametrize("levels", [(14.6, 3.0, 1.0, 0.03), (2.1, 2.0, 1.99, 1.9), (4096.0, 80.0, 0.002, 0.001)])
def test_increments_are_independent_with_the_right_variance(levels: tuple[float, ...]) -> None:
    path = [brownian(0, MANY, sigma) for sigma in levels]
    steps = [path[0] * levels[0]]  # B at the first level is an increment from time 0
    for (a, b), (above, below) in zip(itertools.pairwise(path), itertools.pairwise(levels), strict=True):
        steps.append((b - a) / math.sqrt(below**-2 - above**-2))
    covariance = torch.cov(torch.stack(steps))
    assert (covariance - torch.eye(len(levels))).abs().max() < 4.5 * math.sqrt(2 / MANY[0])


def test_overlapping_increments_are_correlated_as_they_share_time() -> None:
    noise = brownian_noise([0], torch.zeros(1, *MANY, 1, 1, dtype=torch.float64))
    whole, part = noise(4.0, 1.0), noise(4.0, 1.5)
    expected = math.sqrt((1.5**-2 - 4.0**-2) / (1.0 - 4.0**-2))
    assert (whole * part).mean().item() == pytest.approx(expected, abs=4.5 / MANY[0] ** 0.5)


@settings(max_examples=25)
@given(a=levels, b=levels, c=levels)
def test_a_step_cut_in_two_adds_up(a: float, b: float, c: float) -> None:
    a, b, c = sorted((a, b, c), reverse=True)
    if a / b < 1.0001 or b / c < 1.0001:
        return
    x = torch.zeros(2, 1, 1, 3, dtype=torch.float64)
    noise = brownian_noise([1, 2], x)
    first, second, both = noise(a, b), noise(b, c), noise(a, c)
    time = [math.sqrt(low**-2 - high**-2) for high, low in ((a, b), (b, c), (a, c))]
    torch.testing.assert_close(first * time[0] + second * time[1], both * time[2], rtol=1e-9, atol=1e-9 / c)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_while_the_estimate_stands_still_the_number_of_steps_does_not_matter(name: str) -> None:
    """The clock 1 / sigma^2 makes each step's noise the exact integral of the reverse SDE."""
    fixed = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(1, 2, 2, 2)
    x = 14.6 * torch.randn(1, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    knobs = {"eta": 1.0} if name != "ddpm" else {}
    coarse, fine = (
        SAMPLERS[name](
            lambda x, sigma: fixed,
            x,
            torch.logspace(1, -1, n + 1, dtype=torch.float64),
            noise=brownian_noise([9], x),
            **knobs,
        )
        for n in (3, 24)
    )
    torch.testing.assert_close(coarse, fine, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "er_sde"])
def test_twice_the_steps_follow_the_same_path(name: str) -> None:
    """Refining the steps converges to one picture for a seed; with other noise it does not."""

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        shrunk = x / (1 + 2 * sigma.reshape(-1, 1, 1, 1) ** 2)
        return shrunk + 0.2 * torch.sin(2 * shrunk)

    x = 14.6 * torch.randn(1, 1, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def draw(n: int, seed: int) -> torch.Tensor:
        return SAMPLERS[name](denoise, x, karras(n, make("eps")), noise=brownian_noise([seed], x))

    coarse, middle, fine, other = draw(20, 1), draw(40, 1), draw(80, 1), draw(80, 2)
    apart = (other - fine).square().mean().sqrt()
    assert (middle - fine).square().mean().sqrt() < 0.8 * (coarse - fine).square().mean().sqrt()
    assert (middle - fine).square().mean().sqrt() < 0.25 * apart


def test_a_pictures_noise_is_its_own() -> None:
    x = torch.zeros(3, 4, 2, 2)
    together, alone = brownian_noise([5, 6, 5], x), brownian_noise([6], x[:1])
    for interval in ((14.6, 9.0), (9.0, 0.3), (0.3, 0.6), (0.3, 0.6)):
        drawn, own = together(*interval), alone(*interval)
        assert torch.equal(drawn[1:2], own)
        assert torch.equal(drawn[0], drawn[2])
        assert not torch.equal(drawn[0], drawn[1])
        assert drawn.dtype == x.dtype
    assert torch.equal(brownian_noise([6], x[:1])(9.0, 0.3), alone(9.0, 0.3)), "no state on the way down"


def test_on_the_way_up_noise_is_fresh() -> None:
    """A restart passes the same interval again and must not get the same noise."""
    noise = brownian_noise([5], torch.zeros(1, *MANY, 1, 1))
    draws = torch.stack([noise(0.1, 2.0).flatten(), noise(0.1, 2.0).flatten(), noise(2.0, 0.1).flatten()])
    assert (torch.cov(draws) - torch.eye(3)).abs().max() < 4.5 * math.sqrt(2 / MANY[0])


def test_levels_outside_the_tree_are_refused() -> None:
    for sigma in (0.0, 1e-11, 1e11):
        with pytest.raises(UserError, match="levels must lie between"):
            brownian(0, (1,), sigma)
