"""The schedulers of diffusers, driven in their own spaces with their usual settings; see `solvers.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
from solver_problems import Counted, Problem, network_in_their_space
from torch import Tensor

from latentgen.diffusion.parameterization import EDM, Denoiser, V, from_x0, per_example

SPACINGS = ("leading", "trailing", "linspace")
SIGMAS = ("karras", "exponential", "beta")
EDM_DATA = 0.5
"""sigma_data of the EDM schedulers: their default."""


def variants() -> dict[str, tuple[str, dict[str, Any]]]:
    """{label: (class, settings)} of every deterministic scheduler, in every spacing and with every choice of sigmas."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for label, (kind, settings, also) in METHODS.items():
        for spacing in SPACINGS if "spacing" in also else ("",):
            spaced = {"timestep_spacing": spacing, "steps_offset": 1} if spacing else {}
            found[" ".join(filter(None, (label, spacing)))] = (kind, {**settings, **spaced})
        if "sigmas" in also:
            spaced = {"timestep_spacing": "linspace", "steps_offset": 1} if "spacing" in also else {}
            for name in (*SIGMAS, *(["lu"] if "lu" in also else [])):
                key = "use_lu_lambdas" if name == "lu" else f"use_{name}_sigmas"
                found[f"{label} {name}"] = (kind, {**settings, **spaced, key: True})
    return found


def run(problem: Problem, label: str, budget: int, denoise: Denoiser) -> tuple[Tensor, float, float] | None:
    """(end, sigma of the end, network calls) with at most `budget` calls; None where that cannot be set up.

    The end [b, c, h, w] is in variance-exploding coordinates. Some schedulers stop at sigma_min, not at 0.
    """
    kind, settings = variants()[label]
    for n in range(budget, 0, -1):
        scheduler = _scheduler(kind, settings, problem, n)
        if scheduler is not None and len(scheduler.timesteps) <= budget:
            break
    else:
        return None
    counted = Counted(denoise, len(problem.noise(True)))
    noise = problem.noise(True)
    try:
        x, sigma = DRIVERS.get(kind, _drive_vp)(scheduler, problem, counted, noise)
    except (IndexError, ZeroDivisionError, ValueError, RuntimeError):  # several fail with very few steps
        return None
    return x, sigma, counted.calls


def _scheduler(kind: str, settings: Mapping[str, Any], problem: Problem, n: int) -> Any:
    p = problem.parameterization
    assert isinstance(p, V)
    common: dict[str, Any] = {
        "num_train_timesteps": p.table.num_timesteps,
        "beta_schedule": p.table.kind,
        "beta_start": p.table.beta_start,
        "beta_end": p.table.beta_end,
        "prediction_type": "v_prediction",
    }
    if kind.startswith("EDM"):
        common = {"sigma_min": p.sigma_min, "sigma_max": p.sigma_max, "sigma_data": EDM_DATA}
    if kind.startswith("Flow"):
        common = {}
    try:
        scheduler = getattr(diffusers, kind)(**common, **settings)
        if kind.startswith("Flow"):  # evenly spaced times, from the one that is sigma_max on
            last = p.sigma_max / (1 + p.sigma_max)
            scheduler.set_timesteps(sigmas=[last * (1 - i / n) for i in range(n)])
        else:
            scheduler.set_timesteps(n)
    except (IndexError, ZeroDivisionError, ValueError, RuntimeError, AssertionError):
        return None
    return scheduler


def _drive_vp(scheduler: Any, problem: Problem, denoise: Denoiser, noise: Tensor) -> tuple[Tensor, float]:
    """As StableDiffusionPipeline does. Its latents are x / sqrt(1 + sigma^2), or x itself in schedulers of k-diffusion,
    which is where `init_noise_sigma` differs from 1."""
    p = problem.parameterization
    assert isinstance(p, V)
    network = network_in_their_space(denoise, p)
    exploding = float(scheduler.init_noise_sigma) != 1
    x = noise * math.sqrt(1 + float(scheduler.sigmas[0]) ** 2) if exploding else noise
    for t in scheduler.timesteps:
        prediction = network(scheduler.scale_model_input(x, t), t.reshape(1)).to(x.dtype)
        x = scheduler.step(prediction, t, x, return_dict=False)[0].to(noise.dtype)
    sigma = float(scheduler.sigmas[-1]) if hasattr(scheduler, "sigmas") else 0.0
    return (x if exploding else x * math.sqrt(1 + sigma**2)), sigma


def _drive_edm(scheduler: Any, problem: Problem, denoise: Denoiser, noise: Tensor) -> tuple[Tensor, float]:
    edm = EDM(sigma_data=EDM_DATA)
    x = noise * math.sqrt(1 + float(scheduler.sigmas[0]) ** 2)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        sigma = torch.exp(4 * t.double()).expand(len(x)).to(x.dtype)  # t is c_noise
        given = scaled * per_example((sigma**2 + EDM_DATA**2).sqrt(), x)
        prediction = from_x0(edm, denoise(given, sigma), given, sigma)
        x = scheduler.step(prediction, t, x, return_dict=False)[0].to(noise.dtype)
    return x, float(scheduler.sigmas[-1])


def _drive_flow(scheduler: Any, problem: Problem, denoise: Denoiser, noise: Tensor) -> tuple[Tensor, float]:
    first = float(scheduler.sigmas[0])  # they call the flow's time sigma
    x_t = noise * math.sqrt(1 + problem.parameterization.sigma_max**2) * (1 - first)
    for t in scheduler.timesteps:
        time = float(t) / scheduler.config.num_train_timesteps
        x = x_t / (1 - time)
        sigma = torch.full((len(x),), time / (1 - time), dtype=x.dtype)
        x0 = denoise(x, sigma)
        velocity = (x - x0) / per_example(sigma, x) - x0
        x_t = scheduler.step(velocity, t, x_t, return_dict=False)[0].to(noise.dtype)
    return x_t, 0.0


DRIVERS: Mapping[str, Callable[[Any, Problem, Denoiser, Tensor], tuple[Tensor, float]]] = {
    "EDMEulerScheduler": _drive_edm,
    "EDMDPMSolverMultistepScheduler": _drive_edm,
    "FlowMatchEulerDiscreteScheduler": _drive_flow,
}

BOTH = ("spacing", "sigmas")
METHODS: Mapping[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}, ("spacing",)),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}, ("spacing",)),
    "Euler": ("EulerDiscreteScheduler", {}, BOTH),
    "Heun": ("HeunDiscreteScheduler", {}, BOTH),
    "KDPM2": ("KDPM2DiscreteScheduler", {}, BOTH),
    "LMS": ("LMSDiscreteScheduler", {}, BOTH),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}, (*BOTH, "lu")),
    "DPM++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}, (*BOTH, "lu")),
    "DPM++ 2S": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}, ("sigmas",)),
    "DPM++ 3S": ("DPMSolverSinglestepScheduler", {"solver_order": 3, "lower_order_final": True}, ("sigmas",)),
    "DEIS": ("DEISMultistepScheduler", {}, BOTH),
    "UniPC": ("UniPCMultistepScheduler", {}, BOTH),
    "UniPC 3": ("UniPCMultistepScheduler", {"solver_order": 3}, BOTH),
    "SA-Solver": ("SASolverScheduler", {"tau_func": lambda t: 0.0}, BOTH),
    "EDM Euler": ("EDMEulerScheduler", {}, ()),
    "EDM DPM++ 2M": ("EDMDPMSolverMultistepScheduler", {}, ()),
    "EDM DPM++ 3M": ("EDMDPMSolverMultistepScheduler", {"solver_order": 3}, ()),
    "FlowMatch Euler": ("FlowMatchEulerDiscreteScheduler", {}, ()),
}
"""{label: (class, settings, which choices it offers)}. Left out: those that add noise; IPNDMScheduler, FlowMatchHeun
and `use_flow_sigmas`, which begin at another noise level than these problems (infinity, or 999)."""
