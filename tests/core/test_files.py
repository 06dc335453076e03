"""A file or a folder is there whole, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
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


def test_leftovers_of_killed_writers_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for name in (f"a/report.html.{gone.pid}.partial", f"b/report.html.{os.getpid()}.partial", "c/report.html"):
        write_bytes(tmp_path / name, b"x")
    (tmp_path / f"step.{gone.pid}.partial").mkdir()
    files.clear_leftovers(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*"))
    assert left == [f"b/report.html.{os.getpid()}.partial", "c/report.html", f"step.{gone.pid}.partial"]


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


def test_write_file_tells_the_hash_of_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [b"one", memoryview(bytes(range(256)) * 9), b""]
    digest = files.write_file(tmp_path / "x", blocks)
    content = (tmp_path / "x").read_bytes()
    assert content == b"".join(blocks)
    assert digest == hashlib.sha256(content).hexdigest()
    plain = os.write
    monkeypatch.setattr(os, "write", lambda handle, block: plain(handle, block[: max(1, len(block) // 2)]))
    assert files.write_file(tmp_path / "y", blocks) == digest, "a disk may take less than it is given"
    assert (tmp_path / "y").read_bytes() == content


def test_read_file(tmp_path: Path) -> None:
    for content in (b"", b"x", bytes(range(256)) * 40):
        (tmp_path / "x").write_bytes(content)
        assert files.read_file(tmp_path / "x").numpy().tobytes() == content
    with pytest.raises(FileNotFoundError):
        files.read_file(tmp_path / "absent")


def test_a_folder_moved_away_comes_back(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", lambda aside: write_bytes(aside / "one", b"1"))
    (tmp_path / "f").rename(tmp_path / "f.old.partial")  # killed between the two renames of a replacement
    files.recover_folder(tmp_path / "f")
    assert names(tmp_path) == ["f"]
    (tmp_path / "f.old.partial").mkdir()  # killed after the second
    files.recover_folder(tmp_path / "f")
    assert names(tmp_path) == ["f"]
    assert names(tmp_path / "f") == ["one"]


def test_remove_folder_takes_the_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "f", lambda aside: write_bytes(aside / "one", b"1"))
    (tmp_path / "f.partial").mkdir()  # of an earlier kill
    seen: list[list[str]] = []
    plain = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path: (seen.append(names(tmp_path)), plain(path)))
    files.remove_folder(tmp_path / "f")
    assert seen == [["f", "f.partial"], ["f.partial"]]
    assert names(tmp_path) == []


def test_an_error_of_the_disk_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space") as caught, files.naming(tmp_path / "log"):
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")
    assert caught.value.filename == str(tmp_path / "log")
    with pytest.raises(FileNotFoundError) as missing, files.naming(tmp_path / "log"):
        os.open(tmp_path / "other", os.O_RDONLY)
    assert missing.value.filename == str(tmp_path / "other")
