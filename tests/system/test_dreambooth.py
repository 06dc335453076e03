"""DreamBooth from a folder without captions: class pictures drawn once, killed meanwhile, in one process and in two."""

from __future__ import annotations

import math
import signal
import subprocess
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from worlds import RECORDED, launch, read_draws

KILL, INT = int(signal.SIGKILL), int(signal.SIGINT)
DRAWN = "latentgen.recipe.prior:save_png"
STEPS, BATCH, SUBJECT, CLASS = 4, 4, 3, 5


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = tmp_path_factory.mktemp("subject")
    for number in range(SUBJECT):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"IMG_{number:04d}.png")
    return folder


@pytest.fixture(scope="module")
def words(subject, model):
    return [
        *("name=dog", "data.source=folder", f"data.path={subject}", "data.caption=a photo of sks dog"),
        *("data.captions=null", f"unet.from={model}", "finetune.method=full"),
        f"finetune.prior={{prompt: a dog, pictures: {CLASS}, weight: 0.5}}",
        *(f"train.steps={STEPS}", f"train.global_batch={BATCH}", "train.log_every=1"),
    ]


@pytest.fixture(scope="module")
def reference(programs, mini, words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    done = programs("train", "--config", mini(folder), *words, cwd=folder, draws=str(folder / "draws"))
    assert done.code == 0, done.err
    assert f"class pictures: {CLASS} of {CLASS} to be drawn of 'a dog'" in done.err
    assert "nothing is held out" in done.err
    return folder


def class_pictures(folder):
    (made,) = (folder / "cache" / "prior").iterdir()
    return {path.name: path.read_bytes() for path in made.iterdir()}


def test_class_and_subject_have_half_of_the_steps_each(programs, reference, tree):
    assert set(class_pictures(reference)) == {f"{number:05d}.png" for number in range(CLASS)}
    draws = read_draws(reference / "draws")
    assert len(draws) == STEPS * BATCH
    epoch = 2 * SUBJECT * -(-CLASS // SUBJECT)
    first = Counter(row["example"] for (_, step, at), row in draws.items() if step * BATCH + at < epoch)
    assert sorted(first) == list(range(SUBJECT + CLASS)), "the subject's come first, the class's after them"
    assert {first[number] for number in range(SUBJECT)} == {epoch // 2 // SUBJECT}
    for step in range(STEPS):
        own = sum(row["example"] < SUBJECT for (_, other, _), row in draws.items() if other == step)
        assert abs(own - BATCH / 2) < 1, "half of every batch"
    sampled = programs("sample", "a photo of sks dog", "--num", 1, "--steps", 1, cwd=reference)
    assert sampled.code == 0, sampled.err


@pytest.mark.parametrize(("number", "calls"), [(KILL, [3, 1, 2]), (INT, [1, 2])])
def test_stopped_while_they_are_drawn(number, calls, programs, mini, words, reference, weights, measured, tmp_path):
    command = ("train", "--config", mini(tmp_path), *words)
    for call in calls:
        done = programs(*command, cwd=tmp_path, kill=[DRAWN, call, number])
        assert done.code == (-KILL if number == KILL else 75), done.err
        assert "Traceback" not in done.err
    done = programs(*command, cwd=tmp_path)
    assert done.code == 0, done.err
    assert class_pictures(tmp_path) == class_pictures(reference)
    assert weights(tmp_path / "runs/dog") == weights(reference / "runs/dog")
    assert measured(tmp_path / "runs/dog") == measured(reference / "runs/dog")


def test_another_run_finds_them_there(programs, mini, words, reference):
    before = class_pictures(reference)
    again = ("name=again", "seed=1", "train.steps=1", "finetune.prior.weight=1")
    done = programs("train", "--config", mini(reference), *words, *again, cwd=reference)
    assert done.code == 0, done.err
    assert "class pictures: reused" in done.err
    assert class_pictures(reference) == before


def test_two_processes_draw_and_train_what_one_does(mini, words, reference, measured, environment, tmp_path):
    command = [*launch("accelerate"), str(RECORDED), "--config", str(mini(tmp_path)), *words, "train.processes=2"]
    env = {**environment, "DRAWS_FOLDER": str(tmp_path / "draws")}
    done = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert class_pictures(tmp_path) == class_pictures(reference)
    assert read_draws(tmp_path / "draws") == read_draws(reference / "draws")
    one, two = measured(reference / "runs/dog"), measured(tmp_path / "runs/dog")
    assert one.keys() == two.keys()
    for key, values in one.items():
        if key[1] == "train":
            assert math.isclose(values["loss"], two[key]["loss"], rel_tol=1e-5)


ADAPTERS = ("finetune.method=lora", "finetune.rank=4", "train.learning_rate=1e-2")


@pytest.fixture(scope="module")
def alone(programs, mini, words, measured, tmp_path_factory):
    """Adapters trained by one process."""
    folder = tmp_path_factory.mktemp("alone")
    done = programs("train", "--config", mini(folder), *words, *ADAPTERS, cwd=folder)
    assert done.code == 0, done.err
    return measured(folder / "runs/dog")


@pytest.mark.parametrize("kind", ["accelerate", "fsdp2"])
def test_two_processes_switch_adapters_off_as_one_does(kind, mini, words, alone, measured, environment, tmp_path):
    """To ask what was predicted before, beside wrappers that exchange gradients, or cut the networks."""
    command = [*launch(kind), str(RECORDED), "--config", str(mini(tmp_path)), *words, *ADAPTERS, "train.processes=2"]
    env = {**environment, "DRAWS_FOLDER": str(tmp_path / "draws")}
    done = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    both = measured(tmp_path / "runs/dog")
    assert alone.keys() == both.keys()
    for key, values in alone.items():
        if key[1] == "train":
            assert math.isclose(values["loss"], both[key]["loss"], rel_tol=1e-5)


def test_the_weight_counts(programs, mini, words, reference, weights, measured, tmp_path):
    """Where something is to be learned of class pictures: at first nothing is, for they are predicted as before."""
    heavy = ("finetune.prior.weight=2",)
    pictures = {}
    for name, more in {"heavy": heavy, "light": ()}.items():
        folder = tmp_path / name
        folder.mkdir()
        target = ("finetune.prior.target=picture", "train.steps=1")
        done = programs("train", "--config", mini(folder), *words, *more, *target, cwd=folder)
        assert done.code == 0, done.err
        pictures[name] = measured(folder / "runs/dog")
    done = programs("train", "--config", mini(tmp_path), *words, *heavy, cwd=tmp_path)
    assert done.code == 0, done.err
    as_before = {"heavy": measured(tmp_path / "runs/dog"), "light": measured(reference / "runs/dog")}
    first = ("unet", "train", 1)
    for each in (pictures, as_before):
        assert math.isclose(each["light"][first]["error"], each["heavy"][first]["error"], rel_tol=1e-6)
    assert pictures["heavy"][first]["loss"] > pictures["light"][first]["loss"] > as_before["light"][first]["loss"]
    assert math.isclose(as_before["heavy"][first]["loss"], as_before["light"][first]["loss"], rel_tol=1e-6)
    assert weights(tmp_path / "runs/dog") != weights(reference / "runs/dog")
