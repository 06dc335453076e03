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
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.diffusion import lookup
from latentgen.diffusion.noise_tables import NoiseTable, at_least_float32

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

    def fraction_of_sigma(self, sigma: Tensor) -> Tensor:
        """The inverse of `sigma_of_fraction`, clamped to [0, 1]. Shaped like sigma."""
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

    def fraction_of_sigma(self, sigma: Tensor) -> Tensor:
        return self.table.t_of_sigma(sigma) / (self.table.num_timesteps - 1)


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
    """The network predicts noise - x0 along the straight path (arXiv 2403.03206, eq. 13).

    arXiv 2209.03003, eq. 1, has time the other way round, and so the other sign.

    Pure noise, t = 1, is sigma = infinity. Sampling starts at the finite t_max instead, where the signal left in x_t is
    1 - t_max of its size. Nothing is lost to rounding there: the network sees x / (1 + sigma), of order one, and every
    sampler step scales x, so errors stay relative. t_max may be as near 1 as 1 - 1e-6 when it must match a tool that
    starts at t = 1 exactly.

    `shift` moves the levels that training visits towards noise (arXiv 2403.03206, eq. 23): t' = s t / (1 + (s - 1) t),
    which is sigma' = s * sigma. The network's time is the shifted one, so the shift may change after training.
    """

    t_min: float = 0.001
    t_max: float = 0.999
    shift: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.t_min < self.t_max < 1:
            raise UserError(f"flow times from {self.t_min} to {self.t_max}: choose 0 < t_min < t_max < 1.")
        if not 0 < self.shift < math.inf:
            raise UserError(f"shift of the flow is {self.shift}: it must be above 0 (1 is no shift).")

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
        t = self.shift * u / (1 + (self.shift - 1) * u)
        t = t.clamp(self.t_min, self.t_max)
        return t / (1 - t)

    def fraction_of_sigma(self, sigma: Tensor) -> Tensor:
        return sigma / (self.shift + sigma)


@dataclass(frozen=True)
class EDM:
    """The preconditioning of arXiv 2206.00364, table 1, right column.

    sigma_data is the standard deviation of the data: 1 for this project's white latents, 0.5 in the paper for pixels.
    Its own time is the paper's rho = 7 spacing between sigma_min and sigma_max (eq. 5).

    `augmented_dim` is the D of PFGM++ (arXiv 2302.04265): the noise has the heavier tails of `noise.student_scale`, and
    all else stays. None is D = infinity, plain EDM.
    """

    sigma_data: float = 1.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    augmented_dim: float | None = None

    def __post_init__(self) -> None:
        if not (self.sigma_data > 0 and 0 < self.sigma_min < self.sigma_max < math.inf):
            raise UserError(f"{self}: choose sigma_data > 0 and 0 < sigma_min < sigma_max.")
        if self.augmented_dim is not None and not 0 < self.augmented_dim < math.inf:
            raise UserError(f"augmented_dim is {self.augmented_dim}: it must be above 0; leave it out for infinity.")

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

    def fraction_of_sigma(self, sigma: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / 7), self.sigma_max ** (1 / 7)
        return ((sigma ** (1 / 7) - low) / (high - low)).clamp(0, 1)


@dataclass(frozen=True)
class VE:
    """Variance exploding: the network sees x itself and predicts sigma * score = -noise (arXiv 2206.00364, table 1).

    The process of arXiv 2011.13456: its own time is log(sigma), from sigma_min to sigma_max. The input grows as large
    as sigma_max; networks that do not expect that are better served by EDM, which differs in its scalings only.
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise UserError(f"{self}: choose 0 < sigma_min < sigma_max.")

    def scalings(self, sigma: Tensor) -> Scalings:
        one = torch.ones_like(sigma)
        return Scalings(one, sigma, one, (sigma / 2).log())

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        del x0, sigma
        return -noise

    def sigma_of_fraction(self, u: Tensor) -> Tensor:
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return (low + u * (high - low)).exp()

    def fraction_of_sigma(self, sigma: Tensor) -> Tensor:
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return ((sigma.log() - low) / (high - low)).clamp(0, 1)


# --- from a prediction to x0 and back ---------------------------------------------------------------------------------


def per_example(values: Tensor, x: Tensor) -> Tensor:
    """values [b] reshaped to [b, 1, 1, 1] (as many ones as x [b, ...] needs) to multiply x."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def to_x0(parameterization: Parameterization, prediction: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The clean image that a network output stands for: c_skip * x + c_out * prediction. [b, c, h, w]."""
    c = parameterization.scalings(sigma.to(at_least_float32(x.dtype)))
    return (per_example(c.c_skip, x) * x + per_example(c.c_out, x) * prediction).to(x.dtype)


def from_x0(parameterization: Parameterization, x0: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The network output that stands for a clean image; the inverse of `to_x0`, for sigma > 0. [b, c, h, w]."""
    sigma = sigma.to(at_least_float32(x.dtype))
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
        c = parameterization.scalings(sigma.to(at_least_float32(x.dtype)))
        prediction = network((per_example(c.c_in, x) * x).to(x.dtype), c.c_noise)
        return (per_example(c.c_skip, x) * x + per_example(c.c_out, x) * prediction).to(x.dtype)

    return denoise


def make(target: str, table: NoiseTable | None = None, **knobs: float | None) -> Parameterization:
    """The parameterization a user named: eps | v | x0 | flow | edm | ve.

    `table` serves eps, v and x0 (default: Stable Diffusion's), the knobs are the fields of flow, edm and ve. Raises
    UserError for an unknown name or knob, and for eps on a zero-terminal-SNR table, where the noise says nothing about
    the image.
    """
    build = lookup(PARAMETERIZATIONS, target, "prediction target")
    if build is Eps and table is not None and table.zero_terminal_snr:
        raise UserError("eps prediction cannot use a zero-terminal-SNR table: choose target v or x0.")
    try:
        return build(table or NoiseTable(), **knobs) if build in (Eps, V, X0) else build(**knobs)
    except TypeError as error:
        raise UserError(f"target {target} has other knobs than {', '.join(knobs)}: {error}") from error


PARAMETERIZATIONS: Mapping[str, Callable[..., Parameterization]] = {
    "eps": Eps,
    "v": V,
    "x0": X0,
    "flow": Flow,
    "edm": EDM,
    "ve": VE,
}
