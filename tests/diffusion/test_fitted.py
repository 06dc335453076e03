"""A fitted schedule is a schedule, and better than the registered ones, also on noise it was not fitted to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentgen.core.errors import UserError
from latentgen.diffusion import fitted
from latentgen.diffusion.fitted import error_of, fit, reference
from latentgen.diffusion.parameterization import EDM, Flow, Parameterization, make
from latentgen.diffusion.samplers import SAMPLERS
from latentgen.diffusion.schedules import SCHEDULES, karras

P = make("eps")
MEANS = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Exact for a mixture of five Gaussians of spread 0.3 in eight dimensions."""
    flat, variance = x.flatten(1)[:, None], 0.09 + sigma.to(x.dtype).reshape(-1, 1, 1) ** 2
    share = torch.softmax(-0.5 * ((flat - MEANS) ** 2 / variance).sum(dim=2), dim=1)
    each = MEANS + 0.09 / variance * (flat - MEANS)
    return (share[..., None] * each).sum(dim=1).reshape(x.shape)


def start(seed: int, p: Parameterization = P) -> torch.Tensor:
    noise = torch.randn(24, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return noise * p.sigma_max


@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun"])
@pytest.mark.parametrize("n", [5, 8])
def test_better_than_every_registered_schedule_on_other_noise(solver: str, n: int) -> None:
    found = fit(denoise, start(0), n, P, solver=SAMPLERS[solver])
    x = start(1)
    end = reference(denoise, x, P, 400)

    def error(sigmas: torch.Tensor) -> float:
        return error_of((SAMPLERS[solver](denoise, x, sigmas) - end).flatten(1))

    others = {name: error(schedule(n, P)) for name, schedule in SCHEDULES.items()}
    assert error(found.sigmas) < min(others.values()), others
    if solver == "dpmpp_2m":
        assert error(found.sigmas) < 0.6 * min(others.values()), others
    assert found.error < found.start_error
    assert found.start in SCHEDULES


@pytest.mark.parametrize("p", [P, Flow(), EDM()], ids=["eps", "flow", "edm"])
@pytest.mark.parametrize("n", [1, 2, 6])
def test_a_schedule_like_any_other(p: Parameterization, n: int) -> None:
    sigmas = fit(denoise, start(0, p), n, p, rounds=2, starts=1, target=torch.zeros(24, 2, 2, 2)).sigmas
    assert sigmas.dtype == torch.float32
    assert len(sigmas) == n + 1
    assert sigmas[0].item() == pytest.approx(p.sigma_max, rel=1e-6)
    assert (sigmas[:-1] > sigmas[1:]).all()
    assert sigmas[-2].item() >= p.sigma_min * (1 - 1e-6)
    assert sigmas[-1] == 0


@settings(max_examples=30)
@given(logs=st.lists(st.floats(-5, 3), min_size=1, max_size=12))
def test_any_steps_make_a_descending_schedule_in_the_range(logs: list[float]) -> None:
    steps = torch.tensor(logs, dtype=torch.float64)
    sigmas = fitted._sigmas(steps, P)
    assert (sigmas[:-1] > sigmas[1:]).all()
    assert sigmas[-2].item() >= P.sigma_min * (1 - 1e-6)
    torch.testing.assert_close(fitted._sigmas(fitted._steps(sigmas, P), P), sigmas, rtol=1e-5, atol=0)


def test_the_same_twice_and_the_rounds_are_reported() -> None:
    errors: list[float] = []
    first = fit(denoise, start(0), 5, P, starts=1, on_round=lambda i, error: errors.append(error))
    second = fit(denoise, start(0), 5, P, starts=1)
    assert torch.equal(first.sigmas, second.sigmas)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == first.error


def test_the_error_is_that_of_a_typical_picture() -> None:
    residual = torch.tensor([[0.1, 0.1], [0.1, -0.1], [10.0, 10.0]], dtype=torch.float64)
    assert error_of(residual) == pytest.approx((0.1 * 0.1 * 10) ** (1 / 3))


def test_an_already_perfect_solver_is_left_alone() -> None:
    """Where nothing can be gained no step goes wrong: a constant denoiser is solved exactly by any schedule."""
    found = fit(lambda x, sigma: torch.ones_like(x), start(0), 4, P)
    assert found.error < 1e-12
    assert found.sigmas.isfinite().all()


def test_mistakes() -> None:
    with pytest.raises(UserError, match="at least 1"):
        fit(denoise, start(0), 0, P)
    assert karras(3, P)[0] == fit(denoise, start(0), 3, P, rounds=1).sigmas[0]
