"""Text encoders that run in the step read what `Model.encode` reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny as families
import torch

from latentgen.diffusion.losses import WEIGHTS
from latentgen.diffusion.noise_levels import uniform
from latentgen.formats.model_folder import load_model
from latentgen.tasks.diffusion import DiffusionTask, Objective
from latentgen.tasks.token_ids import TokenIds

CAPTIONS = ["a red circle", "", "a blue star above a green heart, blurry, dark, a red star", "a (red:1.3) star"]


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@torch.no_grad()
def test_the_step_reads_what_the_model_encodes(family: str, chunks: int, tmp_path: Path) -> None:
    model = replace(load_model(families.saved(family, tmp_path / "model")), chunks=chunks)
    batch = TokenIds({tower.name: tower.tokenizer for tower in model.towers}, chunks)(CAPTIONS)
    batch["sizes"] = torch.zeros(len(CAPTIONS), model.sizes)
    objective = Objective(model.parameterization(), uniform, WEIGHTS["unit"])
    task = DiffusionTask(model, objective, [], columns=1)
    context, expected = task._context(model.networks(), batch), model.encode(CAPTIONS)
    assert torch.equal(context.states, expected.states)
    if expected.pooled is not None:
        assert context.pooled is not None
        assert torch.equal(context.pooled, expected.pooled)
