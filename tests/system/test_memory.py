"""A run whose memory is too small for its batch ends in the weights of one that was told the right number."""

from __future__ import annotations

import signal

import pytest

STEP = "latentgen.engine.step:Stepper.__call__"
KILL = int(signal.SIGKILL)
SOLE = ("autoencoder.train.micro_batch=8",)
"""Of the three networks only the U-Net is cut."""


@pytest.fixture(scope="module")
def cut(programs, mini, weights, tmp_path_factory):
    """The weights of the run that was told."""
    folder = tmp_path_factory.mktemp("told")
    done = programs("train", "--config", mini(folder), "train.micro_batch=2", *SOLE, cwd=folder)
    assert done.code == 0, done.err
    return weights(folder / "runs/mini")


def test_auto_finds_the_number_and_a_resumed_run_keeps_it(programs, mini, weights, trained, cut, tmp_path):
    command = ("train", "--config", mini(tmp_path), "train.micro_batch=auto", *SOLE)
    first = programs(*command, cwd=tmp_path, room=3, kill=[STEP, 6 + 6 + 5, KILL])
    assert first.code == -KILL, first
    assert [line.split(": ", 1)[1] for line in first.errors if "memory ran out" in line] == [
        "memory ran out with 8 examples at once: now 4 at once, the same batch",
        "memory ran out with 4 examples at once: now 2 at once, the same batch",
    ]
    done = programs(*command, cwd=tmp_path)  # there is room for all now
    assert done.code == 0, done.err
    assert "memory ran out" not in done.err
    assert weights(tmp_path / "runs/mini") == cut
    assert cut != weights(trained / "runs/mini"), "sums are not taken in another order: the test sees nothing"


def test_memory_for_not_even_one_example_is_said_before_anything_is_trained(programs, mini, tmp_path):
    done = programs("train", "--config", mini(tmp_path), "train.micro_batch=auto", cwd=tmp_path, room=0)
    assert done.code not in (0, None)
    assert "memory runs out on a single example" in done.errors[-1]
    assert "gradient_checkpointing" in done.errors[-1]
    assert "Traceback" not in done.err
    assert not (tmp_path / "runs/mini/checkpoints/unet").exists()


def test_averages_in_main_memory_are_the_same_averages(programs, mini, weights, trained, tmp_path):
    command = ("train", "--config", mini(tmp_path), "train.ema_device=cpu")
    assert programs(*command, cwd=tmp_path, kill=[STEP, 6 + 6 + 5, KILL]).code == -KILL
    done = programs(*command, cwd=tmp_path)
    assert done.code == 0, done.err
    assert weights(tmp_path / "runs/mini") == weights(trained / "runs/mini")
