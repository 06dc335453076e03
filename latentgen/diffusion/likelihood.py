"""How likely the model finds a picture: the change of variables along the probability-flow ODE.

In variance-exploding coordinates and u = log(sigma) the flow (arXiv 2206.00364, eq. 1 and 3) and what it does to a
density (arXiv 2011.13456, eq. 39) are

    dx/du = x - x0_hat(x, sigma)
    log p(x at sigma_min) = log p(x at sigma_max) + integral over u of  d - trace(d x0_hat / dx),   d = c * h * w

and at sigma_max the density is a Gaussian. What is measured is therefore the density of data blurred with sigma_min.
x is what the network denoises. For a latent model that is the latents: the result is a likelihood of latents, not of
pixels, and says nothing of what the autoencoder loses. Use the denoiser without guidance: a guided one follows the
flow of no density that anything was trained on.

The integration is the classical Runge-Kutta method on a fixed grid in log(sigma), done once more with half the steps:
what the two differ by is used to correct the result, and said with it, as a careful estimate of what is still wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.diffusion import lookup
from latentgen.diffusion.parameterization import Denoiser


class Likelihood(NamedTuple):
    """What `log_likelihood` found for each picture; all [b] but the last, in float64.

    nats: log density of x, natural logarithm, of all its values together.
    bits_per_dim: -nats / (d log 2) + log2(values_per_unit).
    step_error: error of `nats` from the finite number of steps, estimated before the correction that it allows.
    probe_error: standard error of `nats` from the random probes; nan with a single probe, 0 when exact.
    noise: where x arrives at sigma_max [b, c, h, w], in the dtype of x. The model draws x from it.
    """

    nats: Tensor
    bits_per_dim: Tensor
    step_error: Tensor
    probe_error: Tensor
    noise: Tensor


def rademacher(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Signs +1 or -1 with equal chance: of all probes the ones of least variance (Hutchinson 1989)."""
    return torch.randint(0, 2, tuple(shape), generator=generator).to(torch.float32) * 2 - 1


def gaussian(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal."""
    return torch.randn(tuple(shape), generator=generator)


def draw_probes(kind: str, shape: Sequence[int], generators: Sequence[torch.Generator], count: int = 1) -> Tensor:
    """Random directions for `log_likelihood`: [count, b, c, h, w] for pictures of `shape` (c, h, w), float32.

    Each of the b generators serves one picture, so that the estimate does not depend on the batch. Raises UserError
    for an unknown kind (rademacher or gaussian) and for a count below 1.
    """
    draw = lookup(PROBES, kind, "kind of probe")
    if count < 1:
        raise UserError(f"probes {count}: at least 1 is needed for each picture.")
    return torch.stack([draw((count, *shape), generator) for generator in generators], dim=1)


def log_likelihood(
    denoise: Denoiser,
    x: Tensor,
    *,
    sigma_min: float,
    sigma_max: float,
    steps: int = 64,
    probes: Tensor | None = None,
    sigma_data: float = 1.0,
    values_per_unit: float = 1.0,
) -> Likelihood:
    """Log density of pictures (or latents) under the model's probability flow.

    Args:
        denoise: without guidance, differentiable in x; the examples of a batch must not influence one another.
        x: [b, c, h, w] at noise level sigma_min. Clean data is taken to be that, as usual where sigma_min is small.
        sigma_min, sigma_max: the range of the model's parameterization.
        steps: even, at least 2. Costs 6 evaluations and as many backward passes a step (times the probes).
        probes: [k, b, c, h, w], for Hutchinson's estimate of the trace, the same at every step; `draw_probes` makes
            them. None computes the trace exactly, with c * h * w backward passes an evaluation.
        sigma_data: spread of the data. At sigma_max x is taken as Normal(0, sigma_max^2 + sigma_data^2): the latents
            of this project are white; 0 is the prior of noise alone.
        values_per_unit: how many values of the original data fit into a unit of x. 1 gives the bits of x itself; for
            8-bit pictures scaled to [-1, 1] it is 127.5, which adds 6.99 bits to each dimension.

    Raises:
        UserError: numbers out of range, or probes of another shape.
    """
    _check(x, sigma_min, sigma_max, steps, probes, sigma_data, values_per_unit)
    fine, noise = _integrate(denoise, x, math.log(sigma_min), math.log(sigma_max), steps, probes)
    coarse, noise_coarse = _integrate(denoise, x, math.log(sigma_min), math.log(sigma_max), steps // 2, probes)
    spread = math.hypot(sigma_max, sigma_data)
    fine, coarse = fine + _log_normal(noise, spread), coarse + _log_normal(noise_coarse, spread)  # [k, b]
    # an error of order 4 shrinks 16 times when steps are halved, so the difference is 15 times that of the fine grid
    correction = (fine - coarse) / 15
    each = fine + correction
    nats, step_error = each.mean(dim=0), correction.mean(dim=0).abs()
    k, d = len(each), x[0].numel()
    probe_error = torch.zeros_like(nats)
    if probes is not None:
        probe_error = each.std(dim=0) / math.sqrt(k) if k > 1 else torch.full_like(nats, math.nan)
    bits = -nats / (d * math.log(2)) + math.log2(values_per_unit)
    return Likelihood(nats, bits, step_error, probe_error, noise)


def _check(
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    steps: int,
    probes: Tensor | None,
    sigma_data: float,
    values_per_unit: float,
) -> None:
    if not 0 < sigma_min < sigma_max < math.inf:
        raise UserError(f"likelihood from sigma_min {sigma_min} to sigma_max {sigma_max}: choose 0 < min < max.")
    if steps < 2 or steps % 2:
        raise UserError(f"likelihood with {steps} steps: choose an even number, at least 2.")
    if sigma_data < 0 or not values_per_unit > 0:
        raise UserError(
            f"sigma_data {sigma_data} and values_per_unit {values_per_unit}: the first must not be negative, "
            "the second must be above 0."
        )
    if probes is not None and (probes.ndim != x.ndim + 1 or probes.shape[1:] != x.shape):
        raise UserError(f"probes of shape {[*probes.shape]} for x of shape {[*x.shape]}: give [k, *x.shape].")


def _integrate(
    denoise: Denoiser, x: Tensor, low: float, high: float, steps: int, probes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The integral of the divergence [k, b] in float64, and x at the upper end. Classical Runge-Kutta, order 4."""

    def slope(x: Tensor, u: float) -> tuple[Tensor, Tensor]:
        sigma = torch.full((len(x),), math.exp(u), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        x0_hat, trace = _denoise_and_trace(denoise, x, sigma, probes)
        return x - x0_hat, x[0].numel() - trace.double()

    h = (high - low) / steps
    total = x.new_zeros(1 if probes is None else len(probes), len(x), dtype=torch.float64)
    x = x.detach()
    for i in range(steps):
        u = low + i * h
        k1, d1 = slope(x, u)
        k2, d2 = slope(x + 0.5 * h * k1, u + 0.5 * h)
        k3, d3 = slope(x + 0.5 * h * k2, u + 0.5 * h)
        k4, d4 = slope(x + h * k3, u + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        total = total + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    return total, x


@torch.enable_grad()
def _denoise_and_trace(denoise: Denoiser, x: Tensor, sigma: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
    """x0_hat [b, c, h, w] and the trace of its derivative [k, b], one backward pass for each direction."""
    x = x.detach().requires_grad_()
    x0_hat = denoise(x, sigma)
    if probes is None:
        flat = x0_hat.flatten(1)
        # the examples do not influence one another, so the gradient of a sum over them holds each one's own
        rows = [torch.autograd.grad(flat[:, j].sum(), x, retain_graph=True)[0].flatten(1) for j in range(flat.shape[1])]
        trace = torch.stack([row[:, j] for j, row in enumerate(rows)]).sum(dim=0)[None]
    else:
        # trace(J) = E[e^T J e] (arXiv 2011.13456, eq. 40)
        directions = [probe.to(x) for probe in probes]
        products = [torch.autograd.grad(x0_hat, x, e, retain_graph=True)[0] for e in directions]
        pairs = zip(directions, products, strict=True)
        trace = torch.stack([(e * product).flatten(1).sum(dim=1) for e, product in pairs])
    return x0_hat.detach(), trace.detach()


def _log_normal(x: Tensor, std: float) -> Tensor:
    """Log density of x [b, ...] under Normal(0, std^2) in every dimension. [b], float64."""
    flat = x.double().flatten(1)
    return -0.5 * (flat / std).square().sum(dim=1) - flat.shape[1] * (math.log(std) + 0.5 * math.log(2 * math.pi))


PROBES: Mapping[str, Callable[[Sequence[int], torch.Generator], Tensor]] = {
    "rademacher": rademacher,
    "gaussian": gaussian,
}
