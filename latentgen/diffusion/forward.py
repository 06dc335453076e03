"""The forward process q: how an image is lost in noise, in one jump or step by step, and how one step is undone.

In variance-exploding coordinates every Gaussian process is the same Brownian motion, whatever the network predicts:

    closed form   q(x_t | x_0)       = Normal(x_0, sigma_t^2)
    step by step  q(x_t | x_s)       = Normal(x_s, sigma_t^2 - sigma_s^2)                      for sigma_s <= sigma_t
    backwards     q(x_s | x_t, x_0)  = Normal(x_0 + r (x_t - x_0), sigma_s^2 (1 - r)),         r = (sigma_s / sigma_t)^2

What a network sees is c_in(sigma) * x; `transition` gives the same step in its coordinates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentgen.diffusion.parameterization import Parameterization, per_example


def diffuse(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x at noise level sigma [b], in closed form (arXiv 2006.11239, eq. 4). [b, c, h, w]."""
    return x0 + per_example(sigma, x0) * noise


def step(x: Tensor, noise: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """One step of the Markov chain, from sigma [b] up to sigma_next [b], with fresh standard noise. [b, c, h, w]."""
    return x + per_example((sigma_next**2 - sigma**2).clamp(min=0).sqrt(), x) * noise


def transition(p: Parameterization, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) of the step y' = a y + b noise in the network's coordinates, y = c_in(sigma) x. Each [b].

    For eps, v and x0 they are sqrt(1 - beta) and sqrt(beta), the chain of arXiv 2006.11239, eq. 2; for flow
    (1 - t') / (1 - t) and the rest.
    """
    c_in, c_in_next = p.scalings(sigma).c_in, p.scalings(sigma_next).c_in
    return c_in_next / c_in, c_in_next * (sigma_next**2 - sigma**2).clamp(min=0).sqrt()


def posterior(x: Tensor, x0: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [b, c, h, w] and variance [b] of q(x_s | x_t, x_0), from sigma [b] DOWN to sigma_next [b].

    These are eq. 6 and 7 of arXiv 2006.11239 in our coordinates: the mean is a point on the line from x0 to x, and the
    variance does not depend on either. At sigma_next = 0 the mean is x0 and the variance 0. With a network's x0_hat in
    the place of x0, this is the step of ancestral sampling.
    """
    ratio = (sigma_next / sigma) ** 2
    return torch.lerp(x0, x, per_example(ratio, x).to(x.dtype)), sigma_next**2 * (1 - ratio)
