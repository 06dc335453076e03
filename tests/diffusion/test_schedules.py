"""Laws of the sigma schedules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from latentgen.core.errors import UserError
from latentgen.diffusion.noise_tables import NoiseTable
from latentgen.diffusion.parameterization import PARAMETERIZATIONS, make
from latentgen.diffusion.schedules import SCHEDULES, flow, karras, leading, linspace, trailing

OF_TIMES = {"trailing", "leading", "linspace"}
AT_SIGMA_MIN = {"karras", "exponential", "linspace"}


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
