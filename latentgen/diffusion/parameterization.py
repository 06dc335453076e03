"""What a network predicts, and how its prediction becomes an estimate of the clean image.

One space for all mathematics: `x = x0 + sigma * noise` (variance exploding). A network is used through four numbers

    x0_hat = c_skip * x + c_out * network(c_in * x, c_noise)                     arXiv 2206.00364, eq. 7

so a variance-preserving network (Stable Diffusion) and a flow network are changes of variable and nothing else:

    VP    x_vp = alpha * x0 + sigma_vp * noise = alpha * x,   alpha = 1 / sqrt(1 + sigma^2),   sigma_vp = sigma * alpha
    flow  x_t = (1 - t) * x0 + t * noise = (1 - t) * x,       t = sigma / (1 + sigma)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.diffusion import lookup

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""denoise(x: [b, c, h, w], sigma: [b]) -> x0_hat: [b, c, h, w], in variance-exploding coordinates."""

Network = Callable[[Tensor, Tensor], Tensor]
"""network(x_in: [b, c, h, w], c_noise: [b]) -> prediction: [b, c, h, w], conditioning already bound."""


class Scalings(NamedTuple):
    """The four numbers of arXiv 2206.00364, eq. 7, each shaped like sigma."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


# --- the discrete noise table of Stable Diffusion ---------------------------------------------------------------------


def linear_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Betas on a straight line (arXiv 2006.11239, section 4). [T], float64."""
    return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)


def scaled_linear_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Square roots of the betas on a straight line: the table of Stable Diffusion (arXiv 2112.10752). [T], float64."""
    return torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2


def cosine_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Cosine alpha-bar with betas capped at 0.999 (arXiv 2102.09672, eq. 17); beta_start and beta_end play no part."""
    del beta_start, beta_end
    time = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((time + 0.008) / 1.008 * (math.pi / 2)) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


@dataclass(frozen=True)
class NoiseTable:
    """The noise level at each of `num_timesteps` integer times of a variance-preserving process.

    Holds its recipe only, so it can be compared, hashed and written down; the numbers are computed once and kept.
    Between integer times log(sigma) is interpolated linearly; outside [0, T-1] both directions clamp.

    kind                linear | scaled_linear | cosine (also known as squaredcos_cap_v2)
    zero_terminal_snr   rescale so that the last time is pure noise (arXiv 2305.08891, algorithm 1). alpha_bar ends at
                        2^-24, not 0, so that the last sigma is finite (4096). Meaningless for eps prediction.
    """

    kind: str = "scaled_linear"
    num_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        lookup(BETAS, self.kind, "noise table")
        if self.num_timesteps < 2:
            raise UserError(f"num_timesteps is {self.num_timesteps}: a noise table needs at least 2.")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError(f"betas from {self.beta_start} to {self.beta_end}: choose 0 < beta_start <= beta_end < 1.")

    @property
    def alpha_bar(self) -> Tensor:
        """Cumulative product of 1 - beta. [T], float64, descending."""
        betas = lookup(BETAS, self.kind, "noise table")(self.num_timesteps, self.beta_start, self.beta_end)
        alpha_bar = torch.cumprod(1 - betas, dim=0)
        if not self.zero_terminal_snr:
            return alpha_bar
        root = alpha_bar.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])  # arXiv 2305.08891, algorithm 1
        return (root**2).clamp(min=2.0**-24)

    @property
    def sigmas(self) -> Tensor:
        """Noise levels at the integer times. [T], float64, ascending."""
        return _log_sigmas(self, torch.float64, torch.device("cpu")).exp()

    def sigma_of_t(self, t: Tensor) -> Tensor:
        """Noise level at (possibly fractional) time t in [0, T-1], clamped. Shaped like t, at least float32."""
        t = t.to(_at_least_float32(t.dtype)).clamp(0, self.num_timesteps - 1)
        log_sigmas = _log_sigmas(self, t.dtype, t.device)
        low = t.floor().clamp(max=self.num_timesteps - 2).long()
        return torch.lerp(log_sigmas[low], log_sigmas[low + 1], t - low).exp()

    def t_of_sigma(self, sigma: Tensor) -> Tensor:
        """Time in [0, T-1] whose noise level is sigma, clamped: the inverse of `sigma_of_t`. Shaped like sigma."""
        sigma = sigma.to(_at_least_float32(sigma.dtype))
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


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Noise levels never live in half precision: bfloat16 cannot tell time 990 from 991."""
    return torch.promote_types(dtype, torch.float32)


# --- the parameterizations --------------------------------------------------------------------------------------------


class Parameterization(Protocol):
    """What the network is trained to predict. sigma is [b] unless said otherwise."""

    @property
    def sigma_min(self) -> float:
        """Smallest noise level the network knows."""
        ...

    @property
    def sigma_max(self) -> float:
        """Largest noise level the network knows; sampling starts here."""
        ...

    def scalings(self, sigma: Tensor) -> Scalings:
        """c_skip, c_out, c_in, c_noise at sigma, each shaped like sigma."""
        ...

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """What the network should output: (x0 - c_skip * x) / c_out, written without cancellation. [b, c, h, w]."""
        ...

    def sigma_of_fraction(self, u: Tensor) -> Tensor:
        """Noise level at the fraction u in [0, 1] of this parameterization's own time, 0 being clean. Shaped like u."""
        ...


@dataclass(frozen=True)
class _VariancePreserving:
    """What Eps, V and X0 share: the range and the clock come from a discrete table."""

    table: NoiseTable = field(default_factory=NoiseTable)

    @property
    def sigma_min(self) -> float:
        return float(self.table.sigmas[0])

    @property
    def sigma_max(self) -> float:
        return float(self.table.sigmas[-1])

    def sigma_of_fraction(self, u: Tensor) -> Tensor:
        return self.table.sigma_of_t(u * (self.table.num_timesteps - 1))


@dataclass(frozen=True)
class Eps(_VariancePreserving):
    """The network predicts the noise (arXiv 2006.11239, eq. 14)."""

    def scalings(self, sigma: Tensor) -> Scalings:
        alpha = torch.rsqrt(1 + sigma**2)
        return Scalings(torch.ones_like(sigma), -sigma, alpha, self.table.t_of_sigma(sigma))

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        del x0, sigma
        return noise


@dataclass(frozen=True)
class V(_VariancePreserving):
    """The network predicts v = alpha * noise - sigma_vp * x0 (arXiv 2202.00512, section 4 and appendix D)."""

    def scalings(self, sigma: Tensor) -> Scalings:
        alpha = torch.rsqrt(1 + sigma**2)
        # x0 = alpha * x_vp - sigma_vp * v, and x_vp = alpha * x
        return Scalings(alpha**2, -sigma * alpha, alpha, self.table.t_of_sigma(sigma))

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        sigma = per_example(sigma, x0)
        return (noise - sigma * x0) * torch.rsqrt(1 + sigma**2)


@dataclass(frozen=True)
class X0(_VariancePreserving):
    """The network predicts the clean image itself."""

    def scalings(self, sigma: Tensor) -> Scalings:
        alpha = torch.rsqrt(1 + sigma**2)
        return Scalings(torch.zeros_like(sigma), torch.ones_like(sigma), alpha, self.table.t_of_sigma(sigma))

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        del noise, sigma
        return x0


@dataclass(frozen=True)
class Flow:
    """The network predicts noise - x0 along the straight path (arXiv 2209.03003, eq. 1; arXiv 2403.03206, eq. 13).

    Pure noise, t = 1, is sigma = infinity. Sampling starts at the finite t_max instead, where the signal left in x_t is
    1 - t_max of its size. Nothing is lost to rounding there: the network sees x / (1 + sigma), of order one, and every
    sampler step scales x, so errors stay relative. t_max may be as near 1 as 1 - 1e-6 when it must match a tool that
    starts at t = 1 exactly.
    """

    t_min: float = 0.001
    t_max: float = 0.999

    def __post_init__(self) -> None:
        if not 0 < self.t_min < self.t_max < 1:
            raise UserError(f"flow times from {self.t_min} to {self.t_max}: choose 0 < t_min < t_max < 1.")

    @property
    def sigma_min(self) -> float:
        return self.t_min / (1 - self.t_min)

    @property
    def sigma_max(self) -> float:
        return self.t_max / (1 - self.t_max)

    def scalings(self, sigma: Tensor) -> Scalings:
        t = sigma / (1 + sigma)
        one_minus_t = 1 / (1 + sigma)
        # x0 = x_t - t * v, and x_t = (1 - t) * x
        return Scalings(one_minus_t, -t, one_minus_t, 1000 * t)

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        del sigma
        return noise - x0

    def sigma_of_fraction(self, u: Tensor) -> Tensor:
        t = u.clamp(self.t_min, self.t_max)
        return t / (1 - t)


@dataclass(frozen=True)
class EDM:
    """The preconditioning of arXiv 2206.00364, table 1, right column.

    sigma_data is the standard deviation of the data: 1 for this project's white latents, 0.5 in the paper for pixels.
    Its own time is the paper's rho = 7 spacing between sigma_min and sigma_max (eq. 5).
    """

    sigma_data: float = 1.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if not (self.sigma_data > 0 and 0 < self.sigma_min < self.sigma_max < math.inf):
            raise UserError(f"{self}: choose sigma_data > 0 and 0 < sigma_min < sigma_max.")

    def scalings(self, sigma: Tensor) -> Scalings:
        total = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / total
        c_out = sigma * self.sigma_data * torch.rsqrt(total)
        return Scalings(c_skip, c_out, torch.rsqrt(total), sigma.log() / 4)

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        sigma = per_example(sigma, x0)
        scale = torch.rsqrt(sigma**2 + self.sigma_data**2) / self.sigma_data
        return (sigma * x0 - self.sigma_data**2 * noise) * scale

    def sigma_of_fraction(self, u: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / 7), self.sigma_max ** (1 / 7)
        return (low + u * (high - low)) ** 7


# --- from a prediction to x0 and back ---------------------------------------------------------------------------------


def per_example(values: Tensor, x: Tensor) -> Tensor:
    """values [b] reshaped to [b, 1, 1, 1] (as many ones as x [b, ...] needs) to multiply x."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def to_x0(parameterization: Parameterization, prediction: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The clean image that a network output stands for: c_skip * x + c_out * prediction. [b, c, h, w]."""
    c = parameterization.scalings(sigma.to(_at_least_float32(x.dtype)))
    return (per_example(c.c_skip, x) * x + per_example(c.c_out, x) * prediction).to(x.dtype)


def from_x0(parameterization: Parameterization, x0: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The network output that stands for a clean image; the inverse of `to_x0`, for sigma > 0. [b, c, h, w]."""
    sigma = sigma.to(_at_least_float32(x.dtype))
    noise = (x - x0) / per_example(sigma, x)
    return parameterization.target(x0, noise, sigma).to(x.dtype)


def convert(prediction: Tensor, x: Tensor, sigma: Tensor, source: Parameterization, to: Parameterization) -> Tensor:
    """A `source` network's output as a `to` network would have given it for the same x, sigma > 0. [b, c, h, w]."""
    return from_x0(to, to_x0(source, prediction, x, sigma), x, sigma)


def denoiser(parameterization: Parameterization, network: Network) -> Denoiser:
    """Turn a network into denoise(x, sigma) -> x0_hat (arXiv 2206.00364, eq. 7).

    The network gets c_in * x in the dtype of x, and c_noise in float32 or wider. The result has the dtype of x.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        c = parameterization.scalings(sigma.to(_at_least_float32(x.dtype)))
        prediction = network((per_example(c.c_in, x) * x).to(x.dtype), c.c_noise)
        return (per_example(c.c_skip, x) * x + per_example(c.c_out, x) * prediction).to(x.dtype)

    return denoise


def make(target: str, table: NoiseTable | None = None, sigma_data: float = 1.0) -> Parameterization:
    """The parameterization a user named: eps | v | x0 | flow | edm.

    `table` serves eps, v and x0 (default: Stable Diffusion's), `sigma_data` serves edm. Raises UserError for an unknown
    name, and for eps on a zero-terminal-SNR table, where the noise says nothing about the image.
    """
    build = lookup(PARAMETERIZATIONS, target, "prediction target")
    if build is Eps and table is not None and table.zero_terminal_snr:
        raise UserError("eps prediction cannot use a zero-terminal-SNR table: choose target v or x0.")
    if build is EDM:
        return EDM(sigma_data=sigma_data)
    if build is Flow:
        return Flow()
    return build(table or NoiseTable())


BETAS: Mapping[str, Callable[[int, float, float], Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "cosine": cosine_betas,
    "squaredcos_cap_v2": cosine_betas,
}

PARAMETERIZATIONS: Mapping[str, Callable[..., Parameterization]] = {
    "eps": Eps,
    "v": V,
    "x0": X0,
    "flow": Flow,
    "edm": EDM,
}
