"""The denoising loss and its weights.

Every weight is meant for the loss on x0_hat and is carried to the network's output by

    x0_hat - x0 = c_out * (prediction - target)   =>   weight(output) = c_out^2 * weight(x0)

so one line per weight is right for eps, v, x0, flow, edm and ve alike. SNR = 1 / sigma^2. The weights are those of the
squared error; Huber's and L1 multiply by the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.diffusion.parameterization import EDM, Parameterization, per_example

Weight = Callable[..., Tensor]
"""weight(sigma: [b], parameterization, **knobs) -> weight on the network-output loss: [b]."""


Loss = Callable[..., Tensor]
"""loss(prediction: [b, c, h, w], target, fraction: [b], sigma: [b], pixels: [b, 1, h, w] or None, **knobs) -> loss of
each example: [b], the mean over its pixels of each one's loss times what `pixels` says that it counts."""


def denoising_loss(prediction: Tensor, target: Tensor, weight: Tensor, pixels: Tensor | None = None) -> Tensor:
    """Mean squared error of each example, times its weight. [b, c, h, w] twice, [b] -> [b], at least float32."""
    return _mean(_error(prediction, target) ** 2, pixels) * weight


def mse(prediction: Tensor, target: Tensor, fraction: Tensor, sigma: Tensor, pixels: Tensor | None = None) -> Tensor:
    """Mean squared error of each example. [b]."""
    del fraction
    return denoising_loss(prediction, target, torch.ones_like(sigma), pixels)


def l1(prediction: Tensor, target: Tensor, fraction: Tensor, sigma: Tensor, pixels: Tensor | None = None) -> Tensor:
    """Mean absolute error of each example. [b]."""
    del fraction, sigma
    return _mean(_error(prediction, target).abs(), pixels)


def huber(
    prediction: Tensor,
    target: Tensor,
    fraction: Tensor,
    sigma: Tensor,
    pixels: Tensor | None = None,
    *,
    c: float = 0.1,
    schedule: str = "snr",
) -> Tensor:
    """Scheduled pseudo-Huber: 2 c (sqrt(error^2 + c^2) - c) (arXiv 2403.16728). [b].

    Twice the paper's, so that errors far below c count as in `mse`; those far above count as 2 c |error|, and an
    example that is wrong or damaged pulls less. c depends on the level, from 1 for clean images down to `c` for noise:

        exponential   c^t, t = fraction [b] of the process's time (the paper's)
        snr           c + (1 - c) / (1 + sigma)^2, the same but for every process alike
        constant      c
    """
    if not 0 < c <= 1:
        raise UserError(f"huber_c is {c}: choose it above 0, up to 1 (0.1 is usual).")
    if schedule == "exponential":
        scheduled = c**fraction
    elif schedule == "snr":
        scheduled = c + (1 - c) / (1 + sigma) ** 2
    elif schedule == "constant":
        scheduled = torch.full_like(sigma, c)
    else:
        raise UserError(f"huber_schedule {schedule!r} is unknown: choose exponential, snr or constant.")
    error = _error(prediction, target)
    scale = per_example(scheduled, error)
    # 2 c (sqrt(e^2 + c^2) - c), written without the difference of nearly equal numbers
    return _mean(2 * scale * error**2 / (torch.sqrt(error**2 + scale**2) + scale), pixels)


def _mean(each: Tensor, pixels: Tensor | None) -> Tensor:
    """The mean over all pixels, also those that count little: an example with a small mask teaches little."""
    return (each if pixels is None else each * pixels).flatten(1).mean(dim=1)


def _error(prediction: Tensor, target: Tensor) -> Tensor:
    wide = torch.promote_types(prediction.dtype, torch.float32)
    return prediction.to(wide) - target.to(wide)


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


def soft_min_snr(sigma: Tensor, parameterization: Parameterization, *, gamma: float = 5.0) -> Tensor:
    """1 / (1 / SNR + 1 / gamma) on the x0 loss: min-SNR without the kink (arXiv 2401.11605). [b].

    There gamma is 1 / sigma_data^2, which is 4 for its sigma_data of 1/2.
    """
    if not gamma > 0:
        raise UserError(f"gamma of the soft-min-SNR weight is {gamma}: it must be above 0 (4 or 5 is usual).")
    return parameterization.scalings(sigma).c_out ** 2 / (sigma**2 + 1 / gamma)


def p2(sigma: Tensor, parameterization: Parameterization, *, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    """SNR / (k + SNR)^gamma on the x0 loss: less for the nearly clean levels (arXiv 2204.00227). [b], sigma > 0.

    On eps it is 1 / (k + SNR)^gamma, the paper's form. gamma = 0 is `snr`; the paper uses k = 1 with gamma = 0.5 or 1.
    """
    if not (k > 0 and gamma >= 0):
        raise UserError(f"k {k} and gamma {gamma} of the P2 weight: choose k > 0 and gamma >= 0 (both 1 is usual).")
    # SNR (k + SNR)^-gamma = sigma^(2 gamma - 2) (1 + k sigma^2)^-gamma, finite where SNR^2 is not
    c_out = parameterization.scalings(sigma).c_out
    return (c_out / sigma * sigma**gamma) ** 2 * (1 + k * sigma**2) ** -gamma


def debiased(sigma: Tensor, parameterization: Parameterization) -> Tensor:
    """sqrt(SNR) on the x0 loss, which is 1 / sqrt(SNR) on eps (arXiv 2310.08442). [b], sigma > 0."""
    return parameterization.scalings(sigma).c_out ** 2 / sigma


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
    "soft_min_snr": soft_min_snr,
    "p2": p2,
    "debiased": debiased,
    "edm": edm,
}

LOSSES: Mapping[str, Loss] = {
    "mse": mse,
    "huber": huber,
    "l1": l1,
}
