"""Saved in the background: a copy that training does not change, one at a time, and errors that are not lost."""

from __future__ import annotations

import errno
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from latentgen.core import files
from latentgen.core.errors import Interrupted, UserError
from latentgen.engine import checkpoint as checkpoints
from latentgen.engine import saver as module
from latentgen.engine.checkpoint import Checkpoint, Keep, Wanted, load_newest, name_of, steps_in
from latentgen.engine.saver import Saver


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def everything(group: str, name: str, shape: torch.Size) -> None:
    """All rows of all tensors."""


WANTED: Wanted = everything


def made(step: int, weight: torch.Tensor | None = None) -> Checkpoint:
    weight = torch.full((64, 64), float(step)) if weight is None else weight
    return Checkpoint(step, {"weights-x": {"a": weight}}, {"note": step})


def train(saver: Saver, *steps: int, error: BaseException | None = None) -> None:
    """Save after these steps; then training ends, with `error`."""
    with saver:
        for step in steps:
            saver.save(made(step))
        if error is not None:
            raise error


class Gate:
    """A disk that writes only when it is let."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.open, self.at = threading.Event(), threading.Event()
        self.writing, self.most = 0, 0
        self.plain = checkpoints.write_file
        patch.setattr(checkpoints, "write_file", self)

    def __call__(self, path: Path, blocks: Any) -> str:
        self.writing += 1
        self.most = max(self.most, self.writing)
        self.at.set()
        assert self.open.wait(timeout=60)
        self.writing -= 1
        return self.plain(path, blocks)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def test_training_goes_on_meanwhile_and_does_not_change_what_is_saved(
    gate: Gate, tmp_path: Path, accelerator: Accelerator
) -> None:
    weight = torch.arange(12.0).view(1, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    with Saver(tmp_path, Keep(1), accelerator) as saver:
        saver.save(made(1, weight))
        assert gate.at.wait(timeout=60), "it is being written now"
        weight.add_(100)  # as an optimizer does, in place
        saver.check(together=True)
        assert steps_in(tmp_path) == []
        gate.open.set()
    found = load_newest(tmp_path)
    assert found is not None, "the end waits for what is being written"
    assert torch.equal(found.tensors["weights-x"]["a"], torch.arange(12.0).view(1, 3, 2, 2))
    assert len(saver.stalls) == 1


def test_one_at_a_time(gate: Gate, tmp_path: Path, accelerator: Accelerator) -> None:
    with Saver(tmp_path, Keep(3), accelerator) as saver:
        saver.save(made(1))
        assert gate.at.wait(timeout=60)
        threading.Timer(0.05, gate.open.set).start()
        saver.save(made(2))
        assert gate.open.is_set(), "the second save waited for the first"
        saver.save(made(3))
    assert gate.most == 1
    assert steps_in(tmp_path) == [1, 2, 3]
    for step in (1, 2, 3):  # they use one block of memory, one after another
        found = checkpoints.read_checkpoint(tmp_path / name_of(step))
        assert torch.equal(found.tensors["weights-x"]["a"], torch.full((64, 64), float(step)))


@pytest.mark.parametrize("error", [Interrupted("asked"), FloatingPointError("loss")])
def test_whatever_ends_training_what_is_being_written_is_finished(
    error: BaseException, gate: Gate, tmp_path: Path, accelerator: Accelerator
) -> None:
    threading.Timer(0.05, gate.open.set).start()
    with pytest.raises(type(error)):
        train(Saver(tmp_path, Keep(1), accelerator), 1, error=error)
    assert steps_in(tmp_path) == [1]


def test_a_second_ctrl_c_waits_for_nothing(gate: Gate, tmp_path: Path, accelerator: Accelerator) -> None:
    saver = Saver(tmp_path, Keep(1), accelerator)
    with pytest.raises(KeyboardInterrupt):
        train(saver, 1, error=KeyboardInterrupt())
    assert not gate.open.is_set()
    assert steps_in(tmp_path) == []
    gate.open.set()
    saver._join()


def failing(number: int, text: str) -> Any:
    def write_file(path: Path, blocks: Any) -> str:
        path.write_bytes(b"half")
        raise OSError(number, text, str(path))

    return write_file


def test_an_error_of_the_disk_is_one_line_at_the_next_step(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(tmp_path, Keep(1), accelerator)
    saver.save(made(1))
    saver.wait()
    monkeypatch.setattr(checkpoints, "write_file", failing(28, "No space left on device"))
    saver.save(made(2))
    saver._join()
    with pytest.raises(UserError) as caught:
        saver.check(together=False)
    said = str(caught.value)
    assert "the checkpoint of step 2 could not be written: No space left on device" in said
    assert "that of step 1 is untouched" in said
    assert "\n" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"], "what was half written gave its room back"
    saver.check(together=False)  # said once
    assert load_newest(tmp_path) is not None


@pytest.mark.parametrize("steps", [(1, 2), (1,)], ids=["a save", "the end"])
def test_an_error_is_not_lost_when_no_step_follows(
    steps: tuple[int, ...], tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "write_file", failing(5, "Input/output error"))
    with pytest.raises(UserError, match=r"step 1 could not be written: Input/output error .*; there is none before it"):
        train(Saver(tmp_path, Keep(1), accelerator), *steps)


def test_an_error_beside_another_is_a_warning(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpoints, "write_file", failing(28, "No space left on device"))
    with pytest.raises(FloatingPointError):
        train(Saver(tmp_path, Keep(1), accelerator), 1, error=FloatingPointError("loss"))
    assert "No space left" in caplog.text


def test_a_fault_of_the_program_is_no_user_error(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(module, "commit", broken)
    with pytest.raises(RuntimeError, match="a fault"):
        train(Saver(tmp_path, Keep(1), accelerator), 1)


def test_too_little_room_is_told_before_anything_is_written(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Saver(tmp_path, Keep(1), accelerator) as saver:
        saver.save(made(1))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(1, 1, 0))
    with pytest.raises(UserError, match="disk nearly full: the checkpoint of step 2"):
        Saver(tmp_path, Keep(1), accelerator).save(made(2))
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]


def test_load_clears_what_a_crash_left(tmp_path: Path, accelerator: Accelerator) -> None:
    with Saver(tmp_path, Keep(2), accelerator) as saver:
        saver.save(made(1))
        saver.save(made(2))
    (tmp_path / "00000002").rename(tmp_path / "00000002.old.partial")
    (tmp_path / "00000002.partial").mkdir()
    (tmp_path / "00000007.partial").mkdir()
    found = Saver(tmp_path, Keep(2), accelerator).load(WANTED)
    assert found is not None
    assert found.step == 2
    assert steps_in(tmp_path) == [1, 2]
    assert not list(tmp_path.glob("*.partial"))


def spoil(path: Path) -> None:
    content = (path / "weights-x.safetensors").read_bytes()
    (path / "weights-x.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_what_was_passed_over_does_not_count_as_kept(
    tmp_path: Path, accelerator: Accelerator, caplog: pytest.LogCaptureFixture
) -> None:
    with Saver(tmp_path, Keep(2), accelerator) as saver:
        for step in (3, 4):
            saver.save(made(step))
    spoil(tmp_path / name_of(4))
    with Saver(tmp_path, Keep(2), accelerator) as saver:
        found = saver.load(WANTED)
        assert found is not None
        assert found.step == 3
        assert "00000004: weights-x.safetensors is damaged; taking an older one" in caplog.text
        saver.save(made(5))
    assert steps_in(tmp_path) == [3, 5], "the last good one stays beside the new one"


def test_where_all_are_damaged_nothing_begins_anew_by_itself(tmp_path: Path, accelerator: Accelerator) -> None:
    assert Saver(tmp_path, Keep(1), accelerator).load(WANTED) is None
    with Saver(tmp_path, Keep(1), accelerator) as saver:
        saver.save(made(1))
    spoil(tmp_path / name_of(1))
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged; remove it to begin this stage anew"):
        Saver(tmp_path, Keep(1), accelerator).load(WANTED)
    assert steps_in(tmp_path) == [1]


def test_the_best_are_kept_by_their_score(tmp_path: Path, accelerator: Accelerator) -> None:
    with Saver(tmp_path / "scored", Keep(1, best=1), accelerator) as saver:
        for step, score in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None)):
            saver.save(made(step), score)
    assert steps_in(tmp_path / "scored") == [2, 4]


def test_where_a_disk_fails_everybody_the_checkpoint_is_what_is_said(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "some file")

    monkeypatch.setattr(module, "write_contents", full)

    def fail_too() -> None:
        with Saver(tmp_path, Keep(1), accelerator) as saving:
            saving.save(made(1))
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="the checkpoint of step 1 could not be written"):
        fail_too()
