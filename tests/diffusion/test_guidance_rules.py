"""How two predictions become one: each rule against its paper's arithmetic, done by hand."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from latentgen.core.errors import UserError
from latentgen.diffusion.guidance.driver import State
from latentgen.diffusion.guidance.rules import APG, CFG, CFGPP, CFGZero, dot
from latentgen.diffusion.parameterization import V, convert, to_x0
from latentgen.diffusion.samplers import ddim, euler

SIGMA = torch.tensor([0.3, 9.0], dtype=torch.float64)


def randoms(count: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, 2, 3, 4, 4, dtype=torch.float64, generator=generator))


def row(*values: float) -> torch.Tensor:
    """One picture of one channel and one line."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, 1, -1)


def combine(rule, cond, uncond, x=None, sigma=None, state: State | None = None) -> torch.Tensor:
    x = torch.zeros_like(cond) if x is None else x
    sigma = torch.ones(len(cond), dtype=cond.dtype) if sigma is None else sigma
    return rule.combine({"cond": cond, "uncond": uncond}, x, sigma, {} if state is None else state)


RULES = {
    "cfg": lambda scale: CFG(scale),
    "apg": lambda scale: APG(scale, eta=0.3, momentum=-0.5, norm_threshold=2.0),
    "cfg_zero": lambda scale: CFGZero(scale),
}


@pytest.mark.parametrize("name", sorted(RULES))
def test_scale_one_is_the_conditional_prediction_and_costs_one(name: str) -> None:
    rule = RULES[name](1.0)
    assert list(rule.needs(SIGMA, {})) == ["cond"]
    assert sorted(RULES[name](2.0).needs(SIGMA, {})) == ["cond", "uncond"]
    cond, uncond, x = randoms(3)
    assert rule.combine({"cond": cond}, x, SIGMA, {}) is cond
    torch.testing.assert_close(combine(rule, cond, uncond, x, SIGMA), cond)


@pytest.mark.parametrize("name", sorted(RULES))
def test_predictions_that_agree_are_left_alone(name: str) -> None:
    cond, x = randoms(2)
    torch.testing.assert_close(combine(RULES[name](5.0), cond, cond, x, SIGMA), cond)


@pytest.mark.parametrize("name", sorted(RULES))
def test_scale_must_be_finite(name: str) -> None:
    with pytest.raises(UserError, match="guidance scale"):
        RULES[name](math.nan)


def test_cfg_formula() -> None:
    assert torch.equal(combine(CFG(2.5), row(3.0), row(1.0)), row(6.0))
    assert torch.equal(combine(CFG(0.0), row(3.0), row(1.0)), row(1.0))


def test_guiding_x0_is_guiding_the_prediction() -> None:
    x, v_cond, v_uncond = randoms(3)
    p, scale = V(), 7.5
    in_x0 = combine(CFG(scale), to_x0(p, v_cond, x, SIGMA), to_x0(p, v_uncond, x, SIGMA), x, SIGMA)
    in_v = to_x0(p, v_uncond + scale * (v_cond - v_uncond), x, SIGMA)
    torch.testing.assert_close(in_x0, in_v)
    torch.testing.assert_close(convert(v_cond, x, SIGMA, p, p), v_cond)


# --- APG --------------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(scale=st.floats(0, 20), seed=st.integers(0, 10**6))
def test_apg_that_projects_limits_and_remembers_nothing_is_cfg(scale: float, seed: int) -> None:
    cond, uncond = randoms(2, seed)
    plain = combine(CFG(scale), cond, uncond)
    state: State = {}
    torch.testing.assert_close(combine(APG(scale, 1.0, 0.0, 0.0), cond, uncond, state=state), plain)
    assert state == {}
    assert not torch.allclose(combine(APG(3.0, 0.0, 0.0, 0.0), cond, uncond), combine(CFG(3.0), cond, uncond))


def test_apg_counts_the_part_along_the_conditional_prediction_eta_times() -> None:
    cond = row(3.0, 4.0)
    uncond = cond - (0.5 * cond + row(4.0, -3.0))  # the difference: 0.5 along cond, and one orthogonal to it
    for eta in (0.0, 0.25, 1.0):
        guided = combine(APG(3.0, eta=eta, momentum=0.0), cond, uncond)
        torch.testing.assert_close(guided, cond + 2 * (eta * 0.5 * cond + row(4.0, -3.0)))


def test_apg_holds_the_norm_of_the_difference() -> None:
    cond, uncond = row(3.0, 4.0), row(0.0, 0.0)  # norm 5
    shortened = combine(APG(2.0, eta=1.0, momentum=0.0, norm_threshold=2.5), cond, uncond)
    torch.testing.assert_close(shortened, cond + 0.5 * cond)
    assert torch.equal(
        combine(APG(2.0, eta=1.0, momentum=0.0, norm_threshold=6.0), cond, uncond), combine(CFG(2.0), cond, uncond)
    )


def test_apg_momentum_adds_up_over_evaluations() -> None:
    rule, state, nothing = APG(2.0, eta=1.0, momentum=-0.5), {}, row(0.0, 0.0)
    first = combine(rule, row(1.0, 2.0), nothing, state=state)
    second = combine(rule, row(4.0, 0.0), nothing, state=state)
    third = combine(rule, row(0.0, 8.0), nothing, state=state)
    torch.testing.assert_close(first, 2 * row(1.0, 2.0))
    torch.testing.assert_close(second, row(4.0, 0.0) + row(4.0 - 0.5, 0.0 - 1.0))
    torch.testing.assert_close(third, row(0.0, 8.0) + row(0.0 - 0.5 * 3.5, 8.0 + 0.5))


@pytest.mark.parametrize("knobs", [{"momentum": 1.0}, {"norm_threshold": -1.0}, {"eta": math.inf}])
def test_apg_refuses(knobs: dict) -> None:
    with pytest.raises(UserError, match=next(iter(knobs))):
        APG(4.0, **knobs)


# --- CFG++ ------------------------------------------------------------------------------------------------------------

MEANS, SPREADS = {"cond": 0.8, "uncond": -0.3}, {"cond": 0.4, "uncond": 0.9}
LEVELS = (14.6, 5.0, 2.0, 0.7, 0.2, 0.0)


def gaussian(kind: str, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """The exact denoiser for data ~ Normal(mean, spread^2)."""
    mean, variance = MEANS[kind], SPREADS[kind] ** 2
    return mean + (x - mean) * (variance / (variance + sigma**2))


def paper_ddim(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Algorithm 2 of arXiv 2406.08070 in its own variance-preserving coordinates, step by step."""
    abar = [1 / (1 + level**2) for level in LEVELS]
    z = math.sqrt(abar[0]) * x
    for i, (now, after) in enumerate(itertools.pairwise(abar)):
        eps = {}
        for kind in MEANS:
            clean = gaussian(kind, z / math.sqrt(now), LEVELS[i])
            eps[kind] = (z - math.sqrt(now) * clean) / math.sqrt(1 - now)
        guided = eps["uncond"] + scale * (eps["cond"] - eps["uncond"])
        clean = (z - math.sqrt(1 - now) * guided) / math.sqrt(now)
        z = math.sqrt(after) * clean + math.sqrt(1 - after) * eps["uncond"]  # the unconditional noise
    return z


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("sampler", [euler, ddim])
def test_cfgpp_takes_the_papers_steps(scale: float, sampler) -> None:
    x = randoms(1)[0] * LEVELS[0]

    def denoise(rule):
        return lambda x, sigma: combine(
            rule, gaussian("cond", x, float(sigma[0])), gaussian("uncond", x, float(sigma[0])), x, sigma
        )

    sigmas = torch.tensor(LEVELS, dtype=torch.float64)
    drawn = sampler(denoise(CFGPP(scale, LEVELS)), x, sigmas)
    torch.testing.assert_close(drawn, paper_ddim(x, scale), rtol=1e-9, atol=1e-9)
    if scale:
        assert not torch.allclose(sampler(denoise(CFG(scale)), x, sigmas), drawn), "plain cfg takes other steps"


def test_cfgpp_knows_each_pictures_level() -> None:
    cond, uncond = randoms(2)
    mixed = combine(CFGPP(0.5, LEVELS), cond, uncond, sigma=torch.tensor([5.0, 0.2], dtype=torch.float64))
    torch.testing.assert_close(mixed[:1], combine(CFG(0.5 * 5 / 3), cond[:1], uncond[:1]))
    torch.testing.assert_close(mixed[1:], combine(CFG(0.5), cond[1:], uncond[1:]))  # the step to 0


def test_cfgpp_refuses() -> None:
    with pytest.raises(UserError, match="takes 0 to 1"):
        CFGPP(4.0, LEVELS)
    with pytest.raises(UserError, match="noise level 3 is none of the schedule's"):
        combine(CFGPP(0.5, LEVELS), row(1.0), row(0.0), sigma=torch.tensor([3.0]))


# --- CFG-Zero* --------------------------------------------------------------------------------------------------------


def velocity(x0: torch.Tensor, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The flow path's noise - x0."""
    return (x - x0) / sigma.reshape(-1, 1, 1, 1) - x0


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), scale=st.floats(1.5, 10))
def test_cfg_zero_fits_the_unconditional_velocity(seed: int, scale: float) -> None:
    cond, uncond, x = randoms(3, seed)
    v, v_c, v_u = (velocity(p, x, SIGMA) for p in (combine(CFGZero(scale), cond, uncond, x, SIGMA), cond, uncond))
    fitted = (v - scale * v_c) / (1 - scale)  # from v = fitted + scale * (v_c - fitted)
    rest = dot(v_c - fitted, v_u)
    torch.testing.assert_close(rest, torch.zeros_like(rest), atol=1e-6, rtol=0)  # nothing of it is left in v_c
    s = dot(fitted, v_u) / dot(v_u, v_u)
    torch.testing.assert_close(fitted, s.reshape(-1, 1, 1, 1) * v_u, atol=1e-6, rtol=1e-6)  # and it is a multiple


def test_cfg_zero_by_hand() -> None:
    """At x = 0 and sigma = 1 the velocity is -2 * x0_hat."""
    cond, uncond = row(2.0, 1.0), row(1.0, 1.0)  # s = (2 + 1) / 2
    torch.testing.assert_close(combine(CFGZero(3.0), cond, uncond), row(1.5, 1.5) + 3 * (cond - row(1.5, 1.5)))
    torch.testing.assert_close(combine(CFGZero(3.0), cond, row(0.0, 0.0)), 3 * cond)  # a velocity of 0 fits nothing
