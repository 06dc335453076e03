"""A disk that is full or cannot be written, and two runs in one folder: one line, no harm."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

RESERVE = 16 << 20
"""Bytes that stay free on a disk (core.files.require_free_space)."""
FIRST, SECOND = "00000003", "00000006"


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[str], None]]:
    """A disk of its own, of `size` bytes, at `folder`; gives a function that changes how it is mounted."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("may not mount a disk here")
    try:
        yield lambda how: subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def one_line(done, *words: str) -> None:
    assert done.code == 2, done.err
    assert "Traceback" not in done.err
    said = [line for line in done.errors if line.startswith("error: ")]
    assert len(said) == 1, done.err
    for word in words:
        assert word in said[0]


def checkpoints(disk: Path) -> list[str]:
    return sorted(path.name for path in (disk / "runs/mini/checkpoints/vae").iterdir())


@pytest.fixture(scope="module")
def size(programs, mini, tmp_path_factory) -> int:
    """Bytes of one checkpoint of the VAE."""
    folder = tmp_path_factory.mktemp("size")
    hook = ["latentgen.engine.step:Stepper.__call__", 5, 9]
    assert programs("train", "--config", mini(folder), cwd=folder, kill=hook).code == -9
    found = folder / "runs/mini/checkpoints/vae" / FIRST
    return sum(path.stat().st_size for path in found.iterdir())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_disk_fills_up_while_a_checkpoint_is_written(share, size, programs, mini, tmp_path):
    """A real full disk: another program takes all but a share of a checkpoint, after the check for room."""
    command = ("train", "--config", mini(tmp_path), "train.keep_last=1", "--runs", tmp_path / "disk/runs")
    with small_disk(tmp_path / "disk", RESERVE + 4 * size + (4 << 20)):
        eaten = tmp_path / "disk/eaten"
        done = programs(*command, cwd=tmp_path, eater=[2, str(eaten), int(share * size)])
        one_line(done, "the checkpoint of step 6 could not be written", "No space left", "that of step 3 is untouched")
        assert checkpoints(tmp_path / "disk") == [FIRST], "the old one, and nothing half"
        eaten.unlink()
        again = programs(*command, cwd=tmp_path, kill=["latentgen.engine.step:Stepper.__call__", 1, 9])
        assert "continuing after step 3 of 6" in again.err, "and it was whole"


def test_too_little_room_is_found_before_a_checkpoint_is_begun(size, programs, mini, tmp_path):
    command = ("train", "--config", mini(tmp_path), "train.keep_last=1", "--runs", tmp_path / "disk/runs")
    with small_disk(tmp_path / "disk", RESERVE + int(1.5 * size) + (64 << 10)):
        done = programs(*command, cwd=tmp_path)
        one_line(done, "disk nearly full: the checkpoint of step 6 needs")
        assert checkpoints(tmp_path / "disk") == [FIRST]


def test_a_disk_that_becomes_read_only(programs, mini, tmp_path):
    config = mini(tmp_path)
    command = ("train", "--config", config, "--runs", tmp_path / "disk/runs")
    with small_disk(tmp_path / "disk", 64 << 20) as remount:
        kill = ["latentgen.engine.step:Stepper.__call__", 5, 9]
        assert programs(*command, cwd=tmp_path, kill=kill).code == -9
        before = checkpoints(tmp_path / "disk")
        remount("ro")
        done = programs(*command, cwd=tmp_path)
        one_line(done, "Read-only file system", "disk/runs/mini", "run the same command again")
        assert checkpoints(tmp_path / "disk") == before == [FIRST]
        remount("rw")
        done = programs(*command, cwd=tmp_path, kill=["latentgen.engine.step:Stepper.__call__", 1, 9])
        assert "continuing after step 3 of 6" in done.err


def test_a_second_run_in_the_same_folder_is_refused(programs, mini, trained, weights, tmp_path):
    command, go_on = ("train", "--config", mini(tmp_path)), tmp_path / "go"
    first = programs.start(*command, cwd=tmp_path, pause=str(go_on))
    while not (tmp_path / "runs/mini/recipe.yaml").exists():
        assert os.getpgid(first.pid)
    second = programs(*command, cwd=tmp_path)
    one_line(second, "runs/mini", f"in use by process {first.pid} on ")
    go_on.touch()
    done = programs.end(first)
    assert done.code == 0, done.err
    assert weights(tmp_path / "runs/mini") == weights(trained / "runs/mini")
    assert not (tmp_path / "runs/mini/lock").exists()


def test_a_killed_run_leaves_no_lock(programs, mini, tmp_path):
    command = ("train", "--config", mini(tmp_path), "data.workers=1")
    for call in (2, 1):
        done = programs(*command, cwd=tmp_path, kill=["latentgen.engine.step:Stepper.__call__", call, 9])
        assert done.code == -9, done.err
    assert re.search(r'"pid": \d+', (tmp_path / "runs/mini/lock").read_text()), "its file is there, and locks nothing"
