"""Parallel sampling draws what the sequential sampler draws, in fewer rounds."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentgen.core.errors import UserError
from latentgen.diffusion.parameterization import make
from latentgen.diffusion.samplers import ddim, euler
from latentgen.diffusion.samplers.parallel import parallel
from latentgen.diffusion.schedules import SCHEDULES, karras

P = make("eps")


def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Two clusters in every value, -1 and 1: not linear. Elementwise, so that a row cannot see another."""
    sigma = sigma.to(x.dtype).reshape(-1, 1, 1, 1)
    spread = sigma**2 + 0.01
    return (0.01 * x + sigma**2 * torch.tanh(x / spread)) / spread


def start(batch: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    noise = torch.randn(batch, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return (noise * P.sigma_max).to(dtype)


class Counted:
    """Counts calls and rows."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        assert sigma.shape == x.shape[:1]
        self.calls.append(len(x))
        return denoise(x, sigma)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tolerance_zero_is_the_sequential_sampler(schedule: str, dtype: torch.dtype) -> None:
    x, sigmas = start(dtype=dtype), SCHEDULES[schedule](20, P)
    before = x.clone()
    out = parallel(denoise, x, sigmas, window=6, tolerance=0)
    exact = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out, euler(denoise, x, sigmas), rtol=exact, atol=exact)
    assert out.dtype == dtype
    assert torch.equal(x, before)


def test_the_error_falls_with_the_tolerance() -> None:
    x, sigmas = start(), karras(60, P)
    expected = ddim(denoise, x, sigmas)
    errors = []
    for tolerance in (1e-1, 1e-2, 1e-3, 1e-5, 1e-8):
        errors.append((parallel(denoise, x, sigmas, window=16, tolerance=tolerance) - expected).abs().max().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-2  # the tolerance was made use of
    assert errors[2] < 2e-2
    assert errors[-1] < 1e-7


def test_fewer_rounds_each_one_call_of_the_window() -> None:
    x, sigmas, counted = start(), karras(60, P), Counted()
    parallel(counted, x, sigmas, window=16, tolerance=1e-3)
    assert len(counted.calls) <= 25
    assert max(counted.calls) == 16 * len(x)
    sequential = Counted()
    parallel(sequential, x, sigmas, window=1)
    assert sequential.calls == [3] * 60


@settings(max_examples=15)
@given(n=st.integers(1, 24), window=st.integers(1, 30), tolerance=st.sampled_from([0.0, 1e-4, 3e-2]))
def test_a_picture_does_not_depend_on_its_batch(n: int, window: int, tolerance: float) -> None:
    sigmas, x = karras(n, P), start()
    x[1] *= 0.1  # one that converges at its own pace
    together = parallel(denoise, x, sigmas, window=window, tolerance=tolerance)
    alone = [parallel(denoise, one, sigmas, window=window, tolerance=tolerance) for one in x.split(1)]
    assert torch.equal(together, torch.cat(alone))


def test_steps_are_reported_in_order() -> None:
    x, sigmas = start(), karras(9, P)
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    out = parallel(
        denoise, x, sigmas, window=4, tolerance=0, on_step=lambda i, x, x0_hat: seen.append((i, x.clone(), x0_hat))
    )
    assert [i for i, _, _ in seen] == list(range(9))
    assert torch.equal(seen[-1][1], out)
    for (_, x_before, _), (i, _, x0_hat) in pairwise(seen):
        torch.testing.assert_close(x0_hat, denoise(x_before, sigmas[i : i + 1].expand(len(x))), rtol=1e-6, atol=1e-6)


def test_gradients_flow_through() -> None:
    x, sigmas = start(1).requires_grad_(), karras(4, P)
    (parallel_grad,) = torch.autograd.grad(parallel(denoise, x, sigmas, window=3, tolerance=0).sum(), x)
    (euler_grad,) = torch.autograd.grad(euler(denoise, x, sigmas).sum(), x)
    torch.testing.assert_close(parallel_grad, euler_grad, rtol=1e-9, atol=1e-12)


def test_the_ends() -> None:
    x, sigmas = start(), karras(9, P)
    assert torch.equal(parallel(denoise, x, sigmas[-1:]), x)
    assert parallel(denoise, x / P.sigma_max * sigmas[6], sigmas[6:]).isfinite().all()
    with pytest.raises(UserError, match="window"):
        parallel(denoise, x, sigmas, window=0)
    with pytest.raises(UserError, match="tolerance"):
        parallel(denoise, x, sigmas, tolerance=-1.0)
