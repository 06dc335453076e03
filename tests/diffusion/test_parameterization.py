"""Laws of the parameterizations: one clean image, however the network speaks of it."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from latentgen.core.errors import UserError
from latentgen.diffusion.noise_tables import NoiseTable
from latentgen.diffusion.parameterization import (
    EDM,
    PARAMETERIZATIONS,
    VE,
    X0,
    Eps,
    Flow,
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
    c_in = ALL[name].scalings(sigma).c_in
    spread = c_in * (1 + sigma**2).sqrt()
    if name == "flow":
        assert ((spread > 0.7) & (spread <= 1)).all()
    elif name == "ve":
        assert torch.equal(c_in, torch.ones_like(sigma)), "the network sees x itself"
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


@given(u=st.floats(0, 1), shift=st.floats(0.2, 8), name=names)
def test_fraction_is_the_inverse_of_own_time(u: float, shift: float, name: str) -> None:
    p = Flow(shift=shift) if name == "flow" else ALL[name]
    fraction = torch.tensor([u], dtype=torch.float64)
    there_and_back = p.fraction_of_sigma(p.sigma_of_fraction(fraction))
    held = fraction
    if isinstance(p, Flow):  # its ends are held at t_min and t_max
        held = fraction.clamp(*p.fraction_of_sigma(torch.tensor([p.sigma_min, p.sigma_max], dtype=torch.float64)))
    torch.testing.assert_close(there_and_back, held, rtol=0, atol=1e-9)


@given(u=st.floats(0.01, 0.99), shift=st.floats(0.2, 8))
def test_flow_shift_is_the_papers_time_shift(u: float, shift: float) -> None:
    """arXiv 2403.03206, eq. 23; in sigma it is a factor."""
    fraction = torch.tensor([u], dtype=torch.float64)
    shifted = Flow(shift=shift, t_min=1e-4, t_max=1 - 1e-4).sigma_of_fraction(fraction)
    torch.testing.assert_close(shifted / (1 + shifted), shift * fraction / (1 + (shift - 1) * fraction))
    torch.testing.assert_close(shifted, shift * fraction / (1 - fraction))


def test_ve_scalings_are_those_of_the_paper() -> None:
    """arXiv 2206.00364, table 1, second column."""
    c = VE().scalings(torch.tensor([3.0], dtype=torch.float64))
    assert [scaling.item() for scaling in c] == pytest.approx([1, 3, 1, math.log(1.5)])


def test_edm_scalings_are_those_of_the_paper() -> None:
    """arXiv 2206.00364, table 1, at sigma = 3 and sigma_data = 4, where the root is 5."""
    c = EDM(sigma_data=4.0).scalings(torch.tensor([3.0], dtype=torch.float64))
    assert [scaling.item() for scaling in c] == pytest.approx([16 / 25, 12 / 5, 1 / 5, math.log(3) / 4])


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: make("epsilom"), "eps"),
        (lambda: make("eps", NoiseTable(zero_terminal_snr=True)), "zero-terminal"),
        (lambda: make("edm", sigma_data=0), "sigma_data"),
        (lambda: make("flow", sigma_data=1.0), "sigma_data"),
        (lambda: Flow(t_max=1.0), "t_max"),
        (lambda: Flow(shift=0.0), "shift"),
        (lambda: EDM(sigma_min=3, sigma_max=2), "sigma_min"),
        (lambda: EDM(augmented_dim=math.inf), "augmented_dim"),
        (lambda: VE(sigma_min=3, sigma_max=2), "sigma_min"),
    ],
)
def test_mistakes_are_told_in_one_line(build, word: str) -> None:
    with pytest.raises(UserError, match=word) as caught:
        build()
    assert "\n" not in str(caught.value)
