"""The discrete noise tables of variance-preserving processes, Stable Diffusion's among them.

A table gives the noise added at each of T integer times:

    q(x_t | x_{t-1}) = Normal(sqrt(1 - beta_t) * x_{t-1}, beta_t)                              arXiv 2006.11239, eq. 2
    alpha_bar_t = (1 - beta_1) ... (1 - beta_t),    sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.diffusion import lookup

MAX_BETA = 0.999
"""Largest beta of the tables that are defined through alpha_bar and would end in 1 (arXiv 2102.09672, section 3.2)."""
TRAINED = "trained"
"""The kind of a table that is a list of betas and no formula."""


def linear_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Betas on a straight line (arXiv 2006.11239, section 4). [T], float64."""
    return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)


def scaled_linear_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Square roots of the betas on a straight line: the table of Stable Diffusion's code. [T], float64."""
    return torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2


def sigmoid_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Betas on a sigmoid from -6 to 6 (arXiv 2203.02923; "sigmoid" of diffusers' DDPMScheduler). [T], float64."""
    ramp = torch.linspace(-6, 6, num_timesteps, dtype=torch.float64)
    return beta_start + (beta_end - beta_start) * torch.sigmoid(ramp)


def cosine_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Cosine alpha-bar with betas capped at 0.999 (arXiv 2102.09672, eq. 17); beta_start and beta_end play no part."""
    del beta_start, beta_end
    time = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64)
    return _betas_of(torch.cos((time + 0.008) / 1.008 * (math.pi / 2)) ** 2)


def sigmoid_alpha_bar_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Alpha-bar on a sigmoid from -3 to 3, temperature 1 (arXiv 2212.11972); it has no other knobs."""
    del beta_start, beta_end
    time = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64)
    first, last = (1 / (1 + math.exp(-at)) for at in (-3, 3))
    return _betas_of((last - torch.sigmoid(6 * time - 3)) / (last - first))


def _betas_of(alpha_bar: Tensor) -> Tensor:
    """The betas of T + 1 values of alpha-bar, which begin at 1. [T + 1] -> [T]."""
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=MAX_BETA)


@dataclass(frozen=True)
class NoiseTable:
    """The noise level at each of `num_timesteps` integer times of a variance-preserving process.

    Holds its recipe only, so it can be compared, hashed and written down; the numbers are computed once and kept.
    Between integer times log(sigma) is interpolated linearly; outside [0, T-1] both directions clamp.

    Args:
        kind: a name of BETAS, or "trained" for `trained_betas`.
        num_timesteps: T, at least 2.
        beta_start, beta_end: first and last beta, where the kind asks for them.
        zero_terminal_snr: rescale so that the last time is pure noise (arXiv 2305.08891, algorithm 1). alpha_bar ends
            at 2^-24, not 0, so that the last sigma is finite (4096). Meaningless for eps prediction.
        trained_betas: the T betas themselves, for kind "trained".

    Raises:
        UserError: an unknown kind, or numbers that describe no process.
    """

    kind: str = "scaled_linear"
    num_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    zero_terminal_snr: bool = False
    trained_betas: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.num_timesteps < 2:
            raise UserError(f"num_timesteps is {self.num_timesteps}: a noise table needs at least 2.")
        if (self.kind == TRAINED) != (self.trained_betas is not None):
            raise UserError('trained_betas: give them with the noise table of kind "trained", and with no other.')
        if self.trained_betas is not None:
            object.__setattr__(self, "trained_betas", tuple(self.trained_betas))  # a JSON file holds a list
            if len(self.trained_betas) != self.num_timesteps or not all(0 < beta < 1 for beta in self.trained_betas):
                raise UserError(f"trained_betas: give {self.num_timesteps} numbers between 0 and 1, one for each time.")
            return
        lookup(BETAS, self.kind, "noise table")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError(f"betas from {self.beta_start} to {self.beta_end}: choose 0 < beta_start <= beta_end < 1.")

    @property
    def alpha_bar(self) -> Tensor:
        """Cumulative product of 1 - beta. [T], float64, descending."""
        if self.trained_betas is not None:
            betas = torch.tensor(self.trained_betas, dtype=torch.float64)
        else:
            betas = lookup(BETAS, self.kind, "noise table")(self.num_timesteps, self.beta_start, self.beta_end)
        alpha_bar = torch.cumprod(1 - betas, dim=0)
        if not self.zero_terminal_snr:
            return alpha_bar
        root = alpha_bar.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])  # arXiv 2305.08891, algorithm 1
        last, before = root.new_tensor([2.0**-24]), root[-2:-1] ** 2
        return torch.cat(
            [root[:-1] ** 2, torch.where(before > last, last, before / 2)]
        )  # fine tables fall below sooner

    @property
    def betas(self) -> Tensor:
        """Noise added at each time, after any rescaling: q(x_t | x_{t-1}) has variance beta_t. [T], float64."""
        alpha_bar = self.alpha_bar
        return 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])

    @property
    def sigmas(self) -> Tensor:
        """Noise levels at the integer times. [T], float64, ascending."""
        return _log_sigmas(self, torch.float64, torch.device("cpu")).exp()

    def sigma_of_t(self, t: Tensor) -> Tensor:
        """Noise level at (possibly fractional) time t in [0, T-1], clamped. Shaped like t, at least float32."""
        t = t.to(at_least_float32(t.dtype)).clamp(0, self.num_timesteps - 1)
        log_sigmas = _log_sigmas(self, t.dtype, t.device)
        low = t.floor().clamp(max=self.num_timesteps - 2).long()
        return torch.lerp(log_sigmas[low], log_sigmas[low + 1], t - low).exp()

    def t_of_sigma(self, sigma: Tensor) -> Tensor:
        """Time in [0, T-1] whose noise level is sigma, clamped: the inverse of `sigma_of_t`. Shaped like sigma."""
        sigma = sigma.to(at_least_float32(sigma.dtype))
        log_sigmas = _log_sigmas(self, sigma.dtype, sigma.device)
        log_sigma = sigma.log().clamp(log_sigmas[0], log_sigmas[-1])
        low = (torch.searchsorted(log_sigmas, log_sigma.contiguous(), right=True) - 1).clamp(0, self.num_timesteps - 2)
        return low + (log_sigma - log_sigmas[low]) / (log_sigmas[low + 1] - log_sigmas[low])


@lru_cache(maxsize=32)
def _log_sigmas(table: NoiseTable, dtype: torch.dtype, device: torch.device) -> Tensor:
    """log(sigma) at the integer times. Kept per device, so that a step copies nothing to an accelerator."""
    with torch.inference_mode(False):  # a table first used while sampling must also serve training
        alpha_bar = table.alpha_bar
        return (0.5 * torch.log((1 - alpha_bar) / alpha_bar)).to(dtype=dtype).to(device=device)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Noise levels never live in half precision: bfloat16 cannot tell time 990 from 991."""
    return torch.promote_types(dtype, torch.float32)


BETAS: Mapping[str, Callable[[int, float, float], Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "cosine": cosine_betas,
    "squaredcos_cap_v2": cosine_betas,
    "sigmoid": sigmoid_betas,
    "sigmoid_alpha_bar": sigmoid_alpha_bar_betas,
}
