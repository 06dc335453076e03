"""How close a reconstruction is: PSNR and SSIM."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in decibels, `[b]`, of pictures `[b, 3, h, w]` in [-1, 1] (peak 2)."""
    error = (first - second).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error.clamp_min(1e-10))


def ssim(first: Tensor, second: Tensor, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Structural similarity, `[b]`, at most 1 (Wang et al. 2004, eq. 13: Gaussian window, K1 = 0.01, K2 = 0.03).

    Args:
        first, second: pictures `[b, 3, h, w]` in [-1, 1], both sides at least `window`.
    """
    # In float64 on the CPU: the difference of squares below loses too much in a GPU's TensorFloat-32.
    first, second = first.detach().cpu().double(), second.detach().cpu().double()
    at = torch.arange(window, dtype=first.dtype, device=first.device) - (window - 1) / 2
    line = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = torch.outer(line, line) / line.sum() ** 2
    channels = first.shape[1]
    weight = kernel.expand(channels, 1, window, window)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, groups=channels)

    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # the dynamic range of [-1, 1] is 2
    mean_1, mean_2 = blur(first), blur(second)
    var_1, var_2 = blur(first**2) - mean_1**2, blur(second**2) - mean_2**2
    covariance = blur(first * second) - mean_1 * mean_2
    luminance = (2 * mean_1 * mean_2 + c1) / (mean_1**2 + mean_2**2 + c1)
    structure = (2 * covariance + c2) / (var_1 + var_2 + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))
