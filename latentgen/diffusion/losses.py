"""The denoising loss and its weights.

Every weight is meant for the loss on x0_hat and is carried to the network's output by

    x0_hat - x0 = c_out * (prediction - target)   =>   weight(output) = c_out^2 * weight(x0)

so one line per weight is right for eps, v, x0, flow and edm alike. SNR = 1 / sigma^2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.diffusion.parameterization import EDM, Parameterization

Weight = Callable[..., Tensor]
"""weight(sigma: [b], parameterization, **knobs) -> weight on the network-output loss: [b]."""


def denoising_loss(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean squared error of each example, times its weight. [b, c, h, w] twice, [b] -> [b], at least float32."""
    wide = torch.promote_types(prediction.dtype, torch.float32)
    error = (prediction.to(wide) - target.to(wide)) ** 2
    return error.flatten(1).mean(dim=1) * weight


def unit(sigma: Tensor, parameterization: Parameterization) -> Tensor:
    """Weight 1 on the network's output: L_simple for eps (arXiv 2006.11239, eq. 14). [b]."""
    del parameterization
    return torch.ones_like(sigma)


def snr(sigma: Tensor, parameterization: Parameterization) -> Tensor:
    """SNR on the x0 loss: unit weight on eps, carried to the others (arXiv 2202.00512, section 4). [b], sigma > 0."""
    return parameterization.scalings(sigma).c_out ** 2 / sigma**2


def min_snr(sigma: Tensor, parameterization: Parameterization, *, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) on the x0 loss (arXiv 2303.09556, section 3.4). [b].

    On the output this is min(SNR, gamma) / SNR for eps, min(SNR, gamma) / (SNR + 1) for v, min(SNR, gamma) for x0.
    """
    if not gamma > 0:
        raise UserError(f"gamma of the min-SNR weight is {gamma}: it must be above 0 (5 is usual).")
    return parameterization.scalings(sigma).c_out ** 2 * (1 / sigma**2).clamp(max=gamma)


def edm(sigma: Tensor, parameterization: Parameterization, *, sigma_data: float | None = None) -> Tensor:
    """(sigma^2 + sigma_data^2) / (sigma * sigma_data)^2 on the x0 loss (arXiv 2206.00364, table 1). [b], sigma > 0.

    It is 1 on the output of an EDM network. sigma_data defaults to that network's own, else to 1 (white latents).
    """
    if sigma_data is None:
        sigma_data = parameterization.sigma_data if isinstance(parameterization, EDM) else 1.0
    if not sigma_data > 0:
        raise UserError(f"sigma_data of the edm weight is {sigma_data}: it must be above 0.")
    # written as a sum, because sigma^2 * sigma_data^2 may leave the range of float32
    return parameterization.scalings(sigma).c_out ** 2 * (1 / sigma_data**2 + 1 / sigma**2)


WEIGHTS: Mapping[str, Weight] = {
    "unit": unit,
    "snr": snr,
    "min_snr": min_snr,
    "edm": edm,
}
