"""One process and two make the same draws and the same losses; worlds that are not as asked for are refused."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from worlds import RECORDED, ROOT, launch, read_draws


def same_losses(one: dict, two: dict, relative: float) -> None:
    assert one.keys() == two.keys()
    assert {stage for stage, kind, _ in one if kind == "train"} == {"vae", "clip", "unet"}
    for key, values in one.items():
        assert values.keys() == two[key].keys()
        if key[1] == "train":
            for name in ("loss", "learning_rate"):
                assert math.isclose(values[name], two[key][name], rel_tol=relative), (key, name, values, two[key])


def complete(draws: dict[tuple[str, int, int], dict[str, object]]) -> None:
    """The recorder saw every row of every step, and the options that it is there for happened."""
    assert set(draws) == {
        (stage, step, row) for stage in ("vae", "clip", "unet") for step in range(6) for row in range(8)
    }
    unet = [row for (stage, _, _), row in draws.items() if stage == "unet"]
    assert {"example", "mirrored", "caption_row", "dropped", "noise", "posterior", "sigma"} == set(unet[0])
    for option in ("mirrored", "dropped"):
        assert {row[option] for row in unet} == {True, False}
    assert len({row["noise"] for row in unet}) == len(unet) == len({row["sigma"] for row in unet})


@pytest.mark.parametrize("kind", ["torchrun", "accelerate", "fsdp2"])
def test_two_processes_train_like_one(kind, mini, trained, measured, environment, tmp_path):
    recipe = mini(tmp_path)
    command = [*launch(kind), str(RECORDED), "--config", str(recipe), "train.processes=2"]
    env = {**environment, "DRAWS_FOLDER": str(tmp_path / "draws")}
    done = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "draws").iterdir())) == 2, "two processes"
    one, two = read_draws(trained / "draws"), read_draws(tmp_path / "draws")
    complete(one)
    assert two == one
    same_losses(measured(trained / "runs/mini"), measured(tmp_path / "runs/mini"), 1e-5)
    assert done.stderr.count("the model is in") == 1, "one process speaks"
    assert ("cut over 2 processes" in done.stderr) == (kind == "fsdp2")


@pytest.mark.parametrize("learned", ["diffusion.density=importance", "diffusion.balanced=true"])
def test_levels_learned_along_are_the_same_in_every_process(learned, programs, mini, measured, environment, tmp_path):
    """What is learned is a small network that is never cut, beside one that is."""
    alone = programs("train", "--config", mini(tmp_path / "one"), learned, cwd=tmp_path / "one")
    assert alone.code == 0, alone.err
    command = [*launch("fsdp2"), str(RECORDED), "--config", str(mini(tmp_path / "two")), "train.processes=2", learned]
    env = {**environment, "DRAWS_FOLDER": str(tmp_path / "draws")}
    done = subprocess.run(
        command, cwd=tmp_path / "two", env=env, text=True, capture_output=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    # What is learned of levels goes back into which are drawn, and rounding with it.
    same_losses(measured(tmp_path / "one/runs/mini"), measured(tmp_path / "two/runs/mini"), 3e-5)


def test_micro_batches_train_like_the_whole_batch(programs, mini, trained, measured, tmp_path):
    words = ("train.micro_batch=4", "autoencoder.train.micro_batch=2")
    done = programs("train", "--config", mini(tmp_path), *words, cwd=tmp_path, draws=str(tmp_path / "draws"))
    assert done.code == 0, done.err
    assert read_draws(tmp_path / "draws") == read_draws(trained / "draws")
    same_losses(measured(trained / "runs/mini"), measured(tmp_path / "runs/mini"), 1e-5)


@pytest.mark.parametrize("kind", ["torchrun", "fsdp2"])
def test_two_processes_stop_together_and_one_goes_on(kind, programs, mini, trained, measured, environment, tmp_path):
    words = ["--config", str(mini(tmp_path))]
    command = [*launch(kind), str(RECORDED), *words]
    env = {**environment, "DRAWS_FOLDER": str(tmp_path / "draws"), "STOP": "1 2"}
    done = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True, check=False, timeout=240)
    assert done.returncode != 0
    assert done.stderr.count("stopped after step 2 of 6, saved; the same command continues") == 1, done.stderr
    assert "Traceback" not in done.stderr.partition("the same command continues")[0]
    assert [path.name for path in (tmp_path / "runs/mini/checkpoints/vae").iterdir()] == ["00000002"]
    alone = programs("train", *words, cwd=tmp_path)
    assert alone.code == 0, alone.err
    same_losses(measured(trained / "runs/mini"), measured(tmp_path / "runs/mini"), 1e-5)


def test_the_launcher_that_silently_starts_one_process_is_refused(mini, environment, tree, tmp_path):
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    recipe = mini(tmp_path)
    before = tree(tmp_path)
    command = [accelerate, "launch", "--cpu", "--num_processes", "2", str(ROOT / "train.py"), "--config", str(recipe)]
    env = {**environment, "HF_HOME": os.devnull}  # no defaults from this machine's user
    done = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True, check=False, timeout=120)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, done.stderr
    assert "asked for 2 processes, 1 found" in said[0]
    assert "accelerate launch --config_file configs/accelerate/two-cpu.yaml train.py" in said[0]
    assert "returned non-zero exit status 2" in done.stderr, done.stderr
    assert tree(tmp_path) == before
