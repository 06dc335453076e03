"""Laws of the sigma schedules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from latentgen.core.errors import UserError
from latentgen.diffusion.noise_tables import NoiseTable
from latentgen.diffusion.parameterization import PARAMETERIZATIONS, make
from latentgen.diffusion.schedules import (
    SCHEDULES,
    beta,
    beta_quantile,
    exponential,
    find_schedule,
    flow,
    karras,
    leading,
    linspace,
    polyexponential,
    sgm_uniform,
    trailing,
)

OF_TIMES = {"trailing", "leading", "linspace"}
AT_SIGMA_MIN = {"karras", "exponential", "polyexponential", "linspace"}


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(SCHEDULES)), target=st.sampled_from(sorted(PARAMETERIZATIONS)), n=st.integers(1, 1000)
)
def test_descending_to_zero_within_the_range(name: str, target: str, n: int) -> None:
    assume(not (name in OF_TIMES and target in ("flow", "edm", "ve")))
    assume(not (name == "leading" and n == 1000))  # with steps_offset 1 the last time would be 1000
    p = make(target)
    sigmas = SCHEDULES[name](n, p)
    assert sigmas.shape == (n + 1,)
    assert sigmas.dtype == torch.float32
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    if name != "leading":
        assert sigmas[0].item() == pytest.approx(p.sigma_max, rel=1e-6)
    if name in AT_SIGMA_MIN and n > 1:
        assert sigmas[-2].item() == pytest.approx(p.sigma_min, rel=1e-5)
    if name == "trailing" and n == 1000:
        torch.testing.assert_close(sigmas[:-1].flip(0), NoiseTable().sigmas.float())


@given(n=st.integers(1, 60), shift=st.floats(0.2, 8))
def test_flow_shift_is_the_papers_time_shift(n: int, shift: float) -> None:
    p = make("flow")
    sigmas = flow(n, p, shift=shift).double()
    start = p.sigma_max / shift
    t = torch.linspace(start / (1 + start), 0, n + 1, dtype=torch.float64)[:-1]
    shifted = shift * t / (1 + (shift - 1) * t)
    torch.testing.assert_close(sigmas[:-1] / (1 + sigmas[:-1]), shifted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("n", [0, -3])
def test_no_steps_is_a_user_mistake(name: str, n: int) -> None:
    with pytest.raises(UserError, match="--steps"):
        SCHEDULES[name](n, make("eps"))


def test_other_mistakes() -> None:
    for schedule in (trailing, leading):
        with pytest.raises(UserError, match="--steps 1001"):
            schedule(1001, make("eps"))
    with pytest.raises(UserError, match="flow"):
        linspace(5, make("flow"))
    with pytest.raises(UserError, match="karras"):
        trailing(5, make("edm"))
    with pytest.raises(UserError, match="steps_offset"):
        leading(10, make("eps"), steps_offset=100)
    with pytest.raises(UserError, match="rho"):
        karras(5, make("edm"), rho=0)
    with pytest.raises(UserError, match="shift"):
        flow(5, make("flow"), shift=0)
    with pytest.raises(UserError, match="rho"):
        polyexponential(5, make("edm"), rho=0)
    with pytest.raises(UserError, match="alpha"):
        beta(5, make("eps"), alpha=0)


@given(p=st.floats(1e-6, 1 - 1e-6), a=st.floats(0.2, 8), b=st.floats(0.2, 8))
def test_beta_quantiles_are_those_of_scipy(p: float, a: float, b: float) -> None:
    assert beta_quantile(p, a, b) == pytest.approx(stats.beta.ppf(p, a, b), rel=1e-6, abs=1e-12)
    assert beta_quantile(p, a, b) == pytest.approx(1 - beta_quantile(1 - p, b, a), rel=1e-6, abs=1e-9)


@settings(max_examples=30)
@given(target=st.sampled_from(sorted(PARAMETERIZATIONS)), n=st.integers(1, 60))
def test_schedules_that_are_special_cases_of_one_another(target: str, n: int) -> None:
    p = make(target)
    torch.testing.assert_close(polyexponential(n, p), exponential(n, p), rtol=1e-6, atol=0)
    torch.testing.assert_close(beta(n, p, alpha=1, beta=1), sgm_uniform(n, p), rtol=1e-4, atol=0)  # even quantiles
    if target not in ("flow", "edm", "ve"):
        torch.testing.assert_close(sgm_uniform(n, p)[:-1], linspace(n + 1, p)[:-2], rtol=1e-5, atol=0)


def test_beta_takes_more_steps_at_both_ends_than_even_times_do() -> None:
    p = make("eps")
    times, even = (p.table.t_of_sigma(schedule(20, p)[:-1].double()) for schedule in (beta, sgm_uniform))
    gaps, even_gaps = -times.diff(), -even.diff()
    assert gaps[0] < even_gaps[0] < gaps[9]
    assert gaps[-1] < even_gaps[-1]
    assert gaps.sum() > even_gaps.sum()


def test_a_schedule_is_asked_for_with_its_knobs() -> None:
    p = make("v")
    torch.testing.assert_close(find_schedule("karras,rho=5")(8, p), karras(8, p, rho=5.0))
    torch.testing.assert_close(find_schedule(" Flow_Shift , shift=3")(8, p), flow(8, p, shift=3.0))
    torch.testing.assert_close(find_schedule("normal")(8, p), linspace(8, p))
    for text, said in (
        ("karras,roh=5", "did you mean 'rho'"),
        ("karras,rho=five", "give a number"),
        ("karras,n=5", "no 'n'"),
        ("trailing,x=1", "nothing to set"),
        ("karas", "karras"),
    ):
        with pytest.raises(UserError, match=said):
            find_schedule(text)
    with pytest.raises(UserError, match="rho"):
        find_schedule("karras,rho=-1")(8, p)
