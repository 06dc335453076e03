"""Power-function averages: closed forms, and one profile out of others."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentgen.engine.ema_profiles import (
    LONGEST,
    Profile,
    exponent_of,
    fit,
    length_of,
    power_share,
    product,
)

lengths = st.floats(0.01, LONGEST)
profiles = st.builds(Profile, st.integers(1, 5000), lengths.map(exponent_of))


def density(profile: Profile, at: torch.Tensor) -> torch.Tensor:
    g, t = profile.exponent, profile.step
    return torch.where(at <= t, (g + 1) / t * (at / t) ** g, torch.zeros_like(at))


def weights(profile: Profile) -> torch.Tensor:
    """What every step counts in an average that is updated step by step."""
    found = torch.zeros(profile.step, dtype=torch.float64)
    for step in range(profile.step):
        share = power_share(step, profile.exponent)
        found *= 1 - share
        found[step] += share
    return found


def test_the_paper_names_these_exponents() -> None:
    """arXiv 2312.02696, section 3.1: lengths 0.05 and 0.10 are gamma = 16.97 and 6.94."""
    assert exponent_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert exponent_of(0.10) == pytest.approx(6.94, abs=0.005)
    assert length_of(0) == pytest.approx(1 / math.sqrt(12)), "the plain mean"


@given(lengths)
def test_length_and_exponent_are_inverse(length: float) -> None:
    assert length_of(exponent_of(length)) == pytest.approx(length, rel=1e-9)


@given(lengths)
def test_the_exponent_solves_the_papers_cubic(length: float) -> None:
    """gamma^3 + 7 gamma^2 + (16 - 1/sigma^2) gamma + 12 - 1/sigma^2 = 0 (algorithm 2)."""
    g, s = exponent_of(length), length**-2
    assert g**3 + 7 * g**2 + (16 - s) * g + 12 - s == pytest.approx(0, abs=1e-6 * s * (g + 1))


@given(profiles)
def test_the_length_is_the_standard_deviation_of_the_profile(profile: Profile) -> None:
    at = (torch.arange(100_000, dtype=torch.float64) + 0.5) * profile.step / 100_000
    p = density(profile, at) * profile.step / 100_000
    mean = (p * at).sum()
    spread = (p * (at - mean) ** 2).sum().sqrt() / profile.step
    assert float(p.sum()) == pytest.approx(1, rel=1e-5)
    assert float(spread) == pytest.approx(length_of(profile.exponent), rel=1e-3)


@settings(max_examples=30)
@given(st.integers(1, 60), lengths)
def test_step_by_step_every_step_counts_its_part_of_the_profile(step: int, length: float) -> None:
    gamma = exponent_of(length)
    edges = (torch.arange(step + 1, dtype=torch.float64) / step) ** (gamma + 1)
    torch.testing.assert_close(weights(Profile(step, gamma)), edges.diff(), rtol=1e-9, atol=1e-12)


@settings(max_examples=50)
@given(profiles, profiles)
def test_the_product_is_the_integral(first: Profile, second: Profile) -> None:
    end = min(first.step, second.step)
    at = (torch.arange(100_000, dtype=torch.float64) + 0.5) * end / 100_000
    integral = (density(first, at) * density(second, at)).sum() * end / 100_000
    assert product(first, second) == pytest.approx(float(integral), rel=1e-3)
    assert product(first, second) == product(second, first)


@settings(max_examples=50)
@given(st.lists(profiles, min_size=1, max_size=12, unique=True), lengths)
def test_factors_add_up_to_one_and_nothing_near_is_better(known: list[Profile], length: float) -> None:
    wanted = Profile(max(p.step for p in known), exponent_of(length))
    found = fit(wanted, known)
    assert sum(found.factors) == pytest.approx(1, abs=1e-6)
    assert found.residual >= 0

    def left(factors: list[float]) -> float:
        own = product(wanted, wanted)
        towards = sum(x * product(p, wanted) for x, p in zip(factors, known, strict=True))
        pairs = sum(
            x * y * product(p, q)
            for x, p in zip(factors, known, strict=True)
            for y, q in zip(factors, known, strict=True)
        )
        return (own - 2 * towards + pairs) / own

    best = left(list(found.factors))
    assert max(0.0, best) ** 0.5 == pytest.approx(found.residual, abs=1e-5)
    for one in range(len(known)):
        for by in (-0.01, 0.01):
            moved = list(found.factors)
            moved[one] += by
            moved[one - 1] -= by
            assert left(moved) >= best - 1e-7


@given(st.lists(profiles, min_size=1, max_size=12, unique=True), st.data())
def test_a_profile_that_is_there_is_taken_as_it_is(known: list[Profile], data: st.DataObject) -> None:
    last = max(p.step for p in known)
    wanted = data.draw(st.sampled_from([p for p in known if p.step == last]))
    assert fit(wanted, known).residual < 1e-5


def test_more_snapshots_meet_a_profile_better() -> None:
    wanted = Profile(2000, exponent_of(0.15))
    residuals = []
    for count in (4, 8, 20, 40):
        known = [Profile(2000 * (i + 1) // count, exponent_of(length)) for i in range(count) for length in (0.05, 0.10)]
        residuals.append(fit(wanted, known).residual)
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[2] < 0.01, "a twentieth of the run, the default"
