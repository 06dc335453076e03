"""From requests to a fitted schedule, and from there to pictures."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from latentgen.core.errors import UserError
from latentgen.formats.model_folder import Model
from latentgen.pipelines.fit_schedule import fit_schedule
from latentgen.pipelines.generate import Request, check, generate, prepare

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
    assert (fitted == plain) == (fit.start == "trailing" and fit.error == fit.start_error)
    with pytest.raises(UserError, match="fit-schedule"):
        check(dataclasses.replace(wanted[0], num_inference_steps=4), model)
    with pytest.raises(UserError, match="fit-schedule"):
        check(wanted[0], tiny)


def test_mistakes(tiny: Model) -> None:
    with pytest.raises(UserError, match="without noise"):
        fit_schedule(tiny, [dataclasses.replace(ASKED[0], sampler="euler_ancestral")])
    with pytest.raises(UserError, match="karras"):
        check(dataclasses.replace(ASKED[0], sampler="DPM++ 2M Karras", schedule="fitted"), tiny)
