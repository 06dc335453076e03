"""`sample.py`: prompts to PNGs that say how they were made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
FEW = ("--steps", 3, "--num", 2, "--device", "cpu")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def drawn(done) -> list[Path]:
    assert done.code == 0, done.err
    return [Path(line) for line in done.out.splitlines()]


@pytest.fixture(scope="module")
def pair(programs, model, tmp_path_factory):
    """The same command twice, in two folders: [(folder, paths), (folder, paths)]."""
    found = []
    for name in ("first", "second"):
        cwd = tmp_path_factory.mktemp(name)
        words = ("sample", "a red circle", "two stars", "--model", model, "--seed", 5, *FEW)
        found.append((cwd, drawn(programs(*words, cwd=cwd))))
    return found


def test_pictures_are_printed_and_say_how_they_were_made(pair, model):
    cwd, paths = pair[0]
    assert [path.name for path in paths] == [
        "a-red-circle-5.png",
        "a-red-circle-6.png",
        "two-stars-5.png",
        "two-stars-6.png",
    ]
    assert sorted(path.name for path in (cwd / "samples").iterdir()) == sorted(path.name for path in paths)
    picture = Image.open(cwd / paths[1])
    assert picture.size == (64, 64)
    text = picture.text  # type: ignore[attr-defined]
    prompt, settings = text["parameters"].split("\n")
    assert prompt == "a red circle"
    pairs = dict(part.split(": ") for part in settings.split(", "))
    assert (pairs["Steps"], pairs["Sampler"], pairs["Seed"], pairs["Size"]) == ("3", "dpmpp_2m", "6", "64x64")
    recipe = json.loads(text["latentgen"])
    assert recipe["prompt"] == "a red circle"
    assert (recipe["seed"], recipe["num_inference_steps"], recipe["guidance_scale"]) == (6, 3, 4.0)
    assert recipe["model"] == "mini"
    assert recipe["model_sha256"].startswith(pairs["Model hash"])


def test_the_same_command_draws_the_same_pixels(pair):
    (one, paths), (two, again) = pair
    assert paths == again
    for path in paths:
        assert (pixels(one / path) == pixels(two / path)).all(), path
    assert (pixels(one / paths[0]) != pixels(one / paths[1])).any(), "seeds must differ"
    assert (pixels(one / paths[0]) != pixels(one / paths[2])).any(), "prompts must differ"


def test_the_chunk_draws_the_picture_again(pair, programs, model, tmp_path):
    cwd, paths = pair[0]
    r = json.loads(Image.open(cwd / paths[3]).text["latentgen"])  # type: ignore[attr-defined]
    words = ["sample", r["prompt"], "--negative-prompt", r["negative_prompt"], "--seed", r["seed"], "--num", 1]
    words += ["--steps", r["num_inference_steps"], "--guidance-scale", r["guidance_scale"], "--sampler", r["sampler"]]
    words += ["--height", r["height"], "--width", r["width"], "--model", model]
    (again,) = drawn(programs(*words, cwd=tmp_path))
    assert abs(pixels(tmp_path / again) - pixels(cwd / paths[3])).max() <= 1


def test_guidance_is_asked_for_and_written_down(pair, programs, model, tmp_path):
    cwd, paths = pair[0]
    words = ["sample", "a red circle", "--model", model, "--seed", 5, *FEW, "--out"]
    guidance = ["--guidance", "interval,low=1,high=9", "--guidance", "rescale"]
    (path, _) = drawn(programs(*words, "guided", *guidance, cwd=tmp_path))
    text = Image.open(tmp_path / path).text  # type: ignore[attr-defined]
    assert json.loads(text["latentgen"])["guidance"] == ["interval,low=1,high=9", "rescale"]
    assert 'Guidance: "interval,low=1,high=9; rescale"' in text["parameters"]
    (plain, _) = drawn(programs(*words, "plain", "--guidance", "cfg", cwd=tmp_path))
    assert abs(pixels(tmp_path / plain) - pixels(cwd / paths[0])).max() == 0, "cfg is what nothing said means"
    assert abs(pixels(tmp_path / path) - pixels(cwd / paths[0])).max() > 1


def test_a_sampler_is_asked_for_with_its_knobs(pair, programs, model, tmp_path):
    cwd, paths = pair[0]
    words = ["sample", "a red circle", "--model", model, "--seed", 5, *FEW, "--out"]
    (path, _) = drawn(programs(*words, "noisy", "--sampler", "dpmpp_2m_sde,eta=0.5", cwd=tmp_path))
    text = Image.open(tmp_path / path).text  # type: ignore[attr-defined]
    assert json.loads(text["latentgen"])["sampler"] == "dpmpp_2m_sde,eta=0.5"
    assert 'Sampler: "dpmpp_2m_sde,eta=0.5"' in text["parameters"]
    (other, _) = drawn(programs(*words, "still", "--sampler", "dpmpp_2m_sde,eta=0", cwd=tmp_path))
    assert abs(pixels(tmp_path / path) - pixels(tmp_path / other)).max() > 1
    assert abs(pixels(tmp_path / path) - pixels(cwd / paths[0])).max() > 1


def test_batch_size_does_not_change_pictures(pair, programs, model, tmp_path):
    cwd, paths = pair[0]
    for size in (1, 4):
        words = ("sample", "a red circle", "two stars", "--model", model, "--seed", 5, "--batch-size", size, *FEW)
        again = drawn(programs(*words, "--out", f"by-{size}", cwd=tmp_path))
        for path, other in zip(paths, again, strict=True):
            assert abs(pixels(cwd / path) - pixels(tmp_path / other)).max() <= 1, (size, path)


def test_prompts_file_and_grid(programs, model, tmp_path):
    (tmp_path / "prompts.txt").write_text("# mine\na blue heart\n\n  a green star  \n", encoding="utf-8")
    words = ("sample", "a red circle", "--prompts", "prompts.txt", "--grid", "--model", model, *FEW)
    paths = drawn(programs(*words, cwd=tmp_path))
    names = [path.name for path in paths]
    assert names[:-1] == [f"{stem}-{seed}.png" for stem in ("a-red-circle", "a-blue-heart", "a-green-star")
                          for seed in (0, 1)]  # fmt: skip
    assert names[-1] == "grid.png"
    sheet = Image.open(tmp_path / paths[-1])
    assert sheet.width > 2 * 64
    assert sheet.height > 3 * 64
    before = (tmp_path / paths[0]).read_bytes()
    again = drawn(programs(*words, cwd=tmp_path))
    assert not set(again) & set(paths), "nothing of the user's is overwritten"
    assert (tmp_path / paths[0]).read_bytes() == before


def test_the_newest_finished_run_is_taken_and_named(programs, trained, model, tmp_path):
    runs = tmp_path / "runs"
    for age, name in enumerate(("newest", "older", "oldest")):
        shutil.copytree(model, runs / name / "model")
        os.utime(runs / name / "model" / "model_index.json", (1_700_000_000 - 1000 * age,) * 2)
    (runs / "unfinished" / "checkpoints").mkdir(parents=True)
    done = programs("sample", "a red circle", "--num", 1, "--steps", 1, cwd=tmp_path)
    (path,) = drawn(done)
    assert any(line.endswith("newest/model") for line in done.errors), done.err
    assert json.loads(Image.open(tmp_path / path).text["latentgen"])["model"] == "newest"  # type: ignore[attr-defined]


def test_the_script_itself(trained, pair, environment, tmp_path):
    cwd, _ = pair[0]
    words = ["a red circle", "--runs", trained / "runs", "--seed", 5, *FEW]
    command = [sys.executable, str(ROOT / "sample.py"), *map(str, words)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "model: " in done.stderr
    found = [Path(line) for line in done.stdout.splitlines()]
    assert [path.name for path in found] == ["a-red-circle-5.png", "a-red-circle-6.png"]
    for path in found:
        assert abs(pixels(tmp_path / path) - pixels(cwd / path)).max() <= 1
