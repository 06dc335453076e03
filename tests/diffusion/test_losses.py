"""The denoising loss, and weights that mean the same for every parameterization."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentgen.core.errors import UserError
from latentgen.diffusion.losses import WEIGHTS, denoising_loss, edm, min_snr, snr
from latentgen.diffusion.parameterization import PARAMETERIZATIONS, make, per_example

SIGMA = torch.logspace(-1.5, 1.5, 41, dtype=torch.float64)


@given(gamma=st.floats(0.1, 50), target=st.sampled_from(["eps", "v", "x0", "flow"]))
def test_min_snr_is_the_papers_closed_form(gamma: float, target: str) -> None:
    ratio = SIGMA**-2
    clamped = ratio.clamp(max=gamma)
    expected = {
        "eps": clamped / ratio,
        "v": clamped / (ratio + 1),
        "x0": clamped,
        "flow": clamped * (SIGMA / (1 + SIGMA)) ** 2,
    }[target]
    torch.testing.assert_close(min_snr(SIGMA, make(target), gamma=gamma), expected)


@given(weight=st.sampled_from(["snr", "min_snr", "edm"]), target=st.sampled_from(sorted(PARAMETERIZATIONS)))
def test_a_weight_gives_one_x0_loss_whatever_the_network_predicts(weight: str, target: str) -> None:
    """The same mistake in x0_hat must cost the same through every output."""
    p = make(target)
    generator = torch.Generator().manual_seed(0)
    x0, noise, mistake = torch.randn(3, len(SIGMA), 2, 3, 3, dtype=torch.float64, generator=generator)
    right = p.target(x0, noise, SIGMA)
    wrong = right + mistake / per_example(p.scalings(SIGMA).c_out, x0)  # moves x0_hat by `mistake`
    loss = denoising_loss(wrong, right, WEIGHTS[weight](SIGMA, p))
    on_x0 = WEIGHTS[weight](SIGMA, make("x0")) * (mistake**2).flatten(1).mean(1)
    torch.testing.assert_close(loss, on_x0, rtol=1e-6, atol=1e-9)


def test_weights_that_are_one() -> None:
    one = torch.ones_like(SIGMA)
    torch.testing.assert_close(snr(SIGMA, make("eps")), one)
    torch.testing.assert_close(edm(SIGMA, make("edm", sigma_data=0.5)), one)
    torch.testing.assert_close(edm(SIGMA, make("v")), one)  # for sigma_data = 1 the EDM network is a v network
    for target in PARAMETERIZATIONS:
        assert torch.equal(WEIGHTS["unit"](SIGMA, make(target)), one)


@pytest.mark.parametrize("weight", sorted(WEIGHTS))
@pytest.mark.parametrize("target", sorted(PARAMETERIZATIONS))
def test_weights_are_finite_in_float32_over_the_whole_range(weight: str, target: str) -> None:
    p = make(target)
    values = WEIGHTS[weight](torch.tensor([p.sigma_min, p.sigma_max]), p)
    assert values.shape == (2,)
    assert values.isfinite().all()
    assert (values > 0).all()


def test_loss_is_per_example_and_wide() -> None:
    prediction = torch.zeros(2, 1, 64, 64, dtype=torch.bfloat16)
    target = torch.stack([torch.ones(1, 64, 64), torch.full((1, 64, 64), 3.001)])
    loss = denoising_loss(prediction, target, torch.tensor([1.0, 2.0]))
    assert loss.dtype == torch.float32
    assert loss.tolist() == pytest.approx([1.0, 2 * 3.001**2], rel=1e-5)  # 3.001 is not a bfloat16


def test_bad_knobs_are_refused() -> None:
    with pytest.raises(UserError, match="gamma"):
        min_snr(SIGMA, make("eps"), gamma=0)
    with pytest.raises(UserError, match="sigma_data"):
        edm(SIGMA, make("eps"), sigma_data=-1)
