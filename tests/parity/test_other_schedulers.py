"""The schedulers of diffusers for flow and EDM, and those whose noise or order differ; see test_schedulers.py.

euler, dpmpp_2m (flow)   FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler with use_flow_sigmas
heun (flow)              FlowMatchHeunDiscreteScheduler
euler, dpmpp_2m (edm)    EDMEulerScheduler, EDMDPMSolverMultistepScheduler
dpmpp_sde                DPMSolverSDEScheduler, with the same draws in the place of torchsde's
dpmpp_3m_sde             DPMSolverMultistepScheduler, solver_order 3
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    DPMSolverSDEScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from peers import (
    PREDICTION,
    STABLE_DIFFUSION,
    TOLERANCE,
    assert_same,
    drawn,
    initial_state,
    our_path,
    ours,
    start_noise,
    their_path,
    theirs,
)

from latentgen.diffusion.parameterization import EDM, Eps, Flow, denoiser
from latentgen.diffusion.samplers import SAMPLERS, dpmpp_2m, euler, heun
from latentgen.diffusion.schedules import SCHEDULES

steps = pytest.mark.parametrize("n", [1, 4, 20])


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


@steps
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_heun(n: int, shift: float) -> None:
    """Its levels: times from 1 to 1/1000, shifted, and 0."""
    scheduler = FlowMatchHeunDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(n)
    times = scheduler.sigmas.double()[::2][:n].clamp(max=1 - 1e-6)
    sigmas = torch.cat([times / (1 - times), torch.zeros(1)]).float()
    expected = theirs(scheduler, start_noise(), scales_input=False)
    result = ours(heun, Flow(t_max=1 - 1e-6), sigmas, start_noise() * (1 + sigmas[0]))
    torch.testing.assert_close(result, expected, **TOLERANCE)


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
@pytest.mark.parametrize("n", [2, 4, 20])
@pytest.mark.parametrize(
    ("name", "scheduler_class", "config"),
    [
        ("euler", EDMEulerScheduler, {}),
        ("dpmpp_2m", EDMDPMSolverMultistepScheduler, {"euler_at_final": False}),
    ],
)
def test_edm(name: str, scheduler_class: Any, config: dict, n: int, schedule: str) -> None:
    """sigma_data 0.5: the scheduler itself makes x0 of what the network says."""
    scheduler = scheduler_class(sigma_schedule=schedule, **config)
    scheduler.set_timesteps(n)
    p = EDM(sigma_data=0.5)
    sigmas = SCHEDULES[schedule](n, p)
    x = start_noise() * sigmas[0]
    assert_same(our_path(name, p, sigmas, x, False), their_path(scheduler, x))


@pytest.mark.parametrize("prediction", sorted(PREDICTION))
@pytest.mark.parametrize("n", [4, 20])
def test_dpmpp_sde(n: int, prediction: str) -> None:
    scheduler = DPMSolverSDEScheduler(**STABLE_DIFFUSION, prediction_type=prediction, timestep_spacing="trailing")
    scheduler.set_timesteps(n)
    scheduler.noise_sampler = drawn()
    p = PREDICTION[prediction]
    sigmas = SCHEDULES["trailing"](n, p)
    x = initial_state(start_noise(), sigmas[0].item())
    theirs = their_path(scheduler, x)
    assert_same(our_path("dpmpp_sde", p, sigmas, x, False, noise=drawn()), [*theirs[1::2], theirs[-1]])


def test_third_order_of_diffusers_is_second() -> None:
    """On Normal(0, 0.49), whose solution is known, down to t = 199."""
    errors: dict[str, list[float]] = {"ours": [], "theirs": []}
    for n in (25, 50, 100):
        p = Eps()
        sigmas = SCHEDULES["trailing"](n, p).double()
        scheduler = DPMSolverMultistepScheduler(
            **STABLE_DIFFUSION, timestep_spacing="trailing", solver_order=3, lower_order_final=False
        )
        scheduler.set_timesteps(n)

        def exact_eps(x_in: torch.Tensor, c_noise: torch.Tensor, p: Eps = p) -> torch.Tensor:
            sigma = p.table.sigma_of_t(c_noise.double()).reshape(-1, 1, 1, 1)
            return x_in * (1 + sigma**2).sqrt() * sigma / (0.49 + sigma**2)

        x_vp = start_noise().double()
        last = n * 4 // 5
        solution = x_vp * ((1 + sigmas[0] ** 2) * (0.49 + sigmas[last] ** 2) / (0.49 + sigmas[0] ** 2)).sqrt()
        theirs = their_path(scheduler, x_vp, net=exact_eps)[last - 1] * (1 + sigmas[last] ** 2).sqrt()
        ours = SAMPLERS["dpmpp_3m_sde"](
            denoiser(p, exact_eps), x_vp * (1 + sigmas[0] ** 2).sqrt(), sigmas[: last + 1], eta=0.0
        )
        errors["ours"].append((ours - solution).abs().max().item())
        errors["theirs"].append((theirs - solution).abs().max().item())
    orders = {who: math.log2(found[0] / found[-1]) / 2 for who, found in errors.items()}
    assert orders["theirs"] < 2.5 < 2.7 < orders["ours"], (orders, errors)
