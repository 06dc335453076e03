"""From requests to a fitted schedule, and from there to pictures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from latentgen.core.errors import UserError
from latentgen.formats.model import Model
from latentgen.formats.model_folder import save_model
from latentgen.pipelines.fit_schedule import fit_schedule
from latentgen.pipelines.generate import Request, check, generate, prepare, remarks

ASKED = [Request(prompt, seed=i, num_inference_steps=3, height=16, width=16) for i, prompt in enumerate(("a", "b"))]


def test_fitted_levels_are_those_drawn_with(tiny: Model) -> None:
    fit = fit_schedule(tiny, ASKED, reference_steps=3, rounds=1)
    assert len(fit.sigmas) == 4
    assert fit.error <= fit.start_error
    entry = {"sampler": "dpmpp_2m", "steps": 3, "sigmas": fit.sigmas.tolist()}
    model = dataclasses.replace(tiny, metadata={"fitted_schedules": [entry]})
    wanted = [dataclasses.replace(request, schedule="fitted", sampler="DPM++ 2M") for request in ASKED]
    torch.testing.assert_close(prepare(model, wanted)[2], fit.sigmas)
    fitted, plain = (next(generate(model, requests)).tobytes() for requests in (wanted, ASKED))
    assert (fitted == plain) == (fit.start == "karras" and fit.error == fit.start_error)
    with pytest.raises(UserError, match="fit-schedule"):
        check(dataclasses.replace(wanted[0], num_inference_steps=4), model)
    with pytest.raises(UserError, match="fit-schedule"):
        check(wanted[0], tiny)


def test_the_guidance_it_is_fitted_with_is_that_of_the_requests(tiny: Model) -> None:
    def fitted(*guidance: str) -> list[float]:
        asked = [dataclasses.replace(request, guidance=guidance) for request in ASKED]
        return fit_schedule(tiny, asked, reference_steps=4, rounds=2).sigmas.tolist()

    assert fitted() == fitted("cfg")
    assert fitted() != fitted("interval,low=0.5,high=3")


def test_autoguidance_is_fitted_with_its_weak_model(tiny: Model, tmp_path: Path) -> None:
    save_model(tiny, tmp_path / "weak")
    guidance = (f"autoguidance,model={tmp_path / 'weak'}",)
    fit = fit_schedule(
        tiny, [dataclasses.replace(request, guidance=guidance) for request in ASKED], reference_steps=3, rounds=1
    )
    assert len(fit.sigmas) == 4


def test_knobs_of_the_sampler_tell_fits_apart(tiny: Model) -> None:
    entry = {"sampler": "unipc,order=2", "steps": 2, "sigmas": [14.0, 1.0, 0.0]}
    model = dataclasses.replace(tiny, metadata={"fitted_schedules": [entry]})
    wanted = dataclasses.replace(ASKED[0], schedule="fitted", num_inference_steps=2, sampler="uni-pc, order=2")
    check(wanted, model)
    with pytest.raises(UserError, match="no schedule was fitted for unipc with 2 steps"):
        check(dataclasses.replace(wanted, sampler="unipc"), model)


def test_other_guidance_than_it_was_fitted_with_is_remarked(tiny: Model) -> None:
    entry = {"sampler": "dpmpp_2m", "steps": 3, "guidance_scale": 4.0, "sigmas": [14.0, 3.0, 1.0, 0.0]}
    model = dataclasses.replace(tiny, metadata={"fitted_schedules": [entry]})
    wanted = dataclasses.replace(ASKED[0], schedule="fitted", guidance_scale=4.0)
    assert not remarks(wanted, model)
    assert not remarks(ASKED[0], model)
    for changes, said in (
        ({"guidance_scale": 7.0}, "with cfg of scale 4, not with cfg of scale 7"),
        ({"guidance": ("interval,low=1",)}, "not with cfg; interval,low=1.0 of scale 4"),
    ):
        (line,) = remarks(dataclasses.replace(wanted, **changes), model)
        assert said in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "euler_ancestral"}, "without noise"),
        ({"sampler": "ddim,eta=0.5"}, "--sampler ddim,eta=0.5: it adds noise"),
        ({"sampler": "dpm_adaptive"}, "chooses its steps itself"),
        ({"guidance": ("adaptive",)}, "--guidance adaptive: it remembers earlier steps"),
        ({"guidance": ("apg",)}, "--guidance apg: it remembers earlier steps"),
        ({"guidance": ("cfgpp",), "sampler": "euler", "guidance_scale": 0.5}, "--guidance cfgpp: its scale follows"),
        ({"guidance": ("zero_init",), "sampler": "euler"}, "--guidance zero_init: it leaves out"),
    ],
)
def test_what_cannot_be_fitted_is_said(tiny: Model, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit_schedule(tiny, [dataclasses.replace(ASKED[0], **changes)])


def test_compositions_of_one_fit_have_the_same_weights(tiny: Model) -> None:
    asked = [dataclasses.replace(ASKED[0], prompt=prompt, guidance=("compose",)) for prompt in ("a AND b:0.5", "c")]
    with pytest.raises(UserError, match="compose: give prompts that all have the same weights"):
        fit_schedule(tiny, asked)


def test_mistakes(tiny: Model) -> None:
    for changes, message in (({"reference_steps": 0}, "--reference-steps 0"), ({"rounds": 0}, "--rounds 0")):
        with pytest.raises(UserError, match=message):
            fit_schedule(tiny, ASKED, **changes)
    with pytest.raises(UserError, match="karras"):
        check(dataclasses.replace(ASKED[0], sampler="DPM++ 2M Karras", schedule="fitted"), tiny)
