"""What every sampler promises, whichever one is added."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from latentgen.diffusion.parameterization import make
from latentgen.diffusion.samplers import SAMPLERS
from latentgen.diffusion.schedules import SCHEDULES

ORDER = {"ddim": 1, "euler": 1, "heun": 2, "dpmpp_2m": 2}
SPREAD = 0.7  # standard deviation of the data in these tests
P = make("eps")

samplers = pytest.mark.parametrize("name", sorted(SAMPLERS))
schedules = pytest.mark.parametrize("schedule", sorted(SCHEDULES))


def gaussian(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The exact denoiser for data ~ Normal(0, SPREAD^2). Elementwise."""
    return x * (SPREAD**2 / (SPREAD**2 + sigma.to(x.dtype).reshape(-1, 1, 1, 1) ** 2))


def exact(x: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
    """The probability flow of that data, solved: x scales with the standard deviation of the marginal."""
    return x * math.sqrt((SPREAD**2 + sigma_next**2) / (SPREAD**2 + sigma**2))


def start(dtype: torch.dtype = torch.float32, batch: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    noise = torch.randn(batch, 4, 8, 8, dtype=torch.float64, generator=generator)
    return (noise * P.sigma_max).to(dtype)


def noise_like(x: torch.Tensor, seed: int = 5) -> Callable[[float, float], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda sigma, sigma_next: torch.randn(x.shape, generator=generator).to(x.dtype)


def test_every_sampler_states_its_order() -> None:
    assert set(ORDER) == set(SAMPLERS)


@samplers
@schedules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 20])
def test_finite_in_every_precision_and_any_number_of_steps(
    name: str, schedule: str, dtype: torch.dtype, n: int
) -> None:
    sigmas = SCHEDULES[schedule](n, P)
    x = start(dtype)
    before, sigmas_before = x.clone(), sigmas.clone()
    calls: list[int] = []

    def on_step(i: int, x: torch.Tensor, x0_hat: torch.Tensor) -> None:
        assert x.shape == x0_hat.shape
        assert x.dtype == x0_hat.dtype == dtype
        calls.append(i)

    out = SAMPLERS[name](gaussian, x, sigmas, noise=noise_like(x), on_step=on_step)
    assert out.isfinite().all()
    assert out.shape == x.shape
    assert out.dtype == dtype
    assert calls == list(range(n))
    assert torch.equal(x, before)
    assert torch.equal(sigmas, sigmas_before)
    if n == 1:  # one step lands on the first estimate
        first = gaussian(before, sigmas[:1].expand(len(x)))
        torch.testing.assert_close(out.double(), first.double(), rtol=1e-2, atol=1e-3)


@samplers
@schedules
def test_a_picture_does_not_depend_on_its_batch(name: str, schedule: str) -> None:
    sigmas = SCHEDULES[schedule](7, P)
    x = start()
    together = SAMPLERS[name](gaussian, x, sigmas)
    alone = torch.cat([SAMPLERS[name](gaussian, one, sigmas) for one in x.split(1)])
    assert torch.equal(together, alone)


@samplers
def test_same_inputs_same_output(name: str) -> None:
    x, sigmas = start(), SCHEDULES["karras"](9, P)
    first, second = (SAMPLERS[name](gaussian, x, sigmas, noise=noise_like(x)) for _ in range(2))
    assert torch.equal(first, second)


@samplers
def test_steps_are_reported_with_the_new_x_and_the_estimate_before(name: str) -> None:
    x, sigmas = start(), SCHEDULES["karras"](5, P)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    out = SAMPLERS[name](gaussian, x, sigmas, on_step=lambda i, x, x0_hat: seen.append((x, x0_hat)))
    assert torch.equal(seen[-1][0], out)
    torch.testing.assert_close(seen[0][1], gaussian(x, sigmas[:1].expand(len(x))))
    torch.testing.assert_close(seen[1][1], gaussian(seen[0][0], sigmas[1:2].expand(len(x))))


@samplers
def test_a_schedule_may_be_cut_at_either_end(name: str) -> None:
    """img2img starts inside a schedule; a schedule with nothing left to do returns x."""
    sigmas = SCHEDULES["karras"](9, P)
    x = start() / P.sigma_max * sigmas[6]
    assert SAMPLERS[name](gaussian, x, sigmas[6:]).isfinite().all()
    assert torch.equal(SAMPLERS[name](gaussian, x, sigmas[-1:]), x)


@samplers
def test_gradients_flow_through(name: str) -> None:
    """Distillation differentiates through a sampler."""
    x = start(torch.float64, 1).requires_grad_()
    SAMPLERS[name](gaussian, x, SCHEDULES["karras"](3, P)).sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).all()


@samplers
def test_converges_at_its_order(name: str) -> None:
    """Halving steps in log(sigma) divides the error by 2^order. The step to 0 is left out, as it does not shrink."""
    x = start(torch.float64)
    errors = []
    for n in (20, 40, 80, 160):
        sigmas = torch.logspace(math.log10(P.sigma_max), -1, n + 1, dtype=torch.float64)
        out = SAMPLERS[name](gaussian, x, sigmas)
        errors.append((out - exact(x, sigmas[0].item(), sigmas[-1].item())).abs().max().item())
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert orders[-1] >= {1: 0.95, 2: 1.9}[ORDER[name]]


@samplers
def test_twenty_steps_down_to_zero_reach_the_data(name: str) -> None:
    x = start(torch.float64)
    out = SAMPLERS[name](gaussian, x, SCHEDULES["exponential"](20, P))
    error = (out - exact(x, P.sigma_max, 0)).abs().max() / exact(x, P.sigma_max, 0).abs().max()
    assert error < {1: 0.2, 2: 0.03}[ORDER[name]]
