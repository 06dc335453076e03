"""PSNR and SSIM against closed forms and a plain reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from latentgen.models.quality import psnr, ssim


def pictures(seed: int, b: int = 2, side: int = 20) -> torch.Tensor:
    return torch.rand(b, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def test_psnr_of_known_errors() -> None:
    a = torch.zeros(3, 3, 4, 4)
    b = a + torch.tensor([2.0, 0.2, 0.02]).view(3, 1, 1, 1)
    torch.testing.assert_close(psnr(a, b), torch.tensor([0.0, 20.0, 40.0]))
    one = a[:1].clone()
    one[0, 0, 0, 0] = 1.0
    assert float(psnr(a[:1], one)) == pytest.approx(10 * math.log10(4 * 48))


def test_psnr_of_equal_pictures_is_finite() -> None:
    assert float(psnr(pictures(0), pictures(0)).min()) > 100
    assert bool(psnr(pictures(0), pictures(0)).isfinite().all())


def test_ssim_of_equal_pictures_is_one() -> None:
    torch.testing.assert_close(ssim(pictures(0), pictures(0)), torch.ones(2, dtype=torch.float64))


def test_ssim_of_flat_pictures_is_the_luminance_term() -> None:
    a, b = torch.full((1, 3, 16, 16), 0.5, dtype=torch.float64), torch.full((1, 3, 16, 16), -0.25, dtype=torch.float64)
    c1 = 0.02**2
    expected = (2 * 0.5 * -0.25 + c1) / (0.5**2 + 0.25**2 + c1)
    assert float(ssim(a, b)) == pytest.approx(expected, rel=1e-6)


def test_ssim_is_symmetric_and_each_picture_counts_for_itself() -> None:
    a, b = pictures(1), pictures(2)
    torch.testing.assert_close(ssim(a, b), ssim(b, a))
    torch.testing.assert_close(ssim(a, b)[1:], ssim(a[1:], b[1:]))
    noisy = [float(ssim(a, a + level * b).mean()) for level in (0.05, 0.2, 0.6)]
    assert noisy == sorted(noisy, reverse=True)
    assert noisy[0] < 1


def test_ssim_is_the_plain_formula() -> None:
    """Windowed moments by scipy's Gaussian filter, cut to the places where the whole window lies inside."""
    a, b = pictures(3, side=24), 0.7 * pictures(3, side=24) + 0.3 * pictures(4, side=24)

    def blur(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, radius=5, axes=(-2, -1))[..., 5:-5, 5:-5]

    x, y = a.numpy(), b.numpy()
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    value = ((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    np.testing.assert_allclose(ssim(a, b).numpy(), value.mean(axis=(1, 2, 3)), rtol=1e-9)
