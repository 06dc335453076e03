"""Fitted schedules in the model folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from latentgen.core.errors import UserError
from latentgen.formats.fitted_schedules import find_fitted, write_fitted
from latentgen.formats.model import Model
from latentgen.formats.model_folder import METADATA, load_metadata, save_model


def entry(sampler: str = "dpmpp_2m", steps: int = 2, middle: float = 1.0) -> dict[str, object]:
    return {"sampler": sampler, "steps": steps, "guidance_scale": 4.0, "sigmas": [14.0, middle, 0.0]}


def test_written_found_and_replaced(tiny: Model, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model(tiny, folder)
    before = json.loads((folder / METADATA).read_text())
    for each in (entry(), entry("heun"), entry(middle=2.0)):
        write_fitted(folder, each)
    after = json.loads((folder / METADATA).read_text())
    assert len(after["metadata"].pop("fitted_schedules")) == 2
    assert after == before
    metadata = load_metadata(folder)
    assert torch.equal(find_fitted(metadata, "dpmpp_2m", 2).sigmas, torch.tensor([14.0, 2.0, 0.0]))
    assert torch.equal(find_fitted(metadata, "heun", 2).sigmas, torch.tensor([14.0, 1.0, 0.0]))
    (folder / METADATA).unlink()  # as other tools write folders
    write_fitted(folder, entry())
    assert len(find_fitted(load_metadata(folder), "dpmpp_2m", 2).sigmas) == 3


def test_mistakes(tmp_path: Path) -> None:
    metadata = {"fitted_schedules": [entry()]}
    with pytest.raises(UserError, match="dpmpp_2m with 2 steps"):
        find_fitted(metadata, "dpmpp_2m", 3)
    with pytest.raises(UserError, match=r"none.*fit-schedule"):
        find_fitted({}, "heun", 8)
    for sigmas in ([14.0, 0.0], [14.0, 15.0, 0.0], [14.0, 1.0, 0.5], [], "14, 1, 0", [float("inf"), 1.0, 0.0], None):
        with pytest.raises(UserError, match="broken"):
            find_fitted({"fitted_schedules": [{**entry(), "sigmas": sigmas}]}, "dpmpp_2m", 2)
    with pytest.raises(UserError):
        write_fitted(tmp_path / "nothing", entry())


def test_each_guidance_has_its_own() -> None:
    def fitted(middle: float, **guidance: object) -> dict:
        return {**entry(middle=middle), **guidance}

    metadata = {
        "fitted_schedules": [
            entry(middle=1.0),  # of scale 4, and of no guidance by name, as it was first written
            fitted(2.0, guidance_scale=8.0, guidance=["cfg"]),
            fitted(3.0, guidance_scale=8.0, guidance=["cfg", "interval"]),
        ]
    }

    def middle(*guidance: object) -> float:
        return float(find_fitted(metadata, "dpmpp_2m", 2, *guidance).sigmas[1])  # type: ignore[arg-type]

    assert middle(4.0) == 1.0
    assert middle(8.0) == 2.0
    assert middle(8.0, ("cfg", "interval")) == 3.0
    assert middle(5.0) == 1.0, "the nearest scale"
    assert middle(7.0) == 2.0
    found = find_fitted(metadata, "dpmpp_2m", 2, 5.0, ("cfg", "interval"))
    assert (found.guidance_scale, found.guidance) == (8.0, ("cfg", "interval")), "the same guidance before the scale"
