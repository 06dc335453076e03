"""A folder of pictures of many shapes, from files to a model: the same draws and the same bytes however it is run."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from worlds import RECORDED, launch, read_draws

STEP, KILL, INT = "latentgen.engine.step:Stepper.__call__", int(signal.SIGKILL), int(signal.SIGINT)
SIZES = [(64, 96), (96, 64), (70, 100), (80, 80), (50, 72), (100, 66), (64, 64), (90, 62), (40, 40)]
WORDS = ["name=own", "data.source=folder", "data.buckets=3", "data.bucket_step=16", "data.max_upscale=1.2"]
KINDS = {"cached": ["autoencoder.from=MODEL", "text_encoder.from=MODEL"],
         "live": ["data.crop=random", "data.mask=beside", "data.mask_floor=0.1"]}  # fmt: skip
"""Cut in their middle, latents kept; all three networks on what is cut anew each time, weighed by masks."""
STAGES = {"cached": ("unet",), "live": ("vae", "clip", "unet")}
STOPS = {"cached": [(STEP, 5, KILL)], "live": [(STEP, 8, KILL), (STEP, 9, INT)]}
"""Function, call and signal: the U-Net in its second epoch; CLIP in its first, then the U-Net in its second."""


def write(folder: Path, numbers: range) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(numbers.start)
    for number in numbers:
        height, width = SIZES[number % len(SIZES)]
        levels = rng.integers(0, 255, (height // 2, width // 2, 3), dtype=np.uint8)
        picture = Image.fromarray(levels).resize((width, height))
        picture.save(folder / f"{number:02d}.png")
        picture.convert("L").save(folder / f"{number:02d}.mask.png")
        (folder / f"{number:02d}.txt").write_text(f"picture number {number}\n")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """18 pictures of nine sizes, and 7 to validate on."""
    folder = tmp_path_factory.mktemp("varied")
    write(folder / "train", range(18))
    write(folder / "validation", range(20, 27))
    return folder


class Own:
    """Runs of one kind; `whole` is trained without interruption."""

    def __init__(self, kind, programs, mini, pictures, model, folder):
        self.kind, self.programs, self.mini, self.folder = kind, programs, mini, folder
        own = [f"data.path={pictures / 'train'}", f"data.validation={pictures / 'validation'}"]
        self.words = [*WORDS, *own, *(word.replace("MODEL", str(model)) for word in KINDS[kind])]

    def command(self, name):
        return ["--config", str(self.mini(self.folder / name)), *self.words]

    def train(self, name, code=0, **hooks):
        done = self.programs("train", *self.command(name), cwd=self.folder / name, **hooks)
        assert done.code == code, done.err
        return done

    def run(self, name):
        return self.folder / name / "runs/own"

    def draws(self, name):
        return read_draws(self.folder / name / "draws")


@pytest.fixture(scope="module", params=KINDS)
def own(request, programs, mini, pictures, model, tmp_path_factory):
    made = Own(request.param, programs, mini, pictures, model, tmp_path_factory.mktemp(request.param))
    made.said = made.train("whole", draws=str(made.folder / "whole/draws")).errors
    return made


def test_shapes_and_what_they_cost_are_told(own):
    shapes = [line for line in own.said if "shapes of pictures" in line]
    assert len(shapes) == 1
    assert "64 x 64 (6)" in shapes[0]
    assert "48 x 80 (6), " in shapes[0]
    assert "80 x 48 (6)" in shapes[0]
    (enlarged,) = [line for line in own.said if "data.max_upscale" in line]
    assert "2 of 18 pictures" in enlarged
    assert "08.png, 1.6 times" in enlarged
    sizes = json.loads((own.run("whole") / "sizes.json").read_text())
    assert sizes["shapes"] == [[80, 48, 6], [64, 64, 6], [48, 80, 6]]
    assert sum(row[2] for row in sizes["pictures"]) == 18
    assert "Sizes of pictures" in (own.run("whole") / "report.html").read_text()
    if own.kind == "live":
        with Image.open(own.run("whole") / "samples/vae/00000003.png") as sheet:
            assert sheet.height > 2 * 2 * 80, "the tallest pictures fit"


def test_every_example_is_drawn(own):
    draws, stages = own.draws("whole"), STAGES[own.kind]
    assert set(draws) == {(stage, step, row) for stage in stages for step in range(6) for row in range(8)}
    for stage in stages:
        epoch = {draws[stage, step, row]["example"] for step in range(3) for row in range(8)}
        assert epoch == set(range(18)), "an epoch is a batch of each shape: 6 of its pictures, and 2 again"


def test_pictures_are_cut_anew_each_time(own):
    if own.kind == "cached":
        pytest.skip("latents are kept")
    shown = {}
    for row in own.draws("whole").values():
        if "loss_mask" in row:
            shown.setdefault(row["example"], set()).add((row["image"], row["loss_mask"]))
    assert max(map(len, shown.values())) > 2, "more than mirror images"


def test_a_stopped_run_ends_in_the_same_bytes(own, weights, measured):
    for place, call, number in STOPS[own.kind]:
        own.train("stopped", -KILL if number == KILL else 75, kill=[place, call, number])
    own.train("stopped")
    assert weights(own.run("stopped")) == weights(own.run("whole"))
    assert measured(own.run("stopped")) == measured(own.run("whole"))


def test_two_processes_draw_and_train_alike(own, measured, environment):
    if own.kind == "cached":
        pytest.skip("a run of minutes less; what processes share of latents is tested elsewhere")
    (own.folder / "two").mkdir()
    command = [*launch("torchrun"), str(RECORDED), *own.command("two"), "train.processes=2", "data.workers=1"]
    env = {**environment, "DRAWS_FOLDER": str(own.folder / "two/draws")}
    done = subprocess.run(
        command, cwd=own.folder / "two", env=env, text=True, capture_output=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert own.draws("two") == own.draws("whole")
    one, two = measured(own.run("whole")), measured(own.run("two"))
    assert one.keys() == two.keys()
    for key, values in one.items():
        # In noise CLIP's gradients are large: what float32 sums differ by grows a hundredfold with every step.
        relative = 1e-2 if key[0] == "clip" else 1e-4
        for name in values.keys() & {"loss", "held_out/loss", "seen/loss"}:
            assert values[name] == pytest.approx(two[key][name], rel=relative), (key, name)
