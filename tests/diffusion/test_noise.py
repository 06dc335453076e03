"""Kinds of noise: their spread, and what they leave alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentgen.core.errors import UserError
from latentgen.diffusion.noise import offset, perturbed, pyramid, pyramid_sizes, student, student_scale


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_offset_moves_the_mean_of_each_channel() -> None:
    noise, shift = randn(4, 3, 5, 5), randn(4, 3, 1, 1, seed=1)
    moved = offset(noise, shift, 0.1)
    torch.testing.assert_close(moved.mean((2, 3)), noise.mean((2, 3)) + 0.1 * shift[..., 0, 0])
    torch.testing.assert_close(moved - moved.mean((2, 3), keepdim=True), noise - noise.mean((2, 3), keepdim=True))
    assert torch.equal(offset(noise, shift, 0.0), noise)


@given(height=st.integers(1, 70), width=st.integers(1, 70))
def test_pyramid_grids_go_down_to_one_cell(height: int, width: int) -> None:
    sizes = [(height, width), *pyramid_sizes(height, width)]
    assert sizes[-1] == (1, 1)
    assert all(small == (math.ceil(h / 2), math.ceil(w / 2)) for (h, w), small in itertools.pairwise(sizes))


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.9])
def test_every_value_of_the_pyramid_is_standard_and_neighbours_go_together(discount: float) -> None:
    noise, n = randn(4000, 1, 6, 5), 4000
    coarser = [randn(n, 1, *size, seed=3 + i) for i, size in enumerate(pyramid_sizes(6, 5))]
    out = pyramid(noise, coarser, discount)
    assert ((out.var(dim=0) - 1).abs() < 6 * math.sqrt(2 / n)).all()
    shared = sum(discount ** (2 * i) for i in range(1, len(coarser) + 1))
    correlation = (out[:, 0, 0, 0] * out[:, 0, 1, 1]).mean().item()  # one block on every coarser grid
    assert correlation == pytest.approx(shared / (1 + shared), abs=6 / math.sqrt(n))
    if discount == 0:
        assert torch.equal(out, noise)


def test_only_the_input_is_perturbed() -> None:
    noise, fresh = randn(2, 1, 3, 3), randn(2, 1, 3, 3, seed=1)
    torch.testing.assert_close(perturbed(noise, fresh, 0.1) - noise, 0.1 * fresh)


@given(log_dim=st.floats(-0.5, 5), seed=st.integers(0, 2**31))
def test_the_student_factor_is_a_chi_square_quantile(log_dim: float, seed: int) -> None:
    dim = 10.0**log_dim
    u = torch.rand(50, generator=torch.Generator().manual_seed(seed))
    chi2 = dim / student_scale(u, dim) ** 2
    back = torch.special.gammainc(torch.full_like(chi2, dim / 2), chi2 / 2)
    torch.testing.assert_close(back, u.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [3.0, 16.0, 128.0])
def test_the_radius_is_distributed_as_pfgm_says(dim: float) -> None:
    """R^2 / (R^2 + r^2) ~ Beta(N/2, D/2) with r = sigma sqrt(D) (arXiv 2302.04265): its mean and variance."""
    n, data_dim = 20_000, 12
    u = (torch.arange(n) + 0.5) / n
    noise = student(randn(n, 3, 2, 2), u[torch.randperm(n, generator=torch.Generator().manual_seed(5))], dim)
    ratio = (noise**2).flatten(1).sum(1).double() / dim  # R^2 / r^2, whatever sigma
    beta = ratio / (1 + ratio)
    a, b = data_dim / 2, dim / 2
    variance = a * b / ((a + b) ** 2 * (a + b + 1))
    assert beta.mean().item() == pytest.approx(a / (a + b), abs=5 * math.sqrt(variance / n))
    assert beta.var().item() == pytest.approx(variance, rel=0.05)


def test_infinite_dimension_is_edm() -> None:
    """The factor goes to 1 like 1 / sqrt(D), to the very ends of u."""
    u = torch.cat([torch.zeros(1), torch.linspace(0, 1 - 2.0**-24, 99)])
    for dim in (1e4, 1e6, 1e8, 1e10):
        assert (student_scale(u, dim) - 1).abs().max() < 5 / math.sqrt(dim)
    noise = randn(100, 2, 3, 3)
    torch.testing.assert_close(student(noise, u, 1e12), noise, rtol=1e-5, atol=0)
    assert student_scale(u, 1.0).isfinite().all()


def test_bad_strengths_are_refused() -> None:
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(UserError, match="offset_noise"):
        offset(x, x, -1)
    with pytest.raises(UserError, match="pyramid_discount"):
        pyramid(x, [], 1.0)
    with pytest.raises(UserError, match="input_perturbation"):
        perturbed(x, x, math.nan)
    with pytest.raises(UserError, match="augmented_dim"):
        student(x, torch.zeros(1), 0)
