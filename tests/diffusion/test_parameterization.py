"""Laws of the parameterizations: one clean image, however the network speaks of it."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from latentgen.core.errors import UserError
from latentgen.diffusion.parameterization import (
    BETAS,
    EDM,
    PARAMETERIZATIONS,
    X0,
    Eps,
    Flow,
    NoiseTable,
    Parameterization,
    V,
    convert,
    denoiser,
    from_x0,
    make,
    per_example,
    to_x0,
)

ALL: dict[str, Parameterization] = {name: make(name) for name in PARAMETERIZATIONS}
TABLES = [NoiseTable(kind) for kind in ("linear", "scaled_linear", "cosine")] + [NoiseTable(zero_terminal_snr=True)]

log_sigma = st.floats(-6.0, 7.0)
names = st.sampled_from(sorted(ALL))


def example(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator),
        torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator),
    )


@given(name=names, logs=st.tuples(log_sigma, log_sigma), seed=st.integers(0, 2**31))
def test_scalings_applied_to_target_give_back_x0(name: str, logs: tuple[float, float], seed: int) -> None:
    p = ALL[name]
    x0, noise = example(seed)
    sigma = torch.tensor(logs, dtype=torch.float64).exp()
    x = x0 + per_example(sigma, x0) * noise
    c = p.scalings(sigma)
    assert all(scaling.shape == sigma.shape for scaling in c)
    target = p.target(x0, noise, sigma)
    recovered = per_example(c.c_skip, x) * x + per_example(c.c_out, x) * target
    torch.testing.assert_close(recovered, x0, rtol=0, atol=1e-6)


@given(name=names, logs=st.tuples(log_sigma, log_sigma))
def test_network_input_and_target_have_unit_scale_for_white_data(name: str, logs: tuple[float, float]) -> None:
    """For data and noise of variance 1: exactly 1 for VP and EDM inputs; flow inputs are (1-t) x0 + t noise."""
    sigma = torch.tensor(logs, dtype=torch.float64).exp()
    spread = ALL[name].scalings(sigma).c_in * (1 + sigma**2).sqrt()
    if name == "flow":
        assert ((spread > 0.7) & (spread <= 1)).all()
    else:
        torch.testing.assert_close(spread, torch.ones_like(spread))


@given(source=names, to=names, log=log_sigma, seed=st.integers(0, 2**31))
def test_predictions_convert_exactly(source: str, to: str, log: float, seed: int) -> None:
    x0, noise = example(seed)
    sigma = torch.full((2,), log, dtype=torch.float64).exp()
    x = x0 + per_example(sigma, x0) * noise
    given_target, wanted = (ALL[name].target(x0, noise, sigma) for name in (source, to))
    torch.testing.assert_close(convert(given_target, x, sigma, ALL[source], ALL[to]), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(from_x0(ALL[to], x0, x, sigma), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(to_x0(ALL[source], given_target, x, sigma), x0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_time_and_sigma_are_inverse_and_clamped(table: NoiseTable) -> None:
    t = torch.cat([torch.arange(1000, dtype=torch.float64), torch.linspace(0, 999, 777, dtype=torch.float64)])
    torch.testing.assert_close(table.t_of_sigma(table.sigma_of_t(t)), t, rtol=0, atol=1e-6)
    torch.testing.assert_close(table.sigma_of_t(t[:1000]), table.sigmas)
    assert (table.sigmas.diff() > 0).all()
    below_and_above = torch.tensor([0.0, 1e-9, 1e9, float("inf")])
    assert table.t_of_sigma(below_and_above).tolist() == [0, 0, 999, 999]
    assert torch.equal(table.sigma_of_t(torch.tensor([-5.0, 2000.0])), table.sigma_of_t(torch.tensor([0.0, 999.0])))


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_float32_finds_the_integer_time(table: NoiseTable) -> None:
    t = table.t_of_sigma(table.sigmas.float())
    assert t.dtype == torch.float32
    torch.testing.assert_close(t, torch.arange(1000.0), rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", sorted(BETAS))
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


def test_training_pairs_are_those_of_diffusers() -> None:
    """x_vp = add_noise, and v = get_velocity, at integer times of Stable Diffusion's table."""
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    x0, noise = (t.float() for t in example(3))
    t = torch.tensor([17, 901])
    sigma = NoiseTable().sigma_of_t(t)
    x = x0 + per_example(sigma, x0) * noise
    for p in (Eps(), V(), X0()):
        c = p.scalings(sigma)
        torch.testing.assert_close(per_example(c.c_in, x) * x, scheduler.add_noise(x0, noise, t), rtol=0, atol=1e-5)
        torch.testing.assert_close(c.c_noise, t.float(), rtol=0, atol=1e-3)
    torch.testing.assert_close(V().target(x0, noise, sigma), scheduler.get_velocity(x0, noise, t), rtol=0, atol=1e-5)
    assert torch.equal(Eps().target(x0, noise, sigma), noise)


@given(log=st.floats(-6, 6))
def test_flow_input_is_the_straight_path(log: float) -> None:
    x0, noise = example(5)
    sigma = torch.full((2,), log, dtype=torch.float64).exp()
    c = Flow().scalings(sigma)
    t = per_example(c.c_noise / 1000, x0)
    x = x0 + per_example(sigma, x0) * noise
    torch.testing.assert_close(per_example(c.c_in, x) * x, (1 - t) * x0 + t * noise)


@pytest.mark.parametrize("name", sorted(ALL))
def test_own_time_runs_from_sigma_min_to_sigma_max(name: str) -> None:
    p = ALL[name]
    sigma = p.sigma_of_fraction(torch.linspace(0, 1, 101, dtype=torch.float64))
    assert sigma[0].item() == pytest.approx(p.sigma_min, rel=1e-9)
    assert sigma[-1].item() == pytest.approx(p.sigma_max, rel=1e-9)
    assert (sigma.diff() > 0).all()


@pytest.mark.parametrize("name", sorted(ALL))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_denoiser_with_a_perfect_network_returns_x0(name: str, dtype: torch.dtype) -> None:
    p = ALL[name]
    x0, noise = example(7)
    sigma = torch.tensor([p.sigma_max, 0.5], dtype=torch.float64)
    x = (x0 + per_example(sigma, x0) * noise).to(dtype)
    seen: list[torch.Tensor] = []

    def network(x_in: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
        seen.extend([x_in, c_noise])
        return p.target(x0, noise, sigma).to(dtype)

    x0_hat = denoiser(p, network)(x, sigma.to(dtype))
    assert x0_hat.dtype == seen[0].dtype == dtype
    assert x0_hat.shape == x0.shape
    assert seen[1].dtype != torch.bfloat16  # half precision cannot hold a timestep
    if dtype == torch.float64:
        torch.testing.assert_close(x0_hat, x0, rtol=0, atol=1e-6)
    # in float32 the first example is the start of sampling, where x is sigma_max times larger than x0
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(x0_hat[1].double(), x0[1], rtol=0, atol=tolerance)
    assert x0_hat.isfinite().all()


def test_edm_scalings_are_those_of_the_paper() -> None:
    """arXiv 2206.00364, table 1, at sigma = 3 and sigma_data = 4, where the root is 5."""
    c = EDM(sigma_data=4.0).scalings(torch.tensor([3.0], dtype=torch.float64))
    assert [scaling.item() for scaling in c] == pytest.approx([16 / 25, 12 / 5, 1 / 5, math.log(3) / 4])


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
        (lambda: make("epsilom"), "eps"),
        (lambda: make("eps", NoiseTable(zero_terminal_snr=True)), "zero-terminal"),
        (lambda: make("edm", sigma_data=0), "sigma_data"),
        (lambda: NoiseTable("cosin"), "cosine"),
        (lambda: NoiseTable(num_timesteps=1), "num_timesteps"),
        (lambda: NoiseTable(beta_start=0.5, beta_end=0.1), "beta_start"),
        (lambda: Flow(t_max=1.0), "t_max"),
        (lambda: EDM(sigma_min=3, sigma_max=2), "sigma_min"),
    ],
)
def test_mistakes_are_told_in_one_line(build, word: str) -> None:
    with pytest.raises(UserError, match=word) as caught:
        build()
    assert "\n" not in str(caught.value)
