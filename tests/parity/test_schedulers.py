"""Samplers and schedules against the schedulers of diffusers, on the same network and the same noise.

The network is a fixed function, so every difference is the sampler's. Known differences, all on the side of diffusers:

- DPMSolverMultistepScheduler rounds the times of karras and flow schedules to integers before the network sees them,
  and counts n + 1 points for `leading` and `linspace`; here it is compared on `trailing`, and on flow with exact times.
  With final_sigmas_type="zero" its last step is of first order whatever lower_order_final and euler_at_final say.
- DDIMScheduler steps to t - T // n, which is the next time of `leading`, and of `trailing` where n divides T.
- EulerDiscreteScheduler and HeunDiscreteScheduler interpolate sigma, not log(sigma), at the fractional times of
  `linspace`; they agree where n - 1 divides T - 1. For one step they start `linspace` at t = 0 and we at T - 1.
- FlowMatchEulerDiscreteScheduler starts at t = 1, sigma = infinity; ours at 1 - 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

from latentgen.diffusion.noise_tables import NoiseTable
from latentgen.diffusion.parameterization import Eps, Flow, Parameterization, V, denoiser
from latentgen.diffusion.samplers import ddim, dpmpp_2m, euler, heun
from latentgen.diffusion.schedules import SCHEDULES

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PREDICTION = {"epsilon": Eps(), "v_prediction": V()}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}

predictions = pytest.mark.parametrize("prediction", sorted(PREDICTION))
steps = pytest.mark.parametrize("n", [1, 4, 20])


def network(x_in: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
    """Nonlinear, mixes pixels and channels, depends on time, and stays of order one."""
    time = c_noise.to(x_in.dtype).reshape(-1, 1, 1, 1) / 1000
    mixed = torch.tanh(x_in.roll(1, dims=1) - 0.5 * x_in.roll(1, dims=-1))
    return x_in * (0.6 + 0.3 * time) + 0.4 * mixed * torch.cos(3 * time) + 0.1 * time


def start_noise() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def initial_state(noise: torch.Tensor, sigma: float) -> torch.Tensor:
    """In our coordinates what DDIM, DPM-Solver and flow matching begin with, which hold x / sqrt(1 + sigma^2)."""
    return noise * math.sqrt(1 + sigma**2)


def theirs(
    scheduler: Any, x: torch.Tensor, times: torch.Tensor | None = None, scales_input: bool = True, **step: Any
) -> torch.Tensor:
    """The sampling loop of a diffusers pipeline, after set_timesteps. `times`: what the network sees, if not the
    scheduler's own timesteps."""
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t) if scales_input else x
        seen = t if times is None else times[i]
        x = scheduler.step(network(scaled, seen.reshape(1).expand(len(x))), t, x, **step).prev_sample
    return x


def ours(
    sampler: Callable[..., torch.Tensor], p: Parameterization, sigmas: torch.Tensor, x: torch.Tensor, **knobs: Any
) -> torch.Tensor:
    return sampler(denoiser(p, network), x, sigmas, **knobs)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_times_are_those_of_diffusers_for_every_number_of_steps(spacing: str) -> None:
    scheduler = EulerDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing=spacing, steps_offset=1)
    for n in range(1, 1000):
        scheduler.set_timesteps(n)
        sigmas = SCHEDULES[spacing](n, Eps())
        # numpy's arange sometimes adds a surplus time at the end
        torch.testing.assert_close(sigmas[:-1], scheduler.sigmas[:n].float(), rtol=2e-5, atol=0)


@predictions
@steps
@pytest.mark.parametrize("schedule", ["trailing", "leading", "linspace", "karras", "exponential"])
@pytest.mark.parametrize(
    ("sampler", "scheduler_class"), [(euler, EulerDiscreteScheduler), (heun, HeunDiscreteScheduler)]
)
def test_euler_and_heun(sampler, scheduler_class: Any, schedule: str, n: int, prediction: str) -> None:
    if schedule == "linspace":
        n = {1: 2, 4: 10, 20: 28}[n]  # integer times
    if schedule in ("karras", "exponential"):
        n = max(n, 2)  # diffusers takes the range from `linspace`, whose one step is t = 0
    spacing = schedule if schedule in ("trailing", "leading", "linspace") else "linspace"
    scheduler = scheduler_class(
        **STABLE_DIFFUSION,
        prediction_type=prediction,
        timestep_spacing=spacing,
        steps_offset=1,
        use_karras_sigmas=schedule == "karras",
        use_exponential_sigmas=schedule == "exponential",
    )
    p = PREDICTION[prediction]
    sigmas = SCHEDULES[schedule](n, p)
    scheduler.set_timesteps(n)
    x = initial_state(start_noise(), sigmas[0].item())
    torch.testing.assert_close(ours(sampler, p, sigmas, x), theirs(scheduler, x), **TOLERANCE)


@predictions
@steps
@pytest.mark.parametrize("schedule", ["trailing", "leading"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim(schedule: str, n: int, prediction: str, eta: float) -> None:
    """set_alpha_to_one (the last step goes to sigma = 0) and no clipping."""
    scheduler = DDIMScheduler(
        **STABLE_DIFFUSION,
        prediction_type=prediction,
        timestep_spacing=schedule,
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=True,
    )
    scheduler.set_timesteps(n)
    p, fresh = PREDICTION[prediction], start_noise().flip(0)
    sigmas = SCHEDULES[schedule](n, p)
    result = ours(ddim, p, sigmas, initial_state(start_noise(), sigmas[0].item()), eta=eta, noise=lambda s, t: fresh)
    expected = theirs(scheduler, start_noise(), eta=eta, variance_noise=fresh)
    torch.testing.assert_close(result, expected, **TOLERANCE)


@predictions
@steps
def test_dpmpp_2m(n: int, prediction: str) -> None:
    """algorithm_type dpmsolver++, solver_order 2, solver_type midpoint, final_sigmas_type zero."""
    scheduler = DPMSolverMultistepScheduler(
        **STABLE_DIFFUSION, prediction_type=prediction, timestep_spacing="trailing", euler_at_final=False
    )
    scheduler.set_timesteps(n)
    p = PREDICTION[prediction]
    sigmas = SCHEDULES["trailing"](n, p)
    result = ours(dpmpp_2m, p, sigmas, initial_state(start_noise(), sigmas[0].item()))
    torch.testing.assert_close(result, theirs(scheduler, start_noise()), **TOLERANCE)


@pytest.mark.parametrize("n", [4, 20])
def test_zero_terminal_snr(n: int) -> None:
    scheduler = EulerDiscreteScheduler(
        **STABLE_DIFFUSION, prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
    )
    scheduler.set_timesteps(n)
    p = V(NoiseTable(zero_terminal_snr=True))
    sigmas = SCHEDULES["trailing"](n, p)
    x = initial_state(start_noise(), sigmas[0].item())
    torch.testing.assert_close(ours(euler, p, sigmas, x), theirs(scheduler, x), **TOLERANCE)


def test_one_step_from_zero_terminal_snr_does_not_cancel() -> None:
    """At sigma = 4096 diffusers subtracts numbers 4096 times the result (5e-4 lost in float32). Ours must not."""
    p = V(NoiseTable(zero_terminal_snr=True))
    sigmas = SCHEDULES["trailing"](1, p)
    x = initial_state(start_noise(), sigmas[0].item())
    torch.testing.assert_close(
        ours(euler, p, sigmas, x).double(), ours(euler, p, sigmas, x.double()), rtol=1e-5, atol=1e-5
    )


@steps
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler(n: int, shift: float) -> None:
    """Times 1, (n-1)/n, ..., 1/n, shifted: the choice of the Flux and SD3 pipelines."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / n, n).tolist())
    p = Flow(t_max=1 - 1e-6)
    sigmas = SCHEDULES["flow"](n, p, shift=shift)
    result = ours(euler, p, sigmas, initial_state(start_noise(), sigmas[0].item()))
    torch.testing.assert_close(result, theirs(scheduler, start_noise(), scales_input=False), **TOLERANCE)


@steps
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_dpmpp_2m(n: int, shift: float) -> None:
    """use_flow_sigmas starts at the shifted t = 0.999, so that is the t_max given to ours."""
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(n)
    p = Flow(t_max=shift * 0.999 / (1 + (shift - 1) * 0.999))
    sigmas = SCHEDULES["flow"](n, p, shift=shift)
    x_t = start_noise()
    result = ours(dpmpp_2m, p, sigmas, x_t * (1 + sigmas[0]))  # x_t = (1 - t) x
    expected = theirs(scheduler, x_t, times=scheduler.sigmas * 1000)
    torch.testing.assert_close(result, expected, **TOLERANCE)
