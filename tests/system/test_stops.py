"""SIGTERM at any instant: exit code 75 on all processes, no step lost or done twice, and the same bytes in the end."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
from worlds import world

TERM, USR1, INT = int(signal.SIGTERM), int(signal.SIGUSR1), int(signal.SIGINT)
STEP = "latentgen.engine.step:Stepper.__call__"
VALIDATION = "latentgen.engine.validation:Validation.run"
WRITE = "latentgen.engine.saver:write_contents"
VAE, UNET = "latentgen.tasks.vae:VaeTask.preview", "latentgen.tasks.diffusion:DiffusionTask.preview"
ENCODED, TEXT = "latentgen.tasks.caching:encode_moments", "latentgen.formats.model:encode_text"

PLACES = [
    ("while it starts", "latentgen.recipe.run:note_start", 1, None),
    ("first preview", VAE, 1, ("vae", 0)),
    ("first validation", VALIDATION, 1, ("vae", 0)),
    ("a step", STEP, 2, ("vae", 2)),
    ("a preview", VAE, 1, ("vae", 3)),
    ("a validation", VALIDATION, 1, ("vae", 6)),
    ("the last preview", VAE, 1, ("vae", 6)),
    ("a result", "latentgen.tasks.vae:latent_statistics", 1, None),
    ("writing a result", "latentgen.tasks.vae:write_folder", 1, None),
    ("between stages", "latentgen.recipe.run:train_tokenizer", 1, None),
    ("the last step", STEP, 6, ("clip", 6)),
    ("caching latents", ENCODED, 2, None),
    ("caching text", TEXT, 2, None),
    ("drawing a preview", "latentgen.tasks.diffusion:generate", 2, ("unet", 3)),
    ("a save", WRITE, 1, ("unet", 4, 5, 6)),
    ("writing the model", "latentgen.recipe.run:save_model", 1, None),
]
"""What the run is doing, the function and call before which the signal comes, what it must have saved: stage, step."""


def newest(run: Path, stage: str) -> int:
    return max((int(path.name) for path in (run / "checkpoints" / stage).glob("*[0-9]")), default=0)


def drawn(folder: Path) -> list[str]:
    """What each step of a run drew, however many processes did it, and however often a step was done."""
    return sorted(line for file in (folder / "draws").iterdir() for line in file.read_text().splitlines())


def test_at_any_place_of_a_run(programs, mini, trained, weights, measured, tmp_path):
    command, run = ("train", "--config", mini(tmp_path)), tmp_path / "runs/mini"
    for number, (what, function, call, saved) in enumerate(PLACES):
        ask = [function, call, (TERM, USR1, INT)[number % 3], 1]
        done = programs(*command, cwd=tmp_path, ask=ask, chunk=16, draws=str(tmp_path / "draws"))
        assert done.code == 75, (what, done.err)
        assert "Traceback" not in done.err
        assert done.errors[-1].endswith("the same command continues")
        if saved is not None:
            stage, *steps = saved
            step = newest(run, stage)
            assert step in steps, what
            assert re.match(rf"stopped (after step {step} of 6, saved|with {step} of 6 steps done);", done.errors[-1])
        assert not (run / "model").exists()
        assert not list(run.rglob("checkpoints/*/*.partial"))
    assert programs(*command, cwd=tmp_path, draws=str(tmp_path / "draws")).code == 0
    assert weights(run) == weights(trained / "runs/mini")
    assert measured(run) == measured(trained / "runs/mini")
    assert drawn(tmp_path) == drawn(trained), "no step lost, none done twice"


@pytest.fixture(scope="module")
def whole(programs, mini, tmp_path_factory) -> Path:
    """A folder with a run of two processes that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    command = ("train", "--config", mini(folder), "--device", "cpu")
    both = [programs.start(*command, cwd=folder, env=env, draws=str(folder / "draws")) for env in world(2)]
    for running in both:
        done = programs.end(running)
        assert done.code == 0, done.err
    return folder


TOGETHER = [
    ("a preview, which one process draws", [[VAE, 1], None], ("vae", 0)),
    ("a step; only the second process is asked", [None, [STEP, 2]], ("vae", 2)),
    ("a validation", [[VALIDATION, 1], [VALIDATION, 1]], ("vae", 3)),
    ("a result, which one process makes", [["latentgen.tasks.vae:latent_statistics", 1], None], None),
    ("caching; only the second process is asked", [None, [ENCODED, 1]], None),
    ("a step", [[STEP, 1], [STEP, 1]], ("unet", 1)),
]


def test_two_processes_at_any_place(programs, mini, whole, weights, measured, tmp_path):
    command, run = ("train", "--config", mini(tmp_path), "--device", "cpu"), tmp_path / "runs/mini"
    hooks = {"chunk": 16, "draws": str(tmp_path / "draws")}
    for what, asked, saved in TOGETHER:
        asks = [{"ask": [*place, TERM, 1]} if place is not None else {} for place in asked]
        both = [
            programs.start(*command, cwd=tmp_path, env=e, **a, **hooks) for e, a in zip(world(2), asks, strict=True)
        ]
        ends = [programs.end(running) for running in both]
        assert [end.code for end in ends] == [75, 75], (what, ends)
        assert not any("Traceback" in end.err for end in ends)
        assert ends[0].errors[-1].endswith("the same command continues")
        assert saved is None or newest(run, saved[0]) == saved[1], what
    both = [programs.start(*command, cwd=tmp_path, env=env, **hooks) for env in world(2)]
    assert [programs.end(running).code for running in both] == [0, 0]
    assert weights(run) == weights(whole / "runs/mini")
    one, other = measured(run), measured(whole / "runs/mini")
    assert one.keys() == other.keys()
    for key, values in one.items():  # means over steps are summed over processes where a stop cut them
        assert values == pytest.approx(other[key], rel=1e-6), key
    assert drawn(tmp_path) == drawn(whole), "no step lost, none done twice"


@pytest.mark.parametrize("function", [STEP, VAE])
def test_a_second_signal_leaves_at_once_and_damages_nothing(function, programs, mini, trained, weights, tmp_path):
    command, run = ("train", "--config", mini(tmp_path)), tmp_path / "runs/mini"
    done = programs(*command, cwd=tmp_path, ask=[function, 3 if function == STEP else 1, TERM, 2])
    assert done.code == 130
    assert done.errors[-1] == "interrupted"
    assert programs(*command, cwd=tmp_path).code == 0
    assert weights(run) == weights(trained / "runs/mini")
