"""Wrappers: when guidance works, what it is fed, and what comes out."""

from __future__ import annotations

import math

import pytest
import torch

from latentgen.core.errors import UserError
from latentgen.diffusion.guidance.driver import State
from latentgen.diffusion.guidance.rules import CFG, CFGPP
from latentgen.diffusion.guidance.wrappers import (
    PAG,
    Adaptive,
    Autoguidance,
    Compose,
    Interval,
    Rescale,
    Threshold,
    ZeroInit,
)
from latentgen.diffusion.samplers import euler


def randoms(*kinds: str, batch: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {kind: torch.randn(batch, 3, 4, 4, generator=generator) for kind in kinds}


def combine(guidance, predictions, sigma=None, state: State | None = None, x=None) -> torch.Tensor:
    first = next(iter(predictions.values()))
    x = torch.zeros_like(first) if x is None else x
    sigma = torch.ones(len(first)) if sigma is None else sigma
    return guidance.combine(predictions, x, sigma, {} if state is None else state)


def asked(guidance, *levels: float, state: State | None = None) -> dict[str, list[bool]]:
    needs = guidance.needs(torch.tensor(levels), {} if state is None else state)
    return {kind: mask.tolist() for kind, mask in needs.items()}


# --- autoguidance and pag ---------------------------------------------------------------------------------------------


def test_autoguidance_is_cfg_away_from_the_weak_network() -> None:
    made = randoms("cond", "weak")
    guidance = Autoguidance(CFG(2.0), model="folder")
    assert asked(guidance, 1.0) == {"cond": [True], "weak": [True]}
    assert torch.equal(combine(guidance, made), combine(CFG(2.0), {"cond": made["cond"], "uncond": made["weak"]}))
    with pytest.raises(UserError, match="autoguidance,model=FOLDER"):
        Autoguidance(CFG(2.0))


def test_pag_adds_its_own_difference() -> None:
    made = randoms("cond", "uncond", "weak")
    expected = combine(CFG(4.0), made) + 1.5 * (made["cond"] - made["weak"])
    torch.testing.assert_close(combine(PAG(CFG(4.0), scale=1.5), made), expected)
    assert asked(PAG(CFG(4.0)), 1.0) == {"cond": [True], "uncond": [True], "weak": [True]}
    assert asked(PAG(CFG(1.0)), 1.0) == {"cond": [True], "weak": [True]}
    assert asked(PAG(CFG(4.0), scale=0.0), 1.0) == asked(CFG(4.0), 1.0)
    with pytest.raises(UserError, match="pag: scale=-1"):
        PAG(CFG(4.0), scale=-1.0)


# --- interval ---------------------------------------------------------------------------------------------------------


def test_interval_is_open_below_and_closed_above() -> None:
    guidance = Interval(CFG(4.0), low=0.5, high=2.0)
    assert asked(guidance, 0.4, 0.5, 0.6, 2.0, 2.1) == {
        "cond": [True] * 5,
        "uncond": [False, False, True, True, False],
    }


def test_outside_the_interval_the_conditional_prediction_stands_exactly() -> None:
    made = randoms("cond", "uncond")
    guidance = Interval(CFG(4.0), low=0.5, high=2.0)
    mixed = combine(guidance, made, torch.tensor([1.0, 3.0]))
    assert torch.equal(mixed[0], combine(CFG(4.0), made)[0])
    assert torch.equal(mixed[1], made["cond"][1])
    assert combine(guidance, {"cond": made["cond"]}, torch.tensor([3.0, 3.0])) is made["cond"]


@pytest.mark.parametrize("limits", [(2.0, 1.0), (1.0, 1.0), (-1.0, 1.0), (math.nan, 1.0)])
def test_interval_refuses(limits: tuple[float, float]) -> None:
    with pytest.raises(UserError, match="choose noise levels 0 <= low < high"):
        Interval(CFG(4.0), *limits)


# --- adaptive ---------------------------------------------------------------------------------------------------------


def test_adaptive_decides_for_each_picture_and_for_good() -> None:
    made = randoms("cond", "uncond")
    made["uncond"][1] = made["cond"][1] * 1.0001  # the second picture's predictions agree
    guidance, state = Adaptive(CFG(4.0), threshold=0.99), {}
    assert asked(guidance, 1.0, 1.0, state=state)["uncond"] == [True, True]
    first = combine(guidance, made, state=state)
    assert torch.equal(first, combine(CFG(4.0), made)), "the decision holds from the next evaluation on"
    assert asked(guidance, 1.0, 1.0, state=state) == {"cond": [True, True], "uncond": [True, False]}
    made["uncond"][1] = made["cond"][1]  # what the driver leaves there
    second = combine(guidance, made, state=state)
    assert torch.equal(second[1], made["cond"][1])
    made["uncond"] = -made["cond"]
    combine(guidance, made, state=state)
    assert asked(guidance, 1.0, 1.0, state=state)["uncond"] == [True, False], "it does not come back"


def test_adaptive_measures_the_velocity() -> None:
    """v = (noise - sigma * x0) / sqrt(1 + sigma^2), whose cosine decides; that of the noise would always agree."""
    made, x, sigma = randoms("cond", "uncond"), 50 * randoms("x")["x"], torch.full((2,), 50.0)
    v = {k: (x - p) / 50 - 50 * p for k, p in made.items()}
    cosine = torch.cosine_similarity(v["cond"].flatten(1), v["uncond"].flatten(1))
    noise = {k: (x - p).flatten(1) for k, p in made.items()}
    assert (torch.cosine_similarity(noise["cond"], noise["uncond"]) > 0.99).all()
    for threshold, agreed in ((cosine.min() - 0.01, True), (cosine.max() + 0.01, False)):
        state: State = {}
        combine(Adaptive(CFG(4.0), threshold=float(threshold)), made, sigma, state, x)
        assert state["agreed"].tolist() == [agreed] * 2


def test_adaptive_does_not_decide_where_an_interval_hides_the_other_prediction() -> None:
    made, state = randoms("cond", "uncond"), {}
    made["uncond"][0] = made["cond"][0]  # the driver's stand-in outside the interval
    combine(Adaptive(Interval(CFG(4.0), low=0.5, high=2.0)), made, torch.tensor([3.0, 1.0]), state)
    assert state["agreed"].tolist() == [False, False]


# --- rescale and threshold --------------------------------------------------------------------------------------------


def test_rescale_brings_the_contrast_back() -> None:
    made = randoms("cond", "uncond")
    plain = combine(CFG(7.5), made)
    assert torch.equal(combine(Rescale(CFG(7.5), phi=0.0), made), plain)
    full = combine(Rescale(CFG(7.5), phi=1.0), made)
    torch.testing.assert_close(full.flatten(1).std(dim=1), made["cond"].flatten(1).std(dim=1))
    assert (plain.flatten(1).std(dim=1) > 2 * made["cond"].flatten(1).std(dim=1)).all()
    torch.testing.assert_close(combine(Rescale(CFG(7.5), phi=0.7), made), 0.7 * full + 0.3 * plain)  # eq. 16
    flat = {kind: torch.zeros(1, 1, 2, 2) for kind in made}
    assert torch.equal(combine(Rescale(CFG(7.5)), flat), flat["cond"])
    with pytest.raises(UserError, match=r"phi=1\.5"):
        Rescale(CFG(7.5), phi=1.5)


def test_threshold_clamps_and_shrinks() -> None:
    values = torch.tensor([0.5, -2.0, 4.0, 0.0]).reshape(1, 1, 2, 2)
    small = torch.tensor([0.5, -0.9, 0.1, 0.0]).reshape(1, 1, 2, 2)
    made = {"cond": torch.cat([values, small])}
    out = combine(Threshold(CFG(1.0), percentile=1.0, limit=1.0), made)
    assert torch.equal(out[0], values[0] / 4)
    assert torch.equal(out[1], small[0]), "nothing reaches past the limit"
    out = combine(Threshold(CFG(1.0), percentile=0.5, limit=1.0), made)  # the median of 0, 0.5, 2, 4 is 1.25
    torch.testing.assert_close(out[0].flatten(), torch.tensor([0.4, -1.0, 1.0, 0.0]))
    assert (combine(Threshold(CFG(1.0), percentile=0.9, limit=3.0), {"cond": 9 * values}).abs() <= 3).all()


def test_the_percentile_is_torchs() -> None:
    made = randoms("cond")
    s = torch.quantile(made["cond"].abs().flatten(1), 0.37, dim=1)
    out = combine(Threshold(CFG(1.0), percentile=0.37, limit=1e-3), made)
    expected = torch.stack([one.clamp(-float(t), float(t)) * 1e-3 / t for one, t in zip(made["cond"], s, strict=True)])
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("knobs", [{"percentile": 0.0}, {"percentile": 1.5}, {"limit": 0.0}, {"limit": math.inf}])
def test_threshold_refuses(knobs: dict) -> None:
    with pytest.raises(UserError, match=next(iter(knobs))):
        Threshold(CFG(4.0), **knobs)


# --- composition ------------------------------------------------------------------------------------------------------


def test_one_prompt_composed_is_that_prompt() -> None:
    made = randoms("cond", "uncond")
    assert torch.equal(combine(Compose(CFG(4.0)), made), combine(CFG(4.0), made))
    assert asked(Compose(CFG(1.0)), 1.0) == {"cond": [True]}


def test_composition_is_a_weighted_sum_of_differences() -> None:
    made = randoms("cond", "cond2", "uncond")
    guidance = Compose(CFG(3.0), weights=(1.0, -0.5))
    u = made["uncond"]
    expected = u + 3 * ((made["cond"] - u) - 0.5 * (made["cond2"] - u))
    torch.testing.assert_close(combine(guidance, made), expected)
    assert asked(guidance, 1.0) == {"cond": [True], "cond2": [True], "uncond": [True]}
    # at scale 1 the sum still starts from the unconditional prediction
    alone = Compose(CFG(1.0), weights=(1.0, -0.5))
    assert asked(alone, 1.0)["uncond"] == [True]
    torch.testing.assert_close(combine(alone, made), u + (made["cond"] - u) - 0.5 * (made["cond2"] - u))


def test_a_prompt_cut_in_halves_is_whole() -> None:
    made = randoms("cond", "uncond")
    made["cond2"] = made["cond"]
    torch.testing.assert_close(combine(Compose(CFG(3.0), weights=(0.25, 0.75)), made), combine(CFG(3.0), made))
    with pytest.raises(UserError, match="weights"):
        Compose(CFG(3.0), weights=(math.nan,))


def test_composition_is_what_rescale_compares_with() -> None:
    made = randoms("cond", "cond2", "uncond")
    rescaled = combine(Compose(Rescale(CFG(7.5), phi=1.0), weights=(1.0, 1.0)), made)
    composed = made["cond"] + made["cond2"] - made["uncond"]
    torch.testing.assert_close(rescaled.flatten(1).std(dim=1), composed.flatten(1).std(dim=1))


# --- a frozen start ---------------------------------------------------------------------------------------------------

LEVELS = (8.0, 4.0, 2.0, 1.0, 0.0)


def test_zero_init_leaves_the_flow_path_where_it_is() -> None:
    guidance = ZeroInit(CFG(2.0), levels=LEVELS, steps=2)
    assert asked(guidance, 8.0, 4.0, 2.0) == {"cond": [False, False, True], "uncond": [False, False, True]}
    seen = []

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        frozen = not guidance.needs(sigma, {})["cond"].any()
        return guidance.combine({} if frozen else {"cond": x, "uncond": x}, x, sigma, {})

    x = 9 * randoms("x")["x"]
    euler(denoise, x, torch.tensor(LEVELS), on_step=lambda i, x, x0_hat: seen.append(x / (1 + LEVELS[i + 1])))
    torch.testing.assert_close(seen[0], x / 9)
    torch.testing.assert_close(seen[1], x / 9)
    assert not torch.allclose(seen[2], x / 9)


def test_zero_init_in_a_batch_of_levels() -> None:
    made = randoms("cond", "uncond")
    guidance = ZeroInit(CFG(2.0), levels=LEVELS, steps=1)
    x = randoms("x", seed=3)["x"]
    out = combine(guidance, made, torch.tensor([8.0, 4.0]), x=x)
    torch.testing.assert_close(out[0], x[0] / 9)
    assert torch.equal(out[1], combine(CFG(2.0), made)[1])
    with pytest.raises(UserError, match="zero_init: steps=5"):
        ZeroInit(CFG(2.0), levels=LEVELS, steps=5)
    assert torch.equal(combine(ZeroInit(CFG(2.0), LEVELS, steps=0), made), combine(CFG(2.0), made))


def test_cfgpp_inside_an_interval() -> None:
    made, sigma = randoms("cond", "uncond"), torch.tensor([8.0, 2.0])
    out = combine(Interval(CFGPP(0.5, LEVELS), low=1.0, high=4.0), made, sigma)
    assert torch.equal(out[0], made["cond"][0])
    torch.testing.assert_close(out[1], combine(CFG(0.5 * 2 / 1), made)[1])
