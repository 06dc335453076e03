"""Checkpoints: complete or absent, checked before use."""

from __future__ import annotations

import logging
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from latentgen.core import files
from latentgen.core.errors import UserError
from latentgen.core.files import begin_folder
from latentgen.engine import checkpoint as module
from latentgen.engine.checkpoint import (
    Checkpoint,
    Contents,
    Damaged,
    Keep,
    load_newest,
    name_of,
    read_checkpoint,
    save_checkpoint,
    steps_in,
)


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
    path = save_checkpoint(tmp_path / "c", made(7), Keep(2))
    assert path == tmp_path / "c" / "00000007"
    assert same(load_newest(tmp_path / "c"), made(7))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 5, 10):
        save_checkpoint(tmp_path, made(step), Keep(2))
    assert steps_in(tmp_path) == [5, 10]
    assert same(load_newest(tmp_path), made(10))


def test_the_old_one_goes_only_when_the_new_one_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, made(1), Keep(1))
    flush, there = files.fsync_tree, []

    def spy(folder: Path) -> None:
        there.append(steps_in(tmp_path))
        flush(folder)

    monkeypatch.setattr(files, "fsync_tree", spy)
    save_checkpoint(tmp_path, made(2), Keep(1))
    assert there == [[1]]
    assert steps_in(tmp_path) == [2]


@pytest.mark.parametrize("part", ["write_file", "finish_folder"])
def test_a_save_that_fails_leaves_the_old_one(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, made(1), Keep(1))

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, part, fail)
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(tmp_path, made(2), Keep(1))
    assert steps_in(tmp_path) == [1]
    assert same(load_newest(tmp_path), made(1))
    save_checkpoint(tmp_path, made(2), Keep(1))
    assert [path.name for path in tmp_path.iterdir()] == ["00000002"]


def test_a_full_disk_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, made(1), Keep(1))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 0))
    with pytest.raises(UserError, match="the checkpoint of step 2 needs"):
        save_checkpoint(tmp_path, made(2), Keep(1))
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
        save_checkpoint(tmp_path, made(step), Keep(2))
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


def test_every_bit_counts(tmp_path: Path) -> None:
    """A bit flipped in any byte of any file, and any file cut anywhere, is found out."""
    path = save_checkpoint(tmp_path, Checkpoint(1, {"m": {"a": torch.ones(2)}}, {}), Keep(1), score=0.5)
    assert sorted(file.name for file in path.iterdir()) == ["m.safetensors", "manifest.json", "state.json"]
    for file in path.iterdir():
        content = file.read_bytes()
        for at in range(len(content)):
            file.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
            with pytest.raises(Damaged, match=file.name):
                read_checkpoint(path)
            if at % 7 == 0 or at == len(content) - 1:
                file.write_bytes(content[:at])
                with pytest.raises(Damaged, match=file.name):
                    read_checkpoint(path)
        file.write_bytes(content)
    assert read_checkpoint(path).step == 1


def test_a_checkpoint_under_another_name_is_none(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, made(3), Keep(1)).rename(tmp_path / "00000009")
    with pytest.raises(Damaged):
        read_checkpoint(tmp_path / "00000009")


def test_what_the_manifest_does_not_name_is_not_read(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, made(3), Keep(1))
    save_file({"a": torch.zeros(1)}, path / "weights-y.safetensors")
    assert same(load_newest(tmp_path), made(3))


def test_each_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is used is what was hashed: files that change after they were read change nothing."""
    path, plain, read = save_checkpoint(tmp_path, made(3), Keep(1)), module.read_file, []

    def once(file: Path) -> torch.Tensor:
        content = plain(file)
        read.append(file.name)
        file.write_bytes(bytes(len(content)))
        return content

    monkeypatch.setattr(module, "read_file", once)
    assert same(read_checkpoint(path), made(3))
    assert sorted(read) == ["manifest.json", "meter.safetensors", "state.json", "weights-x.safetensors"]


def test_an_unreadable_file_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, plain = save_checkpoint(tmp_path, made(3), Keep(1)), module.read_file

    def bad_sector(file: Path) -> torch.Tensor:
        if file.name == "weights-x.safetensors":
            raise OSError(5, "Input/output error", str(file))
        return plain(file)

    monkeypatch.setattr(module, "read_file", bad_sector)
    with pytest.raises(Damaged, match=r"weights-x.safetensors cannot be read: Input/output error"):
        read_checkpoint(path)


@given(
    scores=st.dictionaries(st.integers(0, 40), st.none() | st.floats(0, 1), min_size=1),
    keep=st.builds(Keep, st.integers(1, 4), st.none() | st.integers(1, 7), st.integers(0, 3)),
)
def test_what_is_kept(scores: dict[int, float | None], keep: Keep) -> None:
    kept = keep.of(scores)
    assert kept <= scores.keys()
    assert set(sorted(scores)[-keep.last :]) <= kept
    measured = sorted(score for score in scores.values() if score is not None)
    for step, score in scores.items():
        newest = step in sorted(scores)[-keep.last :]
        spaced = keep.every is not None and step % keep.every == 0
        beaten = score is None or sum(other < score for other in measured) >= keep.best
        if spaced:
            assert step in kept
        if not newest and not spaced and beaten:
            assert step not in kept
    if keep.best and measured:
        assert any(scores[step] == measured[0] for step in kept), "the best is there"


def test_steps_kept_at_intervals(tmp_path: Path) -> None:
    for step in range(1, 9):
        save_checkpoint(tmp_path, made(step), Keep(2, every=3))
    assert steps_in(tmp_path) == [3, 6, 7, 8]


def write_parts(folder: Path, cuts: list[range]) -> None:
    """A checkpoint of a tensor `[5, 2]`, whose rows were spread over processes."""
    aside, listing = begin_folder(folder / name_of(4)), {}
    for rank, own in enumerate(cuts):
        part = Contents({"a": ROWS[own.start : own.stop].clone()}, {"a": (own.start, 5)})
        listing |= module.write_contents(aside, {f"weights-x.part-{rank}-of-{len(cuts)}.safetensors": part})
    listing |= module.write_contents(aside, {"weights-x.safetensors": Contents({"whole": torch.ones(3)})})
    module.commit(folder, 4, {"scaler": None}, listing, None)


ROWS = torch.arange(10.0).view(5, 2)


@pytest.mark.parametrize("cuts", [[range(3), range(3, 5)], [range(2), range(2, 4), range(4, 5)]])
@pytest.mark.parametrize("wanted", [None, range(5), range(2), range(1, 4), range(4, 5), range(5, 5)])
def test_any_rows_are_put_together_from_any_parts(cuts: list[range], wanted: range | None, tmp_path: Path) -> None:
    write_parts(tmp_path, cuts)
    asked = []

    def rows(group: str, name: str, shape: torch.Size) -> range | None:
        asked.append((group, name, tuple(shape)))
        return wanted if name == "a" else None

    found = read_checkpoint(tmp_path / name_of(4), rows).tensors["weights-x"]
    span = range(5) if wanted is None else wanted
    assert torch.equal(found["a"], ROWS[span.start : span.stop])
    assert torch.equal(found["whole"], torch.ones(3))
    assert set(asked) == {("weights-x", "a", (5, 2)), ("weights-x", "whole", (3,))}


def test_missing_rows_are_damage(tmp_path: Path) -> None:
    write_parts(tmp_path, [range(2), range(3, 5)])
    with pytest.raises(Damaged, match="1 rows of weights-x/a are missing"):
        read_checkpoint(tmp_path / name_of(4))


def test_files_are_those_of_the_library(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, made(7), Keep(1))
    assert torch.equal(load_file(path / "weights-x.safetensors")["a"], torch.full((2, 3), 7.0))
