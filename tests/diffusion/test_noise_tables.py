"""Laws of the noise tables."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from latentgen.core.errors import UserError
from latentgen.diffusion.noise_tables import BETAS, NoiseTable

KINDS = sorted(BETAS)
TABLES = [NoiseTable(kind, zero_terminal_snr=zero) for kind in KINDS for zero in (False, True)]
TABLES.append(NoiseTable("trained", num_timesteps=1000, trained_betas=(0.01,) * 1000))


@pytest.mark.parametrize("table", TABLES, ids=lambda table: f"{table.kind}-{table.zero_terminal_snr}")
def test_the_laws_of_a_table(table: NoiseTable) -> None:
    """alpha^2 + sigma_vp^2 = 1, all is monotone, the SNR is large at one end and next to nothing at the other."""
    alpha_bar, betas, sigmas = table.alpha_bar, table.betas, table.sigmas
    assert alpha_bar.dtype == betas.dtype == torch.float64
    assert (alpha_bar.diff() < 0).all()
    assert (sigmas.diff() > 0).all()
    assert ((betas > 0) & (betas < 1)).all()
    torch.testing.assert_close(alpha_bar, 1 / (1 + sigmas**2), rtol=1e-9, atol=0)
    torch.testing.assert_close(torch.cumprod(1 - betas, 0), alpha_bar, rtol=1e-6, atol=0)
    snr = sigmas**-2
    assert snr[0] > 90
    assert snr[-1] < 0.01
    if table.zero_terminal_snr:
        assert sigmas[-1].item() == pytest.approx(4096, rel=1e-6)


@given(kind=st.sampled_from(KINDS), n=st.integers(2, 1200), zero=st.booleans())
def test_rescaling_keeps_the_first_time_and_the_order(kind: str, n: int, zero: bool) -> None:
    table, plain = NoiseTable(kind, n, zero_terminal_snr=zero), NoiseTable(kind, n)
    torch.testing.assert_close(table.alpha_bar[0], plain.alpha_bar[0])
    assert (table.sigmas.diff() > 0).all()
    assert (table.alpha_bar <= plain.alpha_bar + 1e-7).all()


def test_trained_betas_are_the_table() -> None:
    betas = tuple(NoiseTable("sigmoid", 50).betas.tolist())
    table = NoiseTable("trained", 50, trained_betas=betas)
    torch.testing.assert_close(table.sigmas, NoiseTable("sigmoid", 50).sigmas)
    assert NoiseTable("trained", 50, trained_betas=list(betas)) == table, "as a JSON file holds them"  # type: ignore[arg-type]


def test_sigmoid_tables_are_the_published_ones() -> None:
    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="sigmoid").alphas_cumprod
    torch.testing.assert_close(NoiseTable("sigmoid").alpha_bar.float(), theirs, rtol=1e-4, atol=1e-7)
    middle = NoiseTable("sigmoid_alpha_bar").alpha_bar[499]  # t = 1/2, where the sigmoid is at its centre
    torch.testing.assert_close(middle.item(), 0.5, rtol=1e-9, atol=0)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: f"{table.kind}-{table.zero_terminal_snr}")
def test_time_and_sigma_are_inverse_and_clamped(table: NoiseTable) -> None:
    t = torch.cat([torch.arange(1000, dtype=torch.float64), torch.linspace(0, 999, 777, dtype=torch.float64)])
    torch.testing.assert_close(table.t_of_sigma(table.sigma_of_t(t)), t, rtol=0, atol=1e-6)
    torch.testing.assert_close(table.sigma_of_t(t[:1000]), table.sigmas)
    assert (table.sigmas.diff() > 0).all()
    below_and_above = torch.tensor([0.0, 1e-9, 1e9, float("inf")])
    assert table.t_of_sigma(below_and_above).tolist() == [0, 0, 999, 999]
    assert torch.equal(table.sigma_of_t(torch.tensor([-5.0, 2000.0])), table.sigma_of_t(torch.tensor([0.0, 999.0])))


@pytest.mark.parametrize("table", TABLES, ids=lambda table: f"{table.kind}-{table.zero_terminal_snr}")
def test_float32_finds_the_integer_time(table: NoiseTable) -> None:
    t = table.t_of_sigma(table.sigmas.float())
    assert t.dtype == torch.float32
    torch.testing.assert_close(t, torch.arange(1000.0), rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_alpha_bar_is_the_published_table(kind: str, zero_terminal_snr: bool) -> None:
    ours = NoiseTable(kind, zero_terminal_snr=zero_terminal_snr).alpha_bar
    theirs = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="squaredcos_cap_v2" if kind == "cosine" else kind,
        rescale_betas_zero_snr=zero_terminal_snr,
    ).alphas_cumprod
    torch.testing.assert_close(ours.float(), theirs, rtol=2e-3, atol=1e-6)


def test_table_made_while_sampling_serves_training() -> None:
    table = NoiseTable(num_timesteps=37)
    with torch.inference_mode():
        table.sigma_of_t(torch.zeros(1))
    sigma = torch.tensor([0.1], requires_grad=True)
    table.t_of_sigma(sigma).sum().backward()
    assert sigma.grad is not None
    assert sigma.grad.item() > 0


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: NoiseTable("cosin"), "cosine"),
        (lambda: NoiseTable(num_timesteps=1), "num_timesteps"),
        (lambda: NoiseTable(beta_start=0.5, beta_end=0.1), "beta_start"),
        (lambda: NoiseTable("trained"), "trained_betas"),
        (lambda: NoiseTable("linear", trained_betas=(0.1, 0.2)), "trained_betas"),
        (lambda: NoiseTable("trained", 3, trained_betas=(0.1, 0.2)), "3 numbers"),
        (lambda: NoiseTable("trained", 2, trained_betas=(0.1, 1.2)), "between 0 and 1"),
    ],
)
def test_mistakes_are_told_in_one_line(build, word: str) -> None:
    with pytest.raises(UserError, match=word) as caught:
        build()
    assert "\n" not in str(caught.value)
