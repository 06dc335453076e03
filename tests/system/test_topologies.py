"""However a batch is spread over processes and micro-batches, each example gets the same draws and losses agree."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
from worlds import RECORDED, launch, read_draws

STEPS, BATCH = 20, 4
RECIPE = """\
name: spread
seed: 5
data: {{size: 40, captions: 2, holdout: 4, flip: true, cache: {folder}/cache}}
autoencoder: {autoencoder}
text_encoder: {{from: {model}}}
unet: {{channels: [16, 16], layers_per_block: 1, heads: 2, norm_groups: 8}}
diffusion: {{caption_dropout: 0.3}}
train: {{steps: 20, global_batch: 4, learning_rate: 1.0e-5, warmup_steps: 1, log_every: 1, save_every: 7,
  validate_every: 0, trackers: []}}
preview: {{every: 100, num: 1, num_inference_steps: 1, prompts: ["a red circle"]}}
"""
"""At a rate of fine-tuning: float32 sums in another order differ in their last bit, and training itself makes that
grow, the faster the higher the rate (at 1e-3 to some 1e-5 of the loss in these 20 steps)."""
AUTOENCODERS = {
    "vae": "{{channels: [4, 4, 8, 8], latent_channels: 4, norm_groups: 4, train: {{steps: 20, global_batch: 4}}}}",
    "unet": "{{from: {model}}}",
}
"""By the stage that is compared. A last bit of the VAE's weights now and then turns a cached latent (float16) to its
neighbour, a thousandth away: U-Nets agree as well as their latents do, so theirs come from one VAE."""
RELATIVE = {"loss": 1e-6, "grad_norm": 1e-4}


class Worlds:
    """Trains the recipe in one process or two."""

    def __init__(self, stage: str, programs: Any, model: Path, environment: dict[str, str], folder: Path) -> None:
        self.stage, self.programs, self.environment, self.folder = stage, programs, environment, folder
        self.recipe = folder / "spread.yaml"
        autoencoder = AUTOENCODERS[stage].format(model=model)
        self.recipe.write_text(RECIPE.format(folder=folder, model=model, autoencoder=autoencoder))

    def train(self, processes: int, micro: int, run: str, stop: int | None = None) -> None:
        """`stop`: one process is asked to stop in that step, counted from this start; then exactly that happens."""
        where = self.folder / run
        words = ["--config", str(self.recipe), "--runs", str(where), f"train.micro_batch={micro}"]
        draws = str(where / "draws")
        if processes == 1:
            hook = {} if stop is None else {"kill": ["latentgen.engine.step:Stepper.__call__", stop, 15]}
            done = self.programs("train", *words, cwd=self.folder, draws=draws, **hook)
            assert done.code == (0 if stop is None else 75), done.err
            return
        env = {**self.environment, "DRAWS_FOLDER": draws, **({} if stop is None else {"STOP": f"1 {stop}"})}
        command = [*launch("torchrun"), str(RECORDED), *words]
        done = subprocess.run(
            command, cwd=self.folder, env=env, text=True, capture_output=True, check=False, timeout=240
        )
        assert (done.returncode == 0) == (stop is None), done.stderr
        assert ("the same command continues" in done.stderr) == (stop is not None), done.stderr

    def measured(self, run: str) -> dict[tuple[int, str], float]:
        lines = (self.folder / run / "spread/metrics.jsonl").read_text().splitlines()
        found = [line for line in map(json.loads, lines) if line["kind"] == "train"]
        assert len({(line["stage"], line["step"]) for line in found}) == len(found)
        own = [line for line in found if line["stage"] == self.stage]
        return {(line["step"], name): line[name] for line in own for name in RELATIVE}

    def draws(self, run: str) -> dict[Any, dict[str, object]]:
        return read_draws(self.folder / run / "draws")


@pytest.fixture(scope="module", params=AUTOENCODERS)
def worlds(request: Any, programs: Any, model: Path, environment: dict[str, str], tmp_path_factory: Any) -> Worlds:
    made = Worlds(request.param, programs, model, environment, tmp_path_factory.mktemp("worlds"))
    made.train(1, BATCH, "whole")
    return made


def test_the_one_that_others_are_compared_with_saw_everything(worlds: Worlds) -> None:
    draws, stages = worlds.draws("whole"), {"vae": ("vae", "unet"), "unet": ("unet",)}[worlds.stage]
    assert set(draws) == {(stage, step, row) for stage in stages for step in range(STEPS) for row in range(4)}
    unet = [values for (stage, _, _), values in draws.items() if stage == "unet"]
    assert all(
        set(values) == {"example", "mirrored", "caption_row", "dropped", "noise", "posterior", "sigma"}
        for values in unet
    )
    assert len({values["noise"] for values in unet}) == STEPS * BATCH
    assert {values["dropped"] for values in unet} == {values["mirrored"] for values in unet} == {True, False}
    assert worlds.measured("whole").keys() == {(step + 1, name) for step in range(STEPS) for name in RELATIVE}


def agree(worlds: Worlds, run: str) -> None:
    assert worlds.draws(run) == worlds.draws("whole")
    whole, found = worlds.measured("whole"), worlds.measured(run)
    assert found.keys() == whole.keys()
    for key, value in whole.items():
        assert math.isclose(found[key], value, rel_tol=RELATIVE[key[1]]), (key, found[key], value)


@pytest.mark.parametrize(("processes", "micro"), [(1, 2), (1, 1), (2, 2), (2, 1)])
def test_topologies_draw_and_train_alike(processes: int, micro: int, worlds: Worlds) -> None:
    run = f"{processes}x{micro}"
    worlds.train(processes, micro, run)
    agree(worlds, run)


def test_from_two_processes_to_one_and_back(worlds: Worlds) -> None:
    worlds.train(2, 2, "moved", stop=6)
    worlds.train(1, 2, "moved", stop=5)
    worlds.train(2, 1, "moved", stop=5)
    # The step before the last four, or in the run that trains both the U-Net's tenth.
    worlds.train(1, 4, "moved", stop={"vae": 14, "unet": 2}[worlds.stage])
    worlds.train(2, 2, "moved")
    agree(worlds, "moved")
