"""Samplers with their knobs, as users write them: NAME[,key=value]..."""

from __future__ import annotations

import pytest
import torch

from latentgen.core.errors import UserError
from latentgen.diffusion.knobs import settable
from latentgen.diffusion.samplers import SAMPLERS, canonical, find_sampler
from latentgen.diffusion.samplers.single import ddim

LEVELS = torch.tensor([5.0, 1.5, 0.4, 0.0])
NOISE_KNOBS = sorted(name for name, method in SAMPLERS.items() if method.noise_knob is not None)


def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return x * (0.25 / (0.25 + sigma.reshape(-1, 1, 1, 1) ** 2))


def start() -> torch.Tensor:
    return 5 * torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(3))


def noise(sigma: float, sigma_next: float) -> torch.Tensor:
    return torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(round(1000 * sigma_next)))


def test_the_knobs_are_those_of_the_function() -> None:
    method = find_sampler("DDIM, eta = 0.5")
    assert method.knobs == (("eta", 0.5),)
    drawn = method(denoise, start(), LEVELS, noise=noise)
    assert torch.equal(drawn, ddim(denoise, start(), LEVELS, noise=noise, eta=0.5))
    assert not torch.equal(drawn, ddim(denoise, start(), LEVELS))
    again = method(denoise, start(), LEVELS, noise=noise, eta=0.0)
    assert torch.equal(again, ddim(denoise, start(), LEVELS)), "what the call says goes before"
    assert find_sampler("ddim") is SAMPLERS["ddim"]


def test_a_name_of_another_tool_takes_knobs_too() -> None:
    method = find_sampler("DPM++ 2M SDE Karras,s_noise=1.003,solver_type=heun")
    assert method.run is SAMPLERS["dpmpp_2m_sde"].run
    assert dict(method.knobs) == {"s_noise": 1.003, "solver_type": "heun"}


@pytest.mark.parametrize("name", NOISE_KNOBS)
def test_the_noise_knob_decides_whether_noise_is_needed(name: str) -> None:
    knob = SAMPLERS[name].noise_knob
    off, on = find_sampler(f"{name},{knob}=0"), find_sampler(f"{name},{knob}=1")
    assert not off.noise
    assert on.noise
    assert off(denoise, start(), LEVELS).isfinite().all()
    with pytest.raises(UserError, match="pass noise="):
        on(denoise, start(), LEVELS)


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - set(NOISE_KNOBS)))
def test_others_need_it_always_or_never(name: str) -> None:
    if not SAMPLERS[name].noise:
        assert SAMPLERS[name](denoise, start(), LEVELS).isfinite().all()
        return
    with pytest.raises(UserError, match="pass noise="):
        SAMPLERS[name](denoise, start(), LEVELS)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_default_may_be_written_out(name: str) -> None:
    """So no knob is of a kind that text cannot set, and none fails the check of its own default."""
    knobs = settable(SAMPLERS[name].run)
    written = ",".join([name, *(f"{key}={p.default}" for key, p in knobs.items())])
    method = find_sampler(written)
    assert dict(method.knobs) == {key: p.default for key, p in knobs.items()}
    assert method.noise == SAMPLERS[name].noise
    assert canonical(written) == name


def test_one_way_to_write_it() -> None:
    assert canonical("k_uni_pc, variant=bh1 , order=2") == canonical("unipc,order=2,variant=bh1")
    assert canonical("unipc,order=2,variant=bh1") == "unipc,order=2,variant=bh1"
    assert canonical("DDIM,eta=.50,s_noise=1") == "ddim,eta=0.5"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ddim,etta=0.5", "--sampler ddim,etta=0.5: ddim has no 'etta': did you mean 'eta'\\? it has eta, s_noise"),
        ("dpmpp_2m,eta=1", "dpmpp_2m has no 'eta': dpmpp_2m has nothing to set"),
        ("ddim,noise=1", "ddim has no 'noise'"),
        ("ddpm,log_variance=1", "ddpm has no 'log_variance'"),
        ("ddim,eta", "write eta=VALUE, once"),
        ("ddim,eta=", "write eta=VALUE, once"),
        ("ddim,eta=0,eta=1", "write eta=VALUE, once"),
        ("ddim,eta=much", "eta=much: give a number"),
        ("ddim,eta=nan", "eta=nan: give a number"),
        ("unipc,order=2.5", "order=2.5: give a whole number"),
        ("ddim,eta=1.5", "--sampler ddim,eta=1.5: eta 1.5: choose it between 0"),
        ("unipc,order=4", "order 4 of unipc: choose 1, 2 or 3"),
        ("euler,s_churn=-1", "s_churn -1.0: it must not be negative"),
        ("dpm_adaptive,rtol=0", "rtol 0.0"),
        ("lcm,s_noise=inf", "nothing finite comes of it"),
        ("eular,eta=1", "unknown sampler .* did you mean 'euler'"),
        ("", "unknown sampler ''"),
    ],
)
def test_mistakes_are_said_before_anything_is_drawn(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        find_sampler(text)
    assert "\n" not in str(caught.value)
