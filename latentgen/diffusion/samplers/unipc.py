"""UniPC: a predictor and a corrector that share their evaluations (arXiv 2302.04867)."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.diffusion.parameterization import Denoiser
from latentgen.diffusion.samplers.common import NoiseSource, OnStep, batch_of, levels_of, line


def unipc(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    order: int = 3,
    variant: str = "bh2",
) -> Tensor:
    """UniPC of order 1, 2 or 3 on the estimate x0_hat (data prediction), with lambda = -log(sigma).

    One evaluation a step: the estimate made at a predicted point first corrects that point (the corrector gains an
    order), then predicts the next. The first steps have fewer estimates to use; towards the end the order falls to 1,
    as a step to 0 is infinitely long in lambda. on_step sees predicted points. variant: bh1 | bh2, the choice of B(h).
    """
    del noise
    if order not in (1, 2, 3):
        raise UserError(f"order {order} of unipc: choose 1, 2 or 3.")
    if variant not in ("bh1", "bh2"):
        raise UserError(f"variant {variant!r} of unipc: choose bh1 or bh2.")
    levels = levels_of(sigmas, "unipc")
    steps = len(levels) - 1
    history: list[tuple[float, Tensor]] = []  # newest first: sigma, x0_hat
    x_before, used = x, 0  # the point the last step started from, and the order it used
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        x0_hat = denoise(x, batch_of(sigma, x))
        if i > 0:
            x = _step(x_before, history[:used], sigma, variant, x0_hat)
        history = [(sigma, x0_hat), *history[: order - 1]]
        x_before, used = x, min(order, len(history), steps - i if levels[-1] == 0 else order)
        x = _step(x, history[:used], sigma_next, variant, None)
        if on_step is not None:
            on_step(i, x, x0_hat)
    return x


def _step(
    x: Tensor, history: list[tuple[float, Tensor]], sigma_next: float, variant: str, new: Tensor | None
) -> Tensor:
    """One step from x at the newest level of `history` to sigma_next; `new`, the estimate there, makes it a corrector.

    Both are x_next = exp(-h) x + (1 - exp(-h)) m0 - B(h) sum of a_k D_k, where D_k = (m_k - m0) / r_k and r_k is where
    m_k stands, in steps: UniP and UniC of the paper, for data prediction.
    """
    sigma, m0 = history[0]
    x_next = line(x, m0, sigma, sigma_next)
    h = math.log(sigma / sigma_next) if sigma_next > 0 else math.inf
    r = [math.log(sigma / at) / h for at, _ in history[1:]]
    differences = [(m - m0) / at for at, (_, m) in zip(r, history[1:], strict=True)]
    if new is not None:
        r, differences = [*r, 1.0], [*differences, new - m0]
    if not r:
        return x_next
    assert sigma_next > 0
    b_of_h = -h if variant == "bh1" else math.expm1(-h)
    for a, difference in zip(_coefficients(r, h, b_of_h), differences, strict=True):
        x_next = x_next - b_of_h * a * difference
    return x_next


def _coefficients(r: list[float], h: float, b_of_h: float) -> list[float]:
    """a_k, which solve: sum over k of r_k^(n-1) a_k = n! phi_{n+1}(-h) (-h) / B(h) for n = 1 .. len(r).

    That is the paper's system for data prediction, each row divided by its power of h.

    A single unknown is 1/2 for every h, which keeps the order and is what every implementation takes.
    """
    if len(r) == 1:
        return [0.5]
    phi = math.expm1(-h) / -h
    right = []
    for n in range(1, len(r) + 1):
        phi = (phi - 1 / math.factorial(n)) / -h  # phi_{n+1}(z) = (phi_n(z) - 1/n!) / z, with z = -h
        right.append(math.factorial(n) * phi * -h / b_of_h)
    rows = [[at**n for at in r] for n in range(len(r))]
    return torch.linalg.solve(
        torch.tensor(rows, dtype=torch.float64), torch.tensor(right, dtype=torch.float64)
    ).tolist()
