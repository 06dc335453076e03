"""The page of a real run, made while it trained and made again; and trackers that are not there."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path

ABSENT = next(name for name in ("aim", "clearml", "swanlab") if importlib.util.find_spec(name) is None)


def without_time(page: Path) -> str:
    return re.sub(r"report of [^<]*", "", page.read_text())


def test_a_run_makes_its_page_and_the_verb_makes_it_again(trained: Path, programs, tmp_path: Path) -> None:
    run = trained / "runs/mini"
    made = run / "report.html"
    page = made.read_text()
    for wanted in ("finished", "Autoencoder", "Text encoder", "U-Net", "by noise level", 'alt="a red circle, step 6"'):
        assert wanted in page, wanted
    assert len(json.loads((run / "starts.json").read_text())) == 1
    done = programs("report", run, "--out", tmp_path / "again.html", cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    assert done.out.strip() == str(tmp_path / "again.html")
    assert without_time(tmp_path / "again.html") == without_time(made)


def test_a_run_that_was_killed_has_a_page(trained: Path, programs, tmp_path: Path) -> None:
    run = tmp_path / "mini"
    run.mkdir()
    for name in ("recipe.yaml", "metrics.jsonl"):
        shutil.copy(trained / "runs/mini" / name, run / name)
    shutil.copytree(trained / "runs/mini/samples", run / "samples")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"stage": "unet", "kind')
    done = programs("report", run, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "not finished: U-Net, step 6 of 6" in (run / "report.html").read_text()


def test_what_is_no_run_is_refused_in_one_line(trained: Path, programs, tmp_path: Path) -> None:
    for path, words in (("absent", "no such run folder"), (trained / "runs/mini/model", "a part of one")):
        done = programs("report", path, cwd=tmp_path)
        assert done.code == 2
        assert len(done.errors) == 1
        assert words in done.errors[0]
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(programs, mini, tmp_path, tree) -> None:
    recipe = mini(tmp_path)
    before = tree(tmp_path)
    done = programs("train", "--config", recipe, f"train.trackers=[tensorboard,{ABSENT}]", cwd=tmp_path)
    assert done.code == 2
    said = [line for line in done.errors if line.startswith("error: ")]
    assert len(said) == 1
    assert f"pip install {ABSENT}" in said[0]
    assert tree(tmp_path) == before
