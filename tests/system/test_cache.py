"""`latentgen data cache`: made alone, found by training, packed for another machine, and mistakes in one line."""

from __future__ import annotations

import shutil


def test_training_finds_what_was_cached_alone(programs, mini, trained, tmp_path):
    recipe = mini(tmp_path)
    model = trained / "runs/mini/model"
    caches = f"data.cache={tmp_path / 'caches'}"
    starts = (f"autoencoder.from={model}", f"text_encoder.from={model}", caches, "name=two")
    made = programs("data", "cache", "--config", recipe, *starts, "--pack", tmp_path / "packed", cwd=tmp_path)
    assert made.code == 0, made.err
    folders = [line for line in made.out.splitlines() if "/caches/" in line]
    assert len(folders) == 4, "latents and text states, of training and held-out pictures"
    done = programs("train", "--config", recipe, *starts, cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.err.count("latents: reused") == done.err.count("captions: reused") == 2
    shutil.rmtree(tmp_path / "caches")
    came = programs("data", "cache", caches, "--unpack", tmp_path / "packed", cwd=tmp_path)
    assert came.code == 0, came.err
    assert "4 caches came from" in came.out
    sound = programs("data", "cache", caches, "--verify", cwd=tmp_path)
    assert "4 caches are as they were written" in sound.out
    again = programs("train", "--config", recipe, *starts, "name=three", cwd=tmp_path)
    assert again.code == 0, again.err
    assert again.err.count("latents: reused") == 2
    (values, *_) = sorted((tmp_path / "caches" / "latents").glob("*/values.npy"))
    values.write_bytes(values.read_bytes()[:-2] + b"xx")
    damaged = programs("data", "cache", caches, "--verify", cwd=tmp_path)
    assert damaged.code == 2
    assert "1 of 4 caches are damaged" in damaged.errors[-1]
    pruned = programs("data", "cache", caches, "--prune", 0, cwd=tmp_path)
    assert pruned.out.count("removed") == 4


def test_mistakes_are_one_line(programs, mini, tmp_path):
    for words, told in (
        (("--config", mini(tmp_path)), "autoencoder: runs/mini has not trained it yet"),
        (("--verify", "--prune", 3), "are jobs of their own; ask for one"),
        (("--unpack", tmp_path / "nowhere"), "no packed caches there"),
    ):
        done = programs("data", "cache", *words, cwd=tmp_path)
        assert done.code == 2, done.err
        assert told in done.errors[-1]
        assert "Traceback" not in done.err
