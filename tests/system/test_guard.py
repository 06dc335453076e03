"""Numbers that go wrong in whole programs, and in one of two processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from worlds import run_two

HERE = Path(__file__).resolve().parent


def notes(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "guard"]


def finite(folder: Path) -> bool:
    files = list(folder.rglob("*.safetensors"))
    assert files
    return all(bool(v.float().isfinite().all()) for file in files for v in load_file(file).values())


CASES = [("loss", "unet", "nan"), ("gradient", "clip", "inf"), ("batch", "unet", "nan"), ("batch", "unet", "-inf")]


@pytest.mark.parametrize(("what", "stage", "value"), CASES)
def test_a_bad_step_is_skipped_and_named(what, stage, value, programs, mini, tmp_path):
    done = programs("train", "--config", mini(tmp_path), cwd=tmp_path, wrong=[what, stage, [3], value])
    assert done.code == 0, done.err
    run = tmp_path / "runs/mini"
    (note,) = notes(run)
    assert (note["stage"], note["step"]) == (stage, 4)
    assert note["what"] == ("gradient" if what == "gradient" else "loss")
    assert len(note["examples"]) == 8
    assert note["not_finite_in_data"] == (note["examples"][:1] if what == "batch" else [])
    assert sum("the step was skipped" in line for line in done.errors) == 1
    assert finite(run)


def test_a_weight_that_goes_bad_is_never_saved_and_the_same_command_continues(
    programs, mini, trained, weights, tmp_path
):
    command = ("train", "--config", mini(tmp_path))
    done = programs(*command, cwd=tmp_path, wrong=["weight", "unet", [4], "nan"])
    assert done.code == 3, done.err
    assert [line for line in done.errors if line.startswith("error:")] == done.errors[-1:]
    run = tmp_path / "runs/mini"
    assert sorted(path.name for path in (run / "checkpoints/unet").iterdir()) == ["00000003"]
    assert not (run / "model").exists()
    assert [(note["step"], note["what"]) for note in notes(run)] == [(5, "loss"), (6, "loss")]
    assert "checkpoint of step 6 is refused" in done.errors[-1]
    assert finite(run)
    assert programs(*command, cwd=tmp_path).code == 0
    assert weights(run) == weights(trained / "runs/mini")


def test_too_many_in_a_row_stop_it_with_one_line_and_a_report(programs, mini, tmp_path):
    command = ("train", "--config", mini(tmp_path), "train.bad_steps=3")
    done = programs(*command, cwd=tmp_path, wrong=["gradient", "unet", [1, 2, 3, 4], "nan"])
    assert done.code == 3, done.err
    (error,) = [line for line in done.errors if line.startswith("error:")]
    assert "3 steps in a row were skipped, up to step 4: gradient not finite (examples" in error
    assert "Traceback" not in done.err
    run = tmp_path / "runs/mini"
    assert [note["step"] for note in notes(run)] == [2, 3, 4]
    assert (run / "report.html").stat().st_mtime >= (run / "checkpoints/unet/00000003").stat().st_mtime
    assert finite(run)
    assert programs(*command, cwd=tmp_path).code == 0


@pytest.fixture(scope="module")
def folder(environment, tmp_path_factory) -> Path:
    """All that two processes made."""
    folder = tmp_path_factory.mktemp("guarded")
    run_two("guarded_toy.py", str(folder), environment=environment)
    return folder


@pytest.fixture(scope="module")
def states(folder: Path) -> list[dict[str, dict[str, str]]]:
    """Of each process: run -> name -> hash."""
    return [json.loads((folder / f"state-{rank}.json").read_text()) for rank in range(2)]


def same(first: dict[str, str], second: dict[str, str]) -> list[str]:
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def test_what_goes_wrong_in_one_process_is_skipped_in_both(folder, states):
    for ended in states:
        assert same(ended["one-sided"], ended["left-out"]) == []
    assert same(states[0]["one-sided"], states[1]["one-sided"]) == []
    found = notes_of(folder / "one-sided")
    assert [(note["step"], note["what"]) for note in found] == [(2, "loss"), (4, "gradient"), (6, "loss")]
    assert [len(note["examples"]) for note in found] == [4, 8, 4], "those of the second process, where that is known"
    assert [len(note["not_finite_in_data"]) for note in found] == [0, 0, 1]


def notes_of(folder: Path) -> list[dict]:
    return [x for x in map(json.loads, (folder / "m.jsonl").read_text().splitlines()) if x["kind"] == "guard"]


def test_networks_that_are_cut_go_back_too(folder, states):
    (back,) = [note for note in notes_of(folder / "cut") if note["what"] == "rollback"]
    assert (back["step"], back["to"]) == (16, 8)
    for ended in states:
        assert same(ended["cut"], ended["cut-left-out"]) == []
    parts = {path.name for path in (folder / "cut/c/00000012").iterdir()}
    assert {f"good-weights-net.part-{rank}-of-2.safetensors" for rank in range(2)} <= parts


@pytest.mark.parametrize("step", [12, 16])
def test_so_they_do_when_stopped_meanwhile(step, states):
    for ended in states:
        assert same(ended[f"from-{step}"], ended["cut"]) == []


def test_verdicts_that_nobody_reads_reach_cut_networks(states):
    for ended in states:
        assert same(ended["device"], ended["device-left-out"]) == []
