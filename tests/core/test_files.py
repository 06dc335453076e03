"""A file or a folder is there whole, or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from latentgen.core import files
from latentgen.core.errors import UserError
from latentgen.core.files import content_key, file_sha256, require_free_space, write_bytes, write_folder, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_bytes_replaces_and_leaves_nothing_aside(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a" / "x", b"old")
    write_bytes(tmp_path / "a" / "x", b"new")
    assert (tmp_path / "a" / "x").read_bytes() == b"new"
    assert names(tmp_path / "a") == ["x"]


def test_write_bytes_keeps_the_old_file_when_the_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(tmp_path / "x", b"old")

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_bytes(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"


def test_write_json_round_trips_in_order(tmp_path: Path) -> None:
    value = {"b": 1, "a": ["ü", None, 0.1]}
    write_json(tmp_path / "x.json", value)
    read = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert read == value
    assert list(read) == ["b", "a"]


def test_write_folder_makes_and_replaces(tmp_path: Path) -> None:
    write_folder(tmp_path / "deep" / "f", lambda aside: write_bytes(aside / "sub" / "one", b"1"))
    assert (tmp_path / "deep" / "f" / "sub" / "one").read_bytes() == b"1"
    write_folder(tmp_path / "deep" / "f", lambda aside: write_bytes(aside / "two", b"2"))
    assert names(tmp_path / "deep" / "f") == ["two"]
    assert names(tmp_path / "deep") == ["f"]


def test_write_folder_keeps_the_old_one_when_filling_fails(tmp_path: Path) -> None:
    target = tmp_path / "f"
    write_folder(target, lambda aside: write_bytes(aside / "one", b"1"))

    def fail(aside: Path) -> None:
        write_bytes(aside / "half", b"?")
        assert (target / "one").read_bytes() == b"1"
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_folder(target, fail)
    assert names(target) == ["one"]
    write_folder(target, lambda aside: write_bytes(aside / "two", b"2"))
    assert names(target) == ["two"], "the leftover of the failed attempt must not come along"
    assert names(tmp_path) == ["f"]


def test_write_folder_is_absent_until_it_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, seen = tmp_path / "f", []
    flush = files.fsync_tree

    def spy(folder: Path) -> None:
        seen.append((target.exists(), names(folder)))
        flush(folder)

    monkeypatch.setattr(files, "fsync_tree", spy)
    write_folder(target, lambda aside: write_bytes(aside / "one", b"1"))
    assert seen == [(False, ["one"])]
    assert target.is_dir()


def test_file_sha256_reads_more_than_one_block(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(content)
    assert file_sha256(tmp_path / "x") == hashlib.sha256(content).hexdigest()


def test_content_key_names_content() -> None:
    key = content_key("latents", 1, {"a": 1, "b": [True, None]})
    assert key == content_key("latents", 1, {"b": [True, None], "a": 1}), "the order of keys is no content"
    assert len(key) == 32
    others = [
        content_key("latents", 1, {"a": 1}),
        content_key("latents1", {"a": 1}),
        content_key("latents", "1", {"a": 1}),
    ]
    assert len({key, *others}) == 4


def test_content_key_refuses_what_is_not_json() -> None:
    with pytest.raises(TypeError):
        content_key(Path("x"))


def test_require_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    asked = []

    def disk(path: Path) -> usage:
        asked.append(Path(path))
        return usage(1 << 40, 0, 100 << 20)

    monkeypatch.setattr(shutil, "disk_usage", disk)
    require_free_space(tmp_path / "not" / "yet", 84 << 20, "the cache")
    assert asked == [tmp_path], "the nearest folder that exists"
    with pytest.raises(UserError, match=r"the cache needs 85 MiB at .*only 100 MiB are free"):
        require_free_space(tmp_path, 85 << 20, "the cache")
