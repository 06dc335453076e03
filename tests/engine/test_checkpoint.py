"""Checkpoints: complete or absent, checked before use."""

from __future__ import annotations

import logging
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from latentgen.core import files
from latentgen.core.errors import UserError
from latentgen.engine import checkpoint as module
from latentgen.engine.checkpoint import Checkpoint, damage, load_newest, save_checkpoint, steps_in


def made(step: int) -> Checkpoint:
    weights = {
        "a": torch.full((2, 3), float(step)),
        "cl": torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "count": torch.tensor(step),
    }
    return Checkpoint(step, {"weights-x": weights, "meter": {}}, {"scaler": None, "note": [1, "ü"]})


def same(first: Checkpoint | None, second: Checkpoint) -> bool:
    assert first is not None
    return (
        first.step == second.step
        and first.data == second.data
        and first.tensors.keys() == second.tensors.keys()
        and all(
            group.keys() == second.tensors[name].keys()
            and all(
                torch.equal(value, second.tensors[name][key]) and value.dtype == second.tensors[name][key].dtype
                for key, value in group.items()
            )
            for name, group in first.tensors.items()
        )
    )


def test_save_and_load(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "c") is None
    path = save_checkpoint(tmp_path / "c", made(7), keep_last=2)
    assert path == tmp_path / "c" / "00000007"
    assert damage(path) is None
    assert same(load_newest(tmp_path / "c"), made(7))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 5, 10):
        save_checkpoint(tmp_path, made(step), keep_last=2)
    assert steps_in(tmp_path) == [5, 10]
    assert same(load_newest(tmp_path), made(10))


def test_the_old_one_goes_only_when_the_new_one_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, made(1), keep_last=1)
    flush, there = files.fsync_tree, []

    def spy(folder: Path) -> None:
        there.append(steps_in(tmp_path))
        flush(folder)

    monkeypatch.setattr(files, "fsync_tree", spy)
    save_checkpoint(tmp_path, made(2), keep_last=1)
    assert there == [[1]]
    assert steps_in(tmp_path) == [2]


@pytest.mark.parametrize("part", ["save_file", "write_json"])
def test_a_save_that_fails_leaves_the_old_one(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, made(1), keep_last=1)

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, part, fail)
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(tmp_path, made(2), keep_last=1)
    assert steps_in(tmp_path) == [1]
    assert same(load_newest(tmp_path), made(1))
    save_checkpoint(tmp_path, made(2), keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["00000002"]


def test_a_full_disk_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, made(1), keep_last=1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 0))
    with pytest.raises(UserError, match="the checkpoint of step 2 needs"):
        save_checkpoint(tmp_path, made(2), keep_last=1)
    assert steps_in(tmp_path) == [1]


def flip_a_byte(folder: Path) -> None:
    path = folder / "weights-x.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(folder: Path) -> None:
    path = folder / "weights-x.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "weights-x.safetensors is damaged": flip_a_byte,
    "weights-x.safetensors is  damaged": truncate,
    "state.json is damaged": lambda folder: (folder / "state.json").write_text("{}"),
    "weights-x.safetensors is missing": lambda folder: (folder / "weights-x.safetensors").unlink(),
    "state.json is missing": lambda folder: (folder / "state.json").unlink(),
    "manifest.json is missing": lambda folder: (folder / "manifest.json").unlink(),
    "manifest.json is damaged": lambda folder: (folder / "manifest.json").write_text('{"state.json'),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_newest_is_passed_over(what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (3, 4):
        save_checkpoint(tmp_path, made(step), keep_last=2)
    DAMAGES[what](tmp_path / "00000004")
    with caplog.at_level(logging.WARNING):
        assert same(load_newest(tmp_path), made(3))
    (record,) = caplog.records
    assert record.getMessage() == f"checkpoint {tmp_path / '00000004'}: {what.replace('  ', ' ')}; taking an older one"


def test_half_written_and_foreign_folders_do_not_count(tmp_path: Path) -> None:
    for name in ("00000009.partial", "notes", "00000009.old.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "00000010").write_text("a file")
    assert steps_in(tmp_path) == []
    assert load_newest(tmp_path) is None
