"""Samplers: from noise to an image, one page per algorithm.

    sampler(denoise, x, sigmas, *, noise=None, on_step=None, **knobs) -> x

denoise(x [b, c, h, w], sigma [b]) -> x0_hat. sigmas [n + 1] descends and normally ends in 0; it may begin anywhere
(img2img), and a deterministic sampler takes it ascending from above 0 (inversion). It is read once, so keep it on the
CPU. noise(sigma, sigma_next) -> standard normal like x, called only where an algorithm adds noise; `brownian.py` makes
one. on_step(i, x, x0_hat) is called after step i with the new x and the estimate that step started from.

Pure functions: no progress bar, no `no_grad`, no state, and x is never changed in place. They compute in the dtype of x
(float32 is the sensible one, whatever the network uses) and take coefficients in double precision.

The process is dx/dsigma = (x - x0_hat) / sigma (arXiv 2206.00364, eq. 1 and 3). eps, v and flow models are the same
process in these coordinates, so every sampler is right for all of them, those that add noise included.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.diffusion import lookup
from latentgen.diffusion.knobs import read, settable, split, written
from latentgen.diffusion.parameterization import Denoiser
from latentgen.diffusion.samplers.adaptive import dpm_adaptive
from latentgen.diffusion.samplers.common import NoiseSource, OnStep, Sampler
from latentgen.diffusion.samplers.dpmpp import dpmpp_2m, dpmpp_2m_sde, dpmpp_2s_ancestral, dpmpp_3m_sde, dpmpp_sde
from latentgen.diffusion.samplers.linear import deis, ipndm, lms, plms
from latentgen.diffusion.samplers.parallel import parallel
from latentgen.diffusion.samplers.single import ddim, ddpm, dpm2, dpm2_ancestral, euler, euler_ancestral, heun, lcm
from latentgen.diffusion.samplers.stochastic import er_sde, restart
from latentgen.diffusion.samplers.unipc import unipc
from latentgen.diffusion.schedules import SCHEDULE_ALIASES, SCHEDULES

__all__ = ["ALIASES", "SAMPLERS", "Method", "NoiseSource", "OnStep", "Sampler", "canonical", "find_sampler", "resolve"]


@dataclass(frozen=True)
class Method:
    """A sampler and what is known about it; called like the function it holds.

    order        order of convergence between 30 and 120 steps from sigma 14.6 to 0.1, as the contract tests measure it:
                 of the solution without noise (eta = 0), of the variance where no knob turns the noise off. Multistep
                 samplers begin with a step of Euler's, so with ever more steps order 2 remains of a higher one. 0 for
                 one that does not converge to the model's distribution unless the network is of a special kind (lcm).
    noise        whether it needs `noise` with its knobs
    noise_knob   the knob that turns noise on above 0 and off at 0, where there is one
    calls        network calls a step; None where only a run can tell
    calls_to_0   network calls of a step to 0
    first_extra  further calls in the first step, unless that goes to 0
    own_steps    whether it chooses its steps itself, and of the levels takes the ends alone
    knobs        those a user set; what a call passes goes before them
    """

    run: Sampler
    order: int
    noise: bool = False
    noise_knob: str | None = None
    calls: int | None = 1
    calls_to_0: int = 1
    first_extra: int = 0
    own_steps: bool = False
    knobs: tuple[tuple[str, Any], ...] = ()

    def __call__(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, **knobs: Any) -> Tensor:
        return self.run(denoise, x, sigmas, **{**dict(self.knobs), **knobs})

    def network_calls(self, sigmas: Tensor) -> int | None:
        """Network calls of a whole run; None where only a run can tell."""
        n = len(sigmas) - 1
        if self.calls is None or n < 1:
            return self.calls and 0
        to_0 = bool(sigmas[-1] == 0)
        extra = 0 if to_0 and n == 1 else self.first_extra
        return self.calls * (n - to_0) + self.calls_to_0 * to_0 + extra


def resolve(sampler: str, schedule: str | None = None) -> tuple[str, str | None]:
    """The registered names of a sampler and, if any was asked for, of a schedule.

    A sampler may be named as in other tools, and the name may say the schedule too: "DPM++ 2M Karras", "k_euler_a",
    "sample_dpmpp_2m_sde", "EulerDiscreteScheduler". Knobs after the names are not looked at. Raises UserError for
    unknown names, with the nearest valid one, and where the sampler's name and `schedule` ask for different schedules.
    """
    if schedule is not None:
        schedule, _ = split(schedule)
        lookup(SCHEDULES, schedule, "schedule", SCHEDULE_ALIASES)
        key = schedule.lower()
        schedule = SCHEDULE_ALIASES.get(key, key)
    name, implied = _named(split(sampler)[0])
    if implied is not None and schedule is not None and implied != schedule:
        raise UserError(f"--sampler {sampler!r} means the schedule {implied!r}: leave out --schedule {schedule}.")
    return name, implied or schedule


@lru_cache(maxsize=128)
def find_sampler(text: str) -> Method:
    """The sampler a user asked for as NAME[,key=value]...: its name here or as other tools call it, and its knobs.

    "ddim,eta=0.5" and "DPM++ 2M SDE Karras,s_noise=1.003" are such. Raises UserError for unknown names and knobs, and
    for values that the sampler refuses.
    """
    _, pairs = split(text)
    method = SAMPLERS[resolve(text)[0]]
    if not pairs:
        return method
    knobs = read(pairs, f"--sampler {text}", resolve(text)[0], settable(method.run))
    noise = method.noise if method.noise_knob is None else knobs.get(method.noise_knob, method.noise) > 0
    method = dataclasses.replace(method, noise=noise, knobs=tuple(knobs.items()))
    # Samplers check their knobs when they begin: let it take a few steps with nothing to draw.
    trial = torch.ones(1, 1, 1, 1)
    try:
        levels = torch.tensor([3.0, 1.0, 0.1])
        out = method(lambda x, sigma: torch.zeros_like(x), trial, levels, noise=lambda sigma, sigma_next: trial)
    except UserError as error:
        raise UserError(f"--sampler {text}: {error}") from None
    if not out.isfinite().all():
        raise UserError(f"--sampler {text}: nothing finite comes of it; choose smaller numbers")
    return method


def canonical(text: str) -> str:
    """The one way to write what `find_sampler` reads: the registered name, and the knobs that are not at default."""
    method = find_sampler(text)
    return written(resolve(text)[0], method.knobs, settable(method.run))


def _named(sampler: str) -> tuple[str, str | None]:
    """The sampler and schedule that a name stands for; see `ALIASES` for the spelling rules."""
    key = re.sub(r"[\s_-]+", "_", str(sampler).strip().lower().replace("++", "pp"))
    key = key.removeprefix("sample_").removeprefix("k_")
    if key in SAMPLERS:
        return key, None
    if key in ALIASES:
        return ALIASES[key]
    for schedule in SCHEDULES:
        if key.endswith(f"_{schedule}"):
            name, implied = _named(key.removesuffix(f"_{schedule}"))
            if implied in (None, schedule):
                return name, schedule
    lookup(SAMPLERS, key, "sampler")
    raise AssertionError("lookup has refused the name")


SAMPLERS: Mapping[str, Method] = {
    "ddpm": Method(ddpm, order=1, noise=True),
    "ddim": Method(ddim, order=1, noise_knob="eta"),
    "plms": Method(plms, order=2, first_extra=1),
    "euler": Method(euler, order=1, noise_knob="s_churn"),
    "euler_ancestral": Method(euler_ancestral, order=1, noise=True, noise_knob="eta"),
    "heun": Method(heun, order=2, noise_knob="s_churn", calls=2),
    "dpm2": Method(dpm2, order=2, noise_knob="s_churn", calls=2),
    "dpm2_ancestral": Method(dpm2_ancestral, order=2, noise=True, noise_knob="eta", calls=2),
    "lms": Method(lms, order=3),
    "dpmpp_2s_ancestral": Method(dpmpp_2s_ancestral, order=2, noise=True, noise_knob="eta", calls=2),
    "dpmpp_2m": Method(dpmpp_2m, order=2),
    "dpmpp_sde": Method(dpmpp_sde, order=2, noise=True, noise_knob="eta", calls=2),
    "dpmpp_2m_sde": Method(dpmpp_2m_sde, order=2, noise=True, noise_knob="eta"),
    "dpmpp_3m_sde": Method(dpmpp_3m_sde, order=3, noise=True, noise_knob="eta"),
    "deis": Method(deis, order=2),
    "ipndm": Method(ipndm, order=2),
    "unipc": Method(unipc, order=3),
    "er_sde": Method(er_sde, order=3, noise=True),
    "restart": Method(restart, order=2, noise=True, noise_knob="restarts", calls=None),
    "lcm": Method(lcm, order=0, noise=True),
    "parallel": Method(parallel, order=1, calls=None),
    "dpm_adaptive": Method(dpm_adaptive, order=3, calls=None, own_steps=True),
}

ALIASES: Mapping[str, tuple[str, str | None]] = {
    # Names are compared in lower case, "++" as "pp", blanks and hyphens as "_", without a leading "sample_" or "k_"
    # (k-diffusion's functions), and any of them may end in the name of a schedule: "DPM++ 2M Karras", "euler_a_beta".
    # web interfaces and ComfyUI
    "euler_a": ("euler_ancestral", None),
    "dpm_2": ("dpm2", None),
    "dpm_2_ancestral": ("dpm2_ancestral", None),
    "dpm2_a": ("dpm2_ancestral", None),
    "dpm_2_a": ("dpm2_ancestral", None),
    "dpmpp_2s_a": ("dpmpp_2s_ancestral", None),
    "dpmpp2m": ("dpmpp_2m", None),
    "dpm_solverpp": ("dpmpp_2m", None),
    "dpmsolverpp": ("dpmpp_2m", None),
    "uni_pc": ("unipc", None),
    "ddpm_ancestral": ("ddpm", None),
    "pndm": ("plms", None),
    # diffusers' classes
    "ddpmscheduler": ("ddpm", None),
    "ddimscheduler": ("ddim", None),
    "pndmscheduler": ("plms", None),
    "eulerdiscretescheduler": ("euler", None),
    "eulerancestraldiscretescheduler": ("euler_ancestral", None),
    "heundiscretescheduler": ("heun", None),
    "kdpm2discretescheduler": ("dpm2", None),
    "kdpm2ancestraldiscretescheduler": ("dpm2_ancestral", None),
    "lmsdiscretescheduler": ("lms", None),
    "dpmsolvermultistepscheduler": ("dpmpp_2m", None),
    "dpmsolversdescheduler": ("dpmpp_sde", None),
    "deismultistepscheduler": ("deis", None),
    "ipndmscheduler": ("ipndm", None),
    "unipcmultistepscheduler": ("unipc", None),
    "lcmscheduler": ("lcm", None),
    "flowmatcheulerdiscretescheduler": ("euler", "flow"),
    "flowmatchheundiscretescheduler": ("heun", "flow"),
}
