"""Tar shards: what they hold, who else reads and writes them, what is kept of them, and where a stop leaves them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentgen.core.errors import UserError
from latentgen.data.reading import Reading
from latentgen.data.sources import shard_files, shard_writer
from latentgen.data.sources.folder import FolderStore
from latentgen.data.sources.shard_names import shard_names
from latentgen.data.sources.shard_writer import write_shards
from latentgen.data.sources.shards import ShardStore
from latentgen.data.sources.stored import Pictures

PIXELS = 10_000


def png(number: int = 0, width: int = 9, height: int = 8) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Nine pictures with captions, one of them broken, one with a second picture."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(9):
        (folder / f"p{number}.png").write_bytes(png(number) if number != 4 else b"no picture")
        (folder / f"p{number}.txt").write_text(f"picture {number}\nanother caption {number}")
    (folder / "p2.control.png").write_bytes(png(20))
    return folder


def opened(pattern: str | Path, tmp_path: Path, **more: object) -> ShardStore:
    return ShardStore(str(pattern), local=tmp_path / "local", **more)  # type: ignore[arg-type]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_written_is_read_back_and_equal_input_makes_equal_bytes(pictures: Path, tmp_path: Path) -> None:
    stores = [FolderStore(pictures)]
    written = write_shards(stores, tmp_path / "out", size=6000, max_pixels=PIXELS)
    assert len(written.shards) > 2
    assert written.examples == 8
    assert [name for name, _ in written.skipped] == ["p4.png"]
    assert all(path.stat().st_size <= 6000 for path in written.shards)
    store = opened(tmp_path / "out", tmp_path)
    original, again = Pictures(FolderStore(pictures), Reading(8)), Pictures(store, Reading(8))
    assert again.digests == original.digests
    assert [again.captions(i) for i in range(8)] == [original.captions(i) for i in range(8)]
    assert store.second(2, "control") == png(20)
    assert store.second(1, "control") is None
    assert sum(store.groups) == 8
    write_shards(stores, tmp_path / "twice", size=6000, max_pixels=PIXELS)
    assert content(tmp_path / "twice") == content(tmp_path / "out")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("number", range(1, 9, 2))
def test_a_killed_writer_goes_on_to_the_same_bytes(
    number: int, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = [FolderStore(pictures)]
    write_shards(stores, tmp_path / "whole", size=6000, max_pixels=PIXELS)
    calls = 0
    for name in ("write_file", "write_bytes", "fsync_folder"):
        plain = getattr(shard_writer, name)

        def killed(*args: object, plain=plain) -> object:
            nonlocal calls
            calls += 1
            if calls == number:
                raise Killed
            return plain(*args)

        monkeypatch.setattr(shard_writer, name, killed)
    with pytest.raises(Killed):
        write_shards(stores, tmp_path / "out", size=6000, max_pixels=PIXELS)
    monkeypatch.undo()
    write_shards(stores, tmp_path / "out", size=6000, max_pixels=PIXELS)
    there = {name: data for name, data in content(tmp_path / "out").items() if not name.endswith(".partial")}
    assert there == content(tmp_path / "whole")


def test_a_changed_picture_is_written_anew_and_other_shards_are_left_alone(pictures: Path, tmp_path: Path) -> None:
    write_shards([FolderStore(pictures)], tmp_path / "out", size=6000, max_pixels=PIXELS)
    (pictures / "p0.png").write_bytes(png(99))
    write_shards([FolderStore(pictures)], tmp_path / "out", size=6000, max_pixels=PIXELS)
    store = opened(tmp_path / "out", tmp_path)
    assert store.content(0) == png(99)
    (pictures / "p0.txt").write_text("another caption")
    with pytest.raises(UserError, match="is there already, of other pictures; choose another folder"):
        write_shards([FolderStore(pictures)], tmp_path / "out", size=6000, max_pixels=PIXELS)


def test_webdataset_reads_what_is_written_and_the_other_way_round(pictures: Path, tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    write_shards([FolderStore(pictures)], tmp_path / "out", size=1 << 20, max_pixels=PIXELS)
    (shard,) = sorted((tmp_path / "out").glob("*.tar"))
    rows = list(wds.WebDataset(str(shard), shardshuffle=False))
    assert [row["png"] for row in rows] == [png(number) for number in range(9) if number != 4]
    assert json.loads(rows[0]["json"])["captions"] == ["picture 0", "another caption 0"]
    with wds.TarWriter(str(tmp_path / "theirs.tar")) as writer:
        for number in range(3):
            writer.write({"__key__": f"dir/{number:03d}", "png": png(number), "txt": f"no. {number}"})
    store = opened(tmp_path / "theirs.tar", tmp_path)
    assert [store.content(i) for i in range(3)] == [png(number) for number in range(3)]
    assert store.captions(2) == ("no. 2",)
    assert store.name(1) == "theirs.tar/dir/001.png"


def test_captions_come_from_text_and_from_keys_of_json(tmp_path: Path) -> None:
    files = {
        "a.png": png(),
        "a.txt": b" one \n\n two\n",
        "a.json": json.dumps({"caption": "three", "captions": ["one", "four"], "width": 3}).encode(),
        "b.png": png(1),
        "b.json": json.dumps({"caption": 7}).encode(),
        "c.png": png(2),
        "d.txt": b"no picture",
        "e.jpg": b"broken",
        "e.txt": b"five",
    }
    store = opened(tar(tmp_path / "t.tar", files), tmp_path)
    assert [store.name(i) for i in range(len(store))] == ["t.tar/a.png", "t.tar/e.jpg"]
    assert store.captions(0) == ("one", "two", "three", "four")
    reasons = dict(store.skipped)
    assert "int" in reasons["t.tar/b.png"]
    assert reasons["t.tar/c.png"].startswith("no caption")
    assert "no picture" in reasons["t.tar/d"]
    assert ("t.tar/e.jpg", "not a picture, or damaged at its beginning") in Pictures(store, Reading(8)).skipped
    given = opened(tmp_path / "t.tar", tmp_path, caption="a pet, {caption}", caption_columns=("caption",))
    assert given.captions(0) == ("a pet, one", "a pet, two", "a pet, three")


def test_a_set_is_decoded_once_and_a_changed_shard_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tar(tmp_path / "t.tar", {"a.png": png(), "a.txt": b"x"})
    first = Pictures(opened(path, tmp_path), Reading(8))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("indexed again")

    monkeypatch.setattr(shard_files, "make_index", refuse)
    assert Pictures(opened(path, tmp_path), Reading(8)).key() == first.key()
    monkeypatch.undo()
    tar(path, {"a.png": png(5, 90, 80), "a.txt": b"x"})
    with pytest.raises(UserError, match=r"t.tar/a.png: was fine when training began, now its shard has changed"):
        first.image(0)
    assert Pictures(opened(path, tmp_path), Reading(8)).key() != first.key()


def test_what_was_cut_off_is_lost_alone(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "t.tar",
        {f"{i}.{kind}": png(i) if kind == "png" else b"x" for i in range(6) for kind in ("txt", "png")},
    )
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    store = opened(path, tmp_path)
    assert 0 < len(store) < 6
    assert [store.content(i) for i in range(len(store) - 1)] == [png(i) for i in range(len(store) - 1)]
    assert any("damaged" in reason or "cut" in reason or "short" in reason for _, reason in store.skipped)


def test_patterns(tmp_path: Path) -> None:
    for name in ("a-0.tar", "a-1.tar", "a-10.tar", "b.tar"):
        tar(tmp_path / name, {})
    assert [Path(n).name for n in shard_names(f"{tmp_path}/a-{{0..1}}.tar")] == ["a-0.tar", "a-1.tar"]
    assert [Path(n).name for n in shard_names(f"{tmp_path}/{{b,a-10}}.tar")] == ["b.tar", "a-10.tar"]
    assert [Path(n).name for n in shard_names(f"{tmp_path}/a-*.tar")] == ["a-0.tar", "a-1.tar", "a-10.tar"]
    assert len(shard_names(str(tmp_path))) == 4
    with pytest.raises(UserError, match=r"none-\*\.tar"):
        shard_names(f"{tmp_path}/none-*.tar")
    with pytest.raises(UserError, match="means more than"):
        shard_names("http://localhost/{0..99999999}.tar")
