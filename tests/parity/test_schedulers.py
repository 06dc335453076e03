"""Samplers and schedules against the schedulers of diffusers, on the same network and the same noise.

What is compared with what (flow, EDM and more in test_other_schedulers.py):

    ddim                    DDIMScheduler, eta 0 to 1
    ddpm                    DDPMScheduler, variance fixed_small, fixed_large and learned_range, up to 1000 steps
    plms                    PNDMScheduler, skip_prk_steps
    euler, heun             EulerDiscreteScheduler, HeunDiscreteScheduler
    euler_ancestral         EulerAncestralDiscreteScheduler
    dpm2, dpm2_ancestral    KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler
    lms                     LMSDiscreteScheduler
    dpmpp_2s_ancestral      DPMSolverSinglestepScheduler (no noise: eta 0)
    dpmpp_2m, dpmpp_2m_sde  DPMSolverMultistepScheduler, dpmsolver++ and sde-dpmsolver++, midpoint and heun
    deis, ipndm, unipc      DEISMultistepScheduler, IPNDMScheduler, UniPCMultistepScheduler (orders 1 to 3, bh1 and bh2)
    lcm                     LCMScheduler

dpm_adaptive, er_sde, restart and parallel are not there.

Known differences, all on the side of diffusers:

- DPMSolverMultistepScheduler rounds the times of karras and flow schedules to integers before the network sees them,
  and counts n + 1 points for `leading` and `linspace`; here it is compared on `trailing`, and on flow with exact times.
  With final_sigmas_type="zero" its last step is of first order whatever lower_order_final and euler_at_final say.
- Its solver_order=3 gives the second derivative half its weight, for both dpmsolver++ and sde-dpmsolver++ (as merged in
  https://github.com/huggingface/diffusers/pull/1132 and https://github.com/huggingface/diffusers/pull/9104: D2 is
  f[u0, u1, u2], where the Taylor term needs twice that), so it converges like second order. dpmpp_3m_sde does not
  follow; a test shows both.
- DDIMScheduler, DDPMScheduler and PNDMScheduler step to t - T // n, which is the next time of `leading`, and of
  `trailing` where n divides T.
- EulerDiscreteScheduler and HeunDiscreteScheduler interpolate sigma, not log(sigma), at the fractional times of
  `linspace`; they agree where n - 1 divides T - 1. For one step they start `linspace` at t = 0 and we at T - 1.
- Their beta schedule takes the quantiles between sigma_max and sigma_min; the paper and ours take times.
- FlowMatchEulerDiscreteScheduler and FlowMatchHeunDiscreteScheduler start at t = 1, sigma = infinity; ours at 1 - 1e-6.
- DEISMultistepScheduler ends at the smallest sigma of the table, not at 0, and lowers its order at the end of fewer
  than 15 steps unless told not to; ours ends where it is told, and goes to 0 by Euler's method.
- UniPCMultistepScheduler with bh1 gives NaN in its step to 0 (B(h) = -infinity times 0); compared up to there.
- DDPMScheduler with fixed_large or learned_range adds noise in the step to 0 too, unless that starts at
  t = 0; ours never.
- PNDMScheduler on a v network extrapolates v, ours the slope, which is eps whatever the network says; compared on eps.
- IPNDMScheduler has its own clock, which begins at t = 1 with alpha = 0; there its first step discards the network's
  output. It is compared from its second step on.
- LCMScheduler mixes a little of x into the estimate (boundary scalings); a large timestep_scaling takes that away.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from peers import (
    PREDICTION,
    STABLE_DIFFUSION,
    TOLERANCE,
    assert_same,
    drawn,
    generator,
    initial_state,
    network,
    our_path,
    ours,
    start_noise,
    their_path,
    theirs,
)

from latentgen.diffusion.noise_tables import NoiseTable
from latentgen.diffusion.parameterization import Eps, V
from latentgen.diffusion.samplers import SAMPLERS, ddim, dpmpp_2m, euler, heun
from latentgen.diffusion.schedules import SCHEDULES

predictions = pytest.mark.parametrize("prediction", sorted(PREDICTION))
steps = pytest.mark.parametrize("n", [1, 4, 20])


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


# --- whole trajectories -----------------------------------------------------------------------------------------------


NOT_ON_V = {("plms", "v_prediction")}
VP_CASES = [
    ("plms", PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": True}, {}),
    *[
        (
            "unipc",
            UniPCMultistepScheduler,
            {"solver_order": order, "solver_type": kind},
            {"order": order, "variant": kind},
        )
        for order in (1, 2, 3)
        for kind in ("bh1", "bh2")
    ],
    ("dpmpp_2m", DPMSolverMultistepScheduler, {"euler_at_final": False}, {}),
]


@pytest.mark.parametrize("n", [4, 20])
@pytest.mark.parametrize(
    ("name", "scheduler_class", "config", "knobs", "prediction"),
    [(*case, prediction) for case in VP_CASES for prediction in PREDICTION if (case[0], prediction) not in NOT_ON_V],
)
def test_trajectories_of_deterministic_samplers(name, scheduler_class, config, knobs, n, prediction) -> None:
    config = {**config, "final_sigmas_type": "zero"} if name == "unipc" else config
    scheduler = scheduler_class(**STABLE_DIFFUSION, prediction_type=prediction, timestep_spacing="trailing", **config)
    scheduler.set_timesteps(n)
    p = PREDICTION[prediction]
    sigmas = SCHEDULES["trailing"](n, p)
    theirs = their_path(scheduler, start_noise())
    ours = our_path(name, p, sigmas, initial_state(start_noise(), sigmas[0].item()), True, **knobs)
    if name == "plms":
        del theirs[0]  # a first try of the first step, which the second call replaces
    if knobs.get("variant") == "bh1":
        assert theirs.pop().isnan().all(), "mended there: compare the last step too"
        assert ours.pop().isfinite().all()
    assert_same(ours, theirs)


@predictions
@pytest.mark.parametrize("n", [4, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order: int, n: int, prediction: str) -> None:
    scheduler = DEISMultistepScheduler(
        **STABLE_DIFFUSION,
        prediction_type=prediction,
        timestep_spacing="trailing",
        solver_order=order,
        lower_order_final=False,
    )
    scheduler.set_timesteps(n)
    p = PREDICTION[prediction]
    sigmas = SCHEDULES["trailing"](n, p)
    sigmas[-1] = p.sigma_min
    x = initial_state(start_noise(), sigmas[0].item())
    assert_same(our_path("deis", p, sigmas, x, True, order=order), their_path(scheduler, start_noise()))


@predictions
@pytest.mark.parametrize("n", [4, 20])
@pytest.mark.parametrize(
    ("name", "scheduler_class"),
    [
        ("lms", LMSDiscreteScheduler),
        ("dpm2", KDPM2DiscreteScheduler),
        ("euler_ancestral", EulerAncestralDiscreteScheduler),
        ("dpm2_ancestral", KDPM2AncestralDiscreteScheduler),
    ],
)
def test_trajectories_of_the_k_schedulers(name: str, scheduler_class: Any, n: int, prediction: str) -> None:
    scheduler = scheduler_class(**STABLE_DIFFUSION, prediction_type=prediction, timestep_spacing="trailing")
    scheduler.set_timesteps(n)
    p = PREDICTION[prediction]
    sigmas = SCHEDULES["trailing"](n, p)
    x = initial_state(start_noise(), sigmas[0].item())
    adds_noise = SAMPLERS[name].noise
    theirs = their_path(scheduler, x, **({"generator": generator()} if adds_noise else {}))
    if SAMPLERS[name].calls == 2:
        theirs = [*theirs[1::2], theirs[-1]]  # one call to the middle, one to the end; the step to 0 is one call
    assert_same(our_path(name, p, sigmas, x, False, noise=drawn()), theirs)


@predictions
@pytest.mark.parametrize("n", [4, 20])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_dpmpp_2m_sde(solver_type: str, n: int, prediction: str) -> None:
    scheduler = DPMSolverMultistepScheduler(
        **STABLE_DIFFUSION,
        prediction_type=prediction,
        timestep_spacing="trailing",
        algorithm_type="sde-dpmsolver++",
        solver_type=solver_type,
        euler_at_final=False,
    )
    scheduler.set_timesteps(n)
    p = PREDICTION[prediction]
    sigmas = SCHEDULES["trailing"](n, p)
    x = initial_state(start_noise(), sigmas[0].item())
    ours = our_path("dpmpp_2m_sde", p, sigmas, x, True, noise=drawn(), solver_type=solver_type)
    assert_same(ours, their_path(scheduler, start_noise(), generator=generator()))


@predictions
@pytest.mark.parametrize("n", [5, 21])
def test_dpmpp_2s(n: int, prediction: str) -> None:
    """Every second of their levels is our middle: the geometric mean, on an exponential schedule."""
    scheduler = DPMSolverSinglestepScheduler(
        **STABLE_DIFFUSION, prediction_type=prediction, use_exponential_sigmas=True, lower_order_final=True
    )
    scheduler.set_timesteps(n)
    p = PREDICTION[prediction]
    sigmas = torch.cat([SCHEDULES["exponential"](n, p)[:-1:2], torch.zeros(1)])
    theirs = their_path(scheduler, start_noise(), times=p.table.t_of_sigma(scheduler.sigmas[:-1].double()))
    x = initial_state(start_noise(), sigmas[0].item())
    assert_same(our_path("dpmpp_2s_ancestral", p, sigmas, x, True, eta=0.0), [*theirs[1::2], theirs[-1]])


@pytest.mark.parametrize(
    ("n", "prediction"),
    [(4, "epsilon"), (4, "v_prediction"), (20, "epsilon"), (20, "v_prediction"), (1000, "epsilon")],
)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm(variance: str, n: int, prediction: str) -> None:
    scheduler = DDPMScheduler(
        **STABLE_DIFFUSION,
        prediction_type=prediction,
        timestep_spacing="trailing",
        variance_type=variance,
        clip_sample=False,
    )
    scheduler.set_timesteps(n)
    p = PREDICTION[prediction]
    sigmas = SCHEDULES["trailing"](n, p)

    def share(x_in: torch.Tensor) -> torch.Tensor:
        return torch.sin(3 * x_in)  # what a second head of the network says, in [-1, 1]

    def both(x_in: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
        output = network(x_in, c_noise)
        return torch.cat([output, share(x_in)], dim=1) if variance == "learned_range" else output

    def log_variance(x: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        """arXiv 2102.09672, eq. 15, between the two fixed variances."""
        s2, n2 = (level.double().square()[:, None, None, None] for level in (sigma, sigma_next))
        small, large = n2 * (s2 - n2) / s2, (1 + n2) * (s2 - n2) / (1 + s2)
        v = (share(x / (1 + sigma[0] ** 2).sqrt()) + 1) / 2
        return v * large.log() + (1 - v) * small.log()

    knobs = {"log_variance": log_variance} if variance == "learned_range" else {"variance": variance}
    x = initial_state(start_noise(), sigmas[0].item())
    ours = our_path("ddpm", p, sigmas, x, True, noise=drawn(), **knobs)
    theirs = their_path(scheduler, start_noise(), net=both, generator=generator())
    if n < 1000 and variance != "fixed_small":  # theirs adds noise at the end
        ours.pop(), theirs.pop()
    assert_same(ours, theirs)


@predictions
@pytest.mark.parametrize("n", [2, 8])
def test_lcm(n: int, prediction: str) -> None:
    scheduler = LCMScheduler(**STABLE_DIFFUSION, prediction_type=prediction, clip_sample=False, timestep_scaling=1e6)
    scheduler.set_timesteps(n)
    p = PREDICTION[prediction]
    sigmas = torch.cat([p.table.sigma_of_t(scheduler.timesteps.double()), torch.zeros(1)]).float()
    x = initial_state(start_noise(), sigmas[0].item())
    theirs = their_path(scheduler, start_noise(), generator=generator())
    assert_same(our_path("lcm", p, sigmas, x, True, noise=drawn()), theirs)


def test_ipndm() -> None:
    """On a v network over their own clock, from the second level on."""
    n = 12
    scheduler = IPNDMScheduler()
    scheduler.set_timesteps(n)
    scheduler.timesteps = scheduler.timesteps[1:]
    scheduler.set_begin_index(1)
    sigmas = (scheduler.betas / scheduler.alphas)[1:]
    x_vp = start_noise()
    theirs, x = [], x_vp
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, 1000 * t.reshape(1).expand(2)), t, x).prev_sample
        theirs.append(x)

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        alpha = (1 + sigma**2).rsqrt().reshape(-1, 1, 1, 1)
        time = 1000 * torch.atan(sigma) / math.pi * 2
        return alpha * (alpha * x) - (1 - alpha**2).sqrt() * network(alpha * x, time)

    ours: list[torch.Tensor] = []
    SAMPLERS["ipndm"](
        denoise,
        x_vp * math.sqrt(1 + sigmas[0].item() ** 2),
        sigmas,
        on_step=lambda i, x, x0_hat: ours.append(x / math.sqrt(1 + sigmas[i + 1].item() ** 2)),
    )
    assert_same(ours, theirs)
