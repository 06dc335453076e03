"""Schedulers of diffusers and our samplers on one network, and the paths they take. Loaded by the tests of this folder.

The network is a fixed function, so every difference is the sampler's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from latentgen.diffusion.parameterization import Eps, Parameterization, V, denoiser
from latentgen.diffusion.samplers import SAMPLERS

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PREDICTION = {"epsilon": Eps(), "v_prediction": V()}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


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


def their_path(
    scheduler: Any, x: torch.Tensor, times: torch.Tensor | None = None, net: Any = network, **step: Any
) -> list[torch.Tensor]:
    """x after every call of the scheduler's step."""
    path = []
    for i, t in enumerate(scheduler.timesteps):
        seen = t if times is None else times[i]
        output = net(scheduler.scale_model_input(x, t), seen.reshape(1).expand(len(x)))
        x = scheduler.step(output, t, x, **step).prev_sample
        path.append(x)
    return path


def our_path(
    name: str, p: Parameterization, sigmas: torch.Tensor, x: torch.Tensor, vp: bool, **knobs: Any
) -> list[torch.Tensor]:
    """x after every step; with `vp`, as x / sqrt(1 + sigma^2), which the schedulers hold that descend from DDPM."""
    path: list[torch.Tensor] = []

    def on_step(i: int, x: torch.Tensor, x0_hat: torch.Tensor) -> None:
        path.append(x / math.sqrt(1 + sigmas[i + 1].item() ** 2) if vp else x)

    SAMPLERS[name](denoiser(p, network), x, sigmas, on_step=on_step, **knobs)
    return path


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs)
    for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(one, other, **TOLERANCE, msg=lambda text, i=i: f"after step {i}: {text}")


def drawn(seed: int = 5) -> Any:
    """Noise as diffusers draws it from a generator with this seed, one draw a call."""
    generator = torch.Generator().manual_seed(seed)
    return lambda sigma, sigma_next: torch.randn(2, 4, 8, 8, generator=generator)


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
