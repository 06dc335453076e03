"""What every sampler promises, whichever one is added."""

from __future__ import annotations

import pytest
import torch

from latentgen.core.errors import UserError
from latentgen.diffusion.brownian import brownian_noise
from latentgen.diffusion.parameterization import make
from latentgen.diffusion.samplers import SAMPLERS
from latentgen.diffusion.schedules import SCHEDULES

SPREAD = 0.7  # standard deviation of the data in these tests
P = make("eps")
DETERMINISTIC = sorted(name for name, method in SAMPLERS.items() if not method.noise)
STOCHASTIC = sorted(name for name, method in SAMPLERS.items() if method.noise)

samplers = pytest.mark.parametrize("name", sorted(SAMPLERS))
schedules = pytest.mark.parametrize("schedule", sorted(SCHEDULES))


def gaussian(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The exact denoiser for data ~ Normal(0, SPREAD^2). Elementwise."""
    return x * (SPREAD**2 / (SPREAD**2 + sigma.to(x.dtype).reshape(-1, 1, 1, 1) ** 2))


def start(dtype: torch.dtype = torch.float32, batch: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    noise = torch.randn(batch, 4, 4, 4, dtype=torch.float64, generator=generator)
    return (noise * P.sigma_max).to(dtype)


def paths(x: torch.Tensor, first: int = 0):
    return brownian_noise(range(first, first + len(x)), x)


class Counted:
    """The denoiser, with its calls counted."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        assert sigma.shape == (len(x),)
        assert (sigma > 0).all(), "the network is not asked at 0"
        self.calls += 1
        return gaussian(x, sigma)


@samplers
@schedules
def test_one_step_is_the_first_estimate(name: str, schedule: str) -> None:
    sigmas, x, denoise = SCHEDULES[schedule](1, P), start(), Counted()
    out = SAMPLERS[name](denoise, x, sigmas, noise=paths(x))
    assert torch.equal(out, gaussian(x, sigmas[:1].expand(len(x))))
    assert denoise.calls == 1


@samplers
@schedules
def test_a_picture_does_not_depend_on_its_batch(name: str, schedule: str) -> None:
    """Bit for bit, and finite all the way to sigma = 0."""
    sigmas, x = SCHEDULES[schedule](4, P), start(batch=2)
    together = SAMPLERS[name](gaussian, x, sigmas, noise=paths(x))
    apart = [SAMPLERS[name](gaussian, one, sigmas, noise=paths(one, k)) for k, one in enumerate(x.split(1))]
    assert torch.equal(together, torch.cat(apart))
    assert together.isfinite().all()


@samplers
@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        ("eps", torch.float32),
        ("eps", torch.bfloat16),
        ("eps", torch.float64),
        ("flow", torch.float32),
        ("edm", torch.float32),
    ],
)
def test_finite_in_every_precision_over_every_range(name: str, dtype: torch.dtype, target: str) -> None:
    p = make(target)
    sigmas = SCHEDULES["exponential"](9, p)
    x = (start(torch.float64) * (p.sigma_max / P.sigma_max)).to(dtype)
    before, sigmas_before = x.clone(), sigmas.clone()
    steps: list[int] = []

    def on_step(i: int, x: torch.Tensor, x0_hat: torch.Tensor) -> None:
        assert x.shape == x0_hat.shape
        assert x.dtype == x0_hat.dtype == dtype
        steps.append(i)

    out = SAMPLERS[name](gaussian, x, sigmas, noise=paths(x), on_step=on_step)
    assert out.isfinite().all()
    assert out.shape == x.shape
    assert out.dtype == dtype
    assert out.abs().max() < 10 * SPREAD
    assert steps == list(range(len(steps) if name == "dpm_adaptive" else 9))
    assert torch.equal(x, before)
    assert torch.equal(sigmas, sigmas_before)


@samplers
def test_bfloat16_stays_near_float32(name: str) -> None:
    sigmas, x = SCHEDULES["karras"](10, P), start(torch.bfloat16)
    half = SAMPLERS[name](gaussian, x, sigmas, noise=paths(x)).float()
    full = SAMPLERS[name](gaussian, x.float(), sigmas, noise=paths(x.float()))
    assert (half - full).square().mean().sqrt() < 0.05 * SPREAD


@samplers
def test_same_seed_same_picture(name: str) -> None:
    x, sigmas = start(), SCHEDULES["karras"](9, P)
    first, second, other = (SAMPLERS[name](gaussian, x, sigmas, noise=paths(x, seed)) for seed in (0, 0, 7))
    assert torch.equal(first, second)
    assert torch.equal(first, other) != SAMPLERS[name].noise


@samplers
def test_network_calls_are_as_stated(name: str) -> None:
    method = SAMPLERS[name]
    if method.calls is None:
        assert method.network_calls(SCHEDULES["karras"](5, P)) is None
        return
    full = SCHEDULES["karras"](9, P)
    for sigmas in (full, full[:-1], full[3:], full[-2:], full[-1:]):
        x, denoise = start(), Counted()
        method(denoise, x, sigmas, noise=paths(x))
        assert denoise.calls == method.network_calls(sigmas)


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"dpm_adaptive"}))
def test_steps_are_reported_with_the_new_x_and_the_estimate_before(name: str) -> None:
    x, sigmas = start(), SCHEDULES["karras"](5, P)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    out = SAMPLERS[name](gaussian, x, sigmas, noise=paths(x), on_step=lambda i, x, x0_hat: seen.append((x, x0_hat)))
    assert torch.equal(seen[-1][0], out)
    torch.testing.assert_close(seen[0][1], gaussian(x, sigmas[:1].expand(len(x))))
    torch.testing.assert_close(seen[1][1], gaussian(seen[0][0], sigmas[1:2].expand(len(x))))


@samplers
def test_a_schedule_may_be_cut_at_either_end(name: str) -> None:
    """img2img starts inside a schedule; a schedule with nothing left to do returns x."""
    sigmas = SCHEDULES["karras"](9, P)
    x = start() / P.sigma_max * sigmas[6]
    assert SAMPLERS[name](gaussian, x, sigmas[6:], noise=paths(x)).isfinite().all()
    assert SAMPLERS[name](gaussian, x, sigmas[6:-1], noise=paths(x)).isfinite().all()
    assert torch.equal(SAMPLERS[name](gaussian, x, sigmas[-1:], noise=paths(x)), x)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_inversion_is_undone_by_sampling(name: str) -> None:
    """Ascending sigmas carry data to noise, and the same levels descending bring it back."""
    x = start(torch.float64) * (SPREAD / P.sigma_max)
    up = SCHEDULES["exponential"](60, P)[:-1].flip(0)
    knobs = {"rtol": 1e-3, "atol": 1e-4} if name == "dpm_adaptive" else {}
    noise = SAMPLERS[name](gaussian, x, up, **knobs)
    assert noise.std().item() == pytest.approx(P.sigma_max, rel=0.25)
    back = SAMPLERS[name](gaussian, noise, up.flip(0), **knobs)
    assert (back - x).abs().max() < (0.1 if SAMPLERS[name].order == 1 else 0.03)


@samplers
def test_schedules_that_cannot_be_walked_are_refused(name: str) -> None:
    x, up = start(), SCHEDULES["karras"](5, P).flip(0)
    message = "only goes down" if SAMPLERS[name].noise else "cannot start at 0"
    with pytest.raises(UserError, match=message):
        SAMPLERS[name](gaussian, x, up, noise=paths(x))
    for bad in ([3.0, 1.0, 2.0, 0.0], [3.0, 1.0, 1.0, 0.0], [3.0, float("nan"), 0.0], [3.0, -1.0]):
        with pytest.raises(UserError, match="sigmas"):
            SAMPLERS[name](gaussian, x, torch.tensor(bad), noise=paths(x))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_sampler_that_needs_noise_says_so(name: str) -> None:
    with pytest.raises(UserError, match="noise="):
        SAMPLERS[name](gaussian, start(), SCHEDULES["karras"](5, P))


@samplers
def test_gradients_flow_through(name: str) -> None:
    """Distillation differentiates through a sampler."""
    x = start(torch.float64, 1).requires_grad_()
    SAMPLERS[name](gaussian, x, SCHEDULES["karras"](3, P), noise=paths(x)).sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).all() or name == "lcm"  # which forgets x but for its first estimate, linear in x
