"""DPM-Solver-12 and -23 with a step size chosen by the error (arXiv 2206.00927)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.diffusion.parameterization import Denoiser, per_example
from latentgen.diffusion.samplers.common import NoiseSource, OnStep, batch_of, levels_of

MOST_STEPS = 10_000


def dpm_adaptive(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
) -> Tensor:
    """The probability flow to a tolerance; of `sigmas` only the ends count, and a last 0 is one more evaluation.

    Every picture has its own step size, so that it does not depend on its batch: the estimates of one call stand at
    different noise levels, and those that have arrived wait. order (2 or 3) evaluations a step. A step is accepted
    where the solutions of order and order - 1 differ by less than atol + rtol * |x| (the greater of both, root mean
    square); h_init is the first step in log(sigma). on_step comes once a round, with the estimate of its start.

    Raises UserError for another order, tolerances that are not positive, a non-finite estimate and when 10,000 rounds
    do not reach the end.
    """
    del noise
    if order not in (2, 3):
        raise UserError(f"order {order} of dpm_adaptive: choose 2 or 3.")
    if not (rtol > 0 and atol > 0 and h_init > 0):
        raise UserError(f"dpm_adaptive: rtol {rtol}, atol {atol} and h_init {h_init} must be above 0.")
    levels = levels_of(sigmas, "dpm_adaptive")
    if len(levels) < 2:
        return x
    start, end = -math.log(levels[0]), -math.log(levels[-1] or levels[-2])
    sense = 1.0 if end >= start else -1.0
    gains = (pcoeff, icoeff, dcoeff)
    pictures = [_Controller(start, sense * h_init, order, gains, accept_safety) for _ in range(len(x))]
    x_low_before, rounds = x, 0
    while any(picture.at != end for picture in pictures):
        if rounds == MOST_STEPS:
            raise UserError(f"dpm_adaptive: not at its end after {MOST_STEPS} rounds; raise rtol or atol.")
        at = _column([picture.at for picture in pictures], x)
        h = _column([picture.reach(end) for picture in pictures], x)
        low, high, x0_hat = (_step_12 if order == 2 else _step_23)(denoise, x, at, h)
        scale = torch.maximum(low.abs(), x_low_before.abs()).mul(rtol).clamp(min=atol)
        # row by row: a sum over a whole batch may be made in another order than over one picture
        errors = torch.stack([((a - b) / s).square().mean().sqrt() for a, b, s in zip(low, high, scale, strict=True)])
        accepted = [picture.judge(error, end) for picture, error in zip(pictures, errors.tolist(), strict=True)]
        mask = per_example(torch.tensor(accepted, device=x.device), x)
        x, x_low_before = torch.where(mask, high, x), torch.where(mask, low, x_low_before)
        if on_step is not None:
            on_step(rounds, x, x0_hat)
        rounds += 1
    if levels[-1] == 0:
        x = denoise(x, batch_of(levels[-2], x))
        if on_step is not None:
            on_step(rounds, x, x)
    return x


@dataclass
class _Controller:
    """Where one picture is, and how far its next step goes: a PID controller (Soederlind, 10.1145/641876.641877)."""

    at: float
    h: float
    order: int
    gains: tuple[float, float, float]
    safety: float
    inverse: tuple[float, float] | None = None
    asked: float = 0.0

    def reach(self, end: float) -> float:
        """The next step in lambda, cut at the end; 0 once there."""
        left = end - self.at
        self.asked = left if abs(self.h) >= abs(left) else self.h
        return self.asked

    def judge(self, error: float, end: float) -> bool:
        """Whether to keep the step just tried; plans the next one."""
        if self.at == end:
            return False
        if not math.isfinite(error):
            raise UserError("dpm_adaptive: the network's output is not finite; check the model and its precision.")
        p, i, d = self.gains
        now = 1 / (error + 1e-8)
        one, two = self.inverse or (now, now)
        # the powers of the controller, which belong to the last three errors
        factor = now ** ((p + i + d) / self.order) * one ** (-(p + 2 * d) / self.order) * two ** (d / self.order)
        factor = 1 + math.atan(factor - 1)  # a limit that is smooth
        accept = factor >= self.safety
        if accept:
            self.inverse = (now, one)
            self.at = end if self.asked == end - self.at else self.at + self.asked
        self.h *= factor
        return accept


def _column(values: list[float], x: Tensor) -> Tensor:
    """[b], at least float32: one number for each picture."""
    return torch.tensor(values, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def _step_12(denoise: Denoiser, x: Tensor, at: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x after h [b] from lambda = at [b], by order 1 and order 2 (r = 1/2), and the first estimate."""
    x0_hat, slope = _slope(denoise, x, at)
    low = x - _scaled((-at - h).exp() * h.expm1(), slope)  # DPM-Solver-1 with alpha = 1
    middle = x - _scaled((-at - h / 2).exp() * (h / 2).expm1(), slope)
    _, slope_middle = _slope(denoise, middle, at + h / 2)
    return low, x - _scaled((-at - h).exp() * h.expm1(), slope_middle), x0_hat  # DPM-Solver-2


def _step_23(denoise: Denoiser, x: Tensor, at: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x after h [b] from lambda = at [b], by order 2 and order 3 (r1 = 1/3, r2 = 2/3), and the first estimate."""
    x0_hat, slope = _slope(denoise, x, at)
    u1 = x - _scaled((-at - h / 3).exp() * (h / 3).expm1(), slope)
    change1 = _slope(denoise, u1, at + h / 3)[1] - slope
    sigma2 = (-at - 2 * h / 3).exp()
    u2 = x - _scaled(sigma2 * (2 * h / 3).expm1(), slope) - _scaled(2 * sigma2 * _phi(2 * h / 3), change1)
    change2 = _slope(denoise, u2, at + 2 * h / 3)[1] - slope
    sigma = (-at - h).exp()
    euler = x - _scaled(sigma * h.expm1(), slope)
    return euler - _scaled(1.5 * sigma * h.expm1(), change1), euler - _scaled(1.5 * sigma * _phi(h), change2), x0_hat


def _slope(denoise: Denoiser, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """x0_hat and the noise (x - x0_hat) / sigma, each picture at its own lambda = -log(sigma)."""
    sigma = (-at).exp()
    x0_hat = denoise(x, sigma)
    return x0_hat, (x - x0_hat) / per_example(sigma, x).to(x.dtype)


def _phi(h: Tensor) -> Tensor:
    """(exp(h) - 1) / h - 1, [b]; 0 where h is 0."""
    safe = torch.where(h == 0, torch.ones_like(h), h)
    return torch.where(h == 0, torch.zeros_like(h), safe.expm1() / safe - 1)


def _scaled(weight: Tensor, value: Tensor) -> Tensor:
    return per_example(weight, value).to(value.dtype) * value
