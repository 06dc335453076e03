"""Stopped anywhere and started again, a run ends in the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEP = "latentgen.engine.step:Stepper.__call__"
SAVED_FILE = "latentgen.engine.checkpoint:encoded"
SYNCED = "latentgen.core.files:fsync_tree"
ENCODED = "latentgen.tasks.caching:encode_moments"
TEXT = "latentgen.formats.model:encode_text"
KILL, INT = int(signal.SIGKILL), int(signal.SIGINT)

# Each stop is (function, call): the run is stopped at that call, counted from the last start. 3 steps are an epoch, and
# every third step writes a checkpoint of 5 files. KILL strikes before the call's work, INT after it.
STOPS = {
    # VAE in its first epoch (nothing saved) and in its second; CLIP in its first; U-Net in its first and second.
    "killed inside epochs": (KILL, [(STEP, 2), (STEP, 5), (STEP, 5), (STEP, 8), (STEP, 5)]),
    # Begun with the first step after an epoch's end (just saved), in each stage.
    "killed at epoch ends": (KILL, [(STEP, 4), (STEP, 7), (STEP, 7)]),
    # VAE inside, VAE at the end of an epoch, CLIP inside, U-Net inside, U-Net at the end of an epoch.
    "interrupted": (INT, [(STEP, 2), (STEP, 1), (STEP, 5), (STEP, 5), (STEP, 2)]),
    # The very first checkpoint, the second of the VAE, one of CLIP, one of the U-Net.
    "killed in a save": (KILL, [(SAVED_FILE, 1), (SAVED_FILE, 7), (SAVED_FILE, 7), (SAVED_FILE, 11)]),
    # A whole folder is written but not yet renamed: a checkpoint, the VAE's result, CLIP's, the U-Net's, the model.
    "killed before a rename": (KILL, [(SYNCED, 1), (SYNCED, 3), (SYNCED, 4), (SYNCED, 4), (SYNCED, 2)]),
    "killed while caching": (KILL, [(ENCODED, 2), (ENCODED, 2), (TEXT, 3)]),
    "interrupted while caching": (INT, [(ENCODED, 2), (TEXT, 2)]),
}


@pytest.mark.parametrize("stops", STOPS)
def test_stopped_run_ends_in_the_same_bytes(stops, programs, mini, trained, weights, measured, tmp_path):
    number, places = STOPS[stops]
    command = ("train", "--config", mini(tmp_path))
    hooks = {"chunk": 16} if "caching" in stops else {}
    for place in places:
        done = programs(*command, cwd=tmp_path, kill=[*place, number], **hooks)
        assert not (tmp_path / "runs/mini/model").exists(), place
        assert "Traceback" not in done.err
        if number == KILL:
            assert done.code == -KILL, (place, done)
        else:
            assert done.code == 75, (place, done)
            assert "the same command continues" in done.errors[-1]
    run, reference = tmp_path / "runs/mini", trained / "runs/mini"
    (run / "report.html.99999999.partial").touch()  # a process (more than there can be) killed while it wrote its page
    done = programs(*command, cwd=tmp_path, **hooks)
    assert done.code == 0, done.err
    assert weights(run) == weights(reference)
    assert measured(run) == measured(reference)
    assert not list(run.rglob("*.partial"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_with_data_workers(number, programs, mini, trained, weights, tmp_path):
    """Another process sends it to the whole group, as a terminal or `timeout` does; workers are needed for the step."""
    command, metrics = ("train", "--config", mini(tmp_path), "data.workers=1"), tmp_path / "runs/mini/metrics.jsonl"
    for stage in ("vae", "clip"):
        running = programs.start(*command, cwd=tmp_path, slow=[STEP, 0.2])
        end = time.monotonic() + 60
        while not metrics.is_file() or f'"stage": "{stage}", "kind": "train"' not in metrics.read_text():
            assert time.monotonic() < end
            time.sleep(0.01)
        os.killpg(running.pid, number)
        done = programs.end(running)
        assert done.code == 75, done
        assert "Traceback" not in done.err
        assert "the same command continues" in done.errors[-1]
    assert programs(*command, cwd=tmp_path).code == 0
    assert weights(tmp_path / "runs/mini") == weights(trained / "runs/mini")


def test_ctrl_c_on_the_real_script_then_the_same_command(mini, trained, weights, environment, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(mini(tmp_path)), "--runs", "runs"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, stderr=subprocess.PIPE) as process:
        end = time.monotonic() + 60
        while not (tmp_path / "runs/mini/metrics.jsonl").exists():
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "Traceback" not in err
    assert err.count("the same command continues") == 1, err
    again = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False)
    assert again.returncode == 0, again.stderr
    assert weights(tmp_path / "runs/mini") == weights(trained / "runs/mini")


def test_a_clock_that_jumps_changes_nothing(programs, mini, trained, weights, measured, tmp_path):
    command = ("train", "--config", mini(tmp_path))
    assert programs(*command, cwd=tmp_path, clock=1, kill=[STEP, 8, INT]).code == 75
    done = programs(*command, cwd=tmp_path, clock=2)
    assert done.code == 0, done.err
    assert weights(tmp_path / "runs/mini") == weights(trained / "runs/mini")
    assert measured(tmp_path / "runs/mini") == measured(trained / "runs/mini")


def test_a_finished_recipe_does_nothing(programs, trained, tree):
    run = trained / "runs/mini"
    before, times = tree(trained), {p: p.stat().st_mtime_ns for p in run.rglob("*.safetensors")}
    done = programs("train", "--config", trained / "mini.yaml", cwd=trained)
    assert done.code == 0
    assert "is finished" in done.err
    assert "step/s" not in done.err
    assert tree(trained) == before
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*.safetensors")} == times


@pytest.mark.parametrize("override", ["train.steps=7", "seed=1", "data.size=25", "unet.dropout=0.1"])
def test_another_recipe_in_the_same_folder_is_refused(override, programs, trained, tree):
    before = tree(trained)
    done = programs("train", "--config", trained / "mini.yaml", override, cwd=trained)
    assert done.code == 2
    assert len(done.errors) == 1, done.err
    assert override.partition("=")[0] in done.errors[0]
    assert tree(trained) == before


def test_what_the_weights_do_not_depend_on_may_change_between_commands(programs, mini, trained, weights, tmp_path):
    command = ("train", "--config", mini(tmp_path))
    free = ("train.save_every=5", "train.log_every=3", "preview.every=2", "data.workers=1", "train.keep_last=1")
    assert programs(*command, cwd=tmp_path, kill=[STEP, 16, KILL]).code == -KILL
    assert programs(*command, *free, cwd=tmp_path).code == 0
    assert weights(tmp_path / "runs/mini") == weights(trained / "runs/mini")


def test_a_damaged_checkpoint_is_named_and_an_older_one_taken(programs, mini, trained, weights, tmp_path):
    command = ("train", "--config", mini(tmp_path))
    assert programs(*command, cwd=tmp_path, kill=["latentgen.recipe.run:write_trained", 1, KILL]).code == -KILL
    newest = tmp_path / "runs/mini/checkpoints/unet/00000006/weights-unet.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    done = programs(*command, cwd=tmp_path)
    assert done.code == 0, done.err
    assert any("00000006" in line and "damaged" in line for line in done.errors)
    assert weights(tmp_path / "runs/mini") == weights(trained / "runs/mini")
