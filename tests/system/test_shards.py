"""Training from tar shards: two processes with two workers each see what the order says, and mistakes are one line."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from worlds import RECORDED, ROOT, launch, read_draws

from latentgen.recipe import sources
from latentgen.recipe.load import load_recipe

EMOJI = ROOT.parent / "shared" / "data" / "emoji128"
SMALL = ("train.steps=3", "autoencoder.train.steps=3", "text_encoder.train.steps=3", "data.workers=2")


def train_in_two(words, environment, folder):
    """Train with two processes; what they drew."""
    command = [*launch("accelerate"), str(RECORDED), *map(str, words), "train.processes=2"]
    env = {**environment, "DRAWS_FOLDER": str(folder / "draws")}
    done = subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr
    assert len(list((folder / "draws").iterdir())) == 2, "two processes"
    return read_draws(folder / "draws")


def test_two_processes_with_two_workers_train_from_shards(programs, mini, environment, tmp_path, monkeypatch):
    recipe = mini(tmp_path)
    made = programs("data", "shard", recipe, tmp_path / "shards", "--size", "20KiB", cwd=tmp_path)
    assert made.code == 0, made.err
    assert "24 pictures" in made.out
    assert len(list((tmp_path / "shards").glob("*.tar"))) > 1
    data = ("data.source=shards", f"data.path={tmp_path}/shards/train-*.tar", "data.window=1", *SMALL)
    draws = train_in_two(("--config", recipe, *data), environment, tmp_path)
    monkeypatch.chdir(tmp_path)
    source = sources.examples(load_recipe(recipe, data)).training
    for stage in ("vae", "clip", "unet"):
        expected = source.order(8).at(range(3 * 8), 0, stage)
        assert tuple(draws[stage, step, row]["example"] for step in range(3) for row in range(8)) == expected


@pytest.mark.skipif(not EMOJI.is_dir(), reason="needs ../shared/data/emoji128")
def test_real_pictures_in_shards(mini, environment, tmp_path):
    data = ["data.source=shards", f"data.path={EMOJI}/train-0000{{5..6}}.tar", "data.resolution=32", *SMALL]
    draws = train_in_two(("--config", mini(tmp_path), *data), environment, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "runs/mini/metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines if line["kind"] == "train"} == {"vae", "clip", "unet"}
    assert (tmp_path / "runs/mini/model/model_index.json").is_file()
    assert len({row["example"] for row in draws.values()}) > 20


def test_mistakes_are_one_line(programs, mini, tmp_path):
    recipe = mini(tmp_path)
    for words, told in (
        (("train", "--config", recipe, "data.source=shards", "data.path=none-{0..1}.tar"), "none-0.tar: no such shard"),
        (("data", "shard", tmp_path / "gone", tmp_path / "out"), "gone"),
        (("data", "shard", recipe, tmp_path / "out", "--size", "much"), "--size much: write a size"),
    ):
        done = programs(*words, cwd=tmp_path)
        assert done.code == 2, done.err
        assert told in done.errors[-1]
        assert "Traceback" not in done.err
    assert not Path(tmp_path / "runs").exists()
