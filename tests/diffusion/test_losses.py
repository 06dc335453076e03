"""The denoising loss, and weights that mean the same for every parameterization."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentgen.core.errors import UserError
from latentgen.diffusion.losses import (
    LOSSES,
    WEIGHTS,
    debiased,
    denoising_loss,
    edm,
    huber,
    l1,
    min_snr,
    mse,
    p2,
    snr,
    soft_min_snr,
)
from latentgen.diffusion.parameterization import PARAMETERIZATIONS, make, per_example

SIGMA = torch.logspace(-1.5, 1.5, 41, dtype=torch.float64)


def on_output(target: str, on_x0: torch.Tensor) -> torch.Tensor:
    """A weight on the x0 loss as the papers write it on each network's output, with SNR = 1 / sigma^2."""
    ratio = SIGMA**-2
    carried = {"eps": 1 / ratio, "v": 1 / (ratio + 1), "x0": 1.0, "flow": (SIGMA / (1 + SIGMA)) ** 2, "ve": SIGMA**2}
    return on_x0 * carried[target]


outputs = st.sampled_from(["eps", "v", "x0", "flow", "ve"])


@given(gamma=st.floats(0.1, 50), target=outputs)
def test_min_snr_is_the_papers_closed_form(gamma: float, target: str) -> None:
    expected = on_output(target, (SIGMA**-2).clamp(max=gamma))
    torch.testing.assert_close(min_snr(SIGMA, make(target), gamma=gamma), expected)


@given(gamma=st.floats(0.1, 50), k=st.floats(0.1, 10), target=outputs)
def test_the_other_weights_are_the_papers_closed_forms(gamma: float, k: float, target: str) -> None:
    ratio, p = SIGMA**-2, make(target)
    torch.testing.assert_close(soft_min_snr(SIGMA, p, gamma=gamma), on_output(target, ratio * gamma / (ratio + gamma)))
    power = gamma / 25  # up to 2
    torch.testing.assert_close(p2(SIGMA, p, k=k, gamma=power), on_output(target, ratio / (k + ratio) ** power))
    torch.testing.assert_close(debiased(SIGMA, p), on_output(target, ratio.sqrt()))


@given(gamma=st.floats(0.1, 50))
def test_soft_min_snr_stays_below_min_snr_and_meets_it_at_both_ends(gamma: float) -> None:
    hard, soft = (weight(SIGMA, make("x0"), gamma=gamma) for weight in (min_snr, soft_min_snr))
    assert (soft < hard).all()
    assert (soft >= hard / 2 * (1 - 1e-9)).all()
    far = torch.tensor([1e-6, 1e6], dtype=torch.float64)
    torch.testing.assert_close(
        soft_min_snr(far, make("x0"), gamma=gamma), min_snr(far, make("x0"), gamma=gamma), rtol=1e-6, atol=0
    )


@given(weight=st.sampled_from(sorted(set(WEIGHTS) - {"unit"})), target=st.sampled_from(sorted(PARAMETERIZATIONS)))
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
    torch.testing.assert_close(p2(SIGMA, make("eps"), gamma=0), one)
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


def pair(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=generator)
    return target + scale * torch.randn(target.shape, dtype=torch.float64, generator=generator), target


FRACTION, LEVELS = torch.tensor([0.0, 0.5, 1.0]).double(), torch.tensor([1e-3, 1.0, 1e3]).double()


def test_huber_is_square_near_zero_and_straight_far_away() -> None:
    knobs = {"c": 0.1, "schedule": "constant"}
    prediction, target = pair(1e-4)
    torch.testing.assert_close(
        huber(prediction, target, FRACTION, LEVELS, **knobs),
        mse(prediction, target, FRACTION, LEVELS),
        rtol=1e-4,
        atol=0,
    )
    prediction, target = pair(1e4)
    torch.testing.assert_close(
        huber(prediction, target, FRACTION, LEVELS, **knobs),
        2 * 0.1 * l1(prediction, target, FRACTION, LEVELS),
        rtol=1e-4,
        atol=0,
    )


@given(c=st.floats(0.01, 1), schedule=st.sampled_from(["exponential", "snr", "constant"]))
def test_hubers_schedule_is_the_papers(c: float, schedule: str) -> None:
    """2 c (sqrt(e^2 + c^2) - c) with the c of each level, 1 for clean images and c for noise (arXiv 2403.16728)."""
    prediction, target = pair(0.5)
    at = {
        "exponential": torch.tensor([1.0, c**0.5, c]),
        "snr": torch.tensor([c + (1 - c) / 1.001**2, c + (1 - c) / 4, c + (1 - c) / 1001**2]),
        "constant": torch.full((3,), c),
    }[schedule].double()
    scale = per_example(at, target)
    expected = (2 * scale * (((prediction - target) ** 2 + scale**2).sqrt() - scale)).flatten(1).mean(1)
    found = huber(prediction, target, FRACTION, LEVELS, c=c, schedule=schedule)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_losses_are_per_example_wide_and_zero_only_when_right(name: str) -> None:
    prediction, target = pair(0.5)
    fraction, sigma = FRACTION.float(), LEVELS.float()
    loss = LOSSES[name](prediction.bfloat16(), target.bfloat16(), fraction, sigma)
    assert loss.shape == (3,)
    assert loss.dtype == torch.float32
    assert (loss > 0).all()
    assert torch.equal(LOSSES[name](target, target, fraction, sigma).float(), torch.zeros(3))


def test_bad_knobs_are_refused() -> None:
    with pytest.raises(UserError, match="soft-min-SNR"):
        soft_min_snr(SIGMA, make("eps"), gamma=0)
    with pytest.raises(UserError, match="P2"):
        p2(SIGMA, make("eps"), gamma=-1)
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(UserError, match="huber_c"):
        huber(x, x, torch.zeros(1), torch.ones(1), c=0.0)
    with pytest.raises(UserError, match="huber_schedule"):
        huber(x, x, torch.zeros(1), torch.ones(1), schedule="linear")
    with pytest.raises(UserError, match="gamma"):
        min_snr(SIGMA, make("eps"), gamma=0)
    with pytest.raises(UserError, match="sigma_data"):
        edm(SIGMA, make("eps"), sigma_data=-1)
