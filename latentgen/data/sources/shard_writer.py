"""Shards written from any store: the pictures' own files, captions, and an index beside each shard.

Equal input makes equal bytes: nothing of the time, the user or the machine goes into them. A shard is complete or
absent. Its index comes first, the shard after it, and a later call takes what is whole and right as it is.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from latentgen.core.errors import UserError
from latentgen.core.files import (
    ASIDE,
    clear_leftovers,
    content_key,
    fsync_folder,
    make_folder,
    require_free_space,
    write_bytes,
    write_file,
)
from latentgen.core.log import progress
from latentgen.data.checking import Checked, check_pictures
from latentgen.data.images import BadPicture
from latentgen.data.sources.shard_index import (
    ENDING,
    SECONDS,
    BadIndex,
    Entry,
    Place,
    ShardIndex,
    index_lines,
    read_index,
    read_place,
)
from latentgen.data.sources.stored import Store
from latentgen.data.tar import BLOCK

VERSION = 1
"""Of what is written; to be raised when equal input makes other bytes."""
_CHUNK = 32
"""Examples that are read and decoded at once."""
_ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}
_END = bytes(2 * BLOCK)


class Written(NamedTuple):
    """What came of it: shards in their order, examples, bytes, and (name, reason) of what was left out."""

    shards: list[Path]
    examples: int
    bytes: int
    skipped: list[tuple[str, str]]


class _Ready(NamedTuple):
    """An example with all its files, or the reason why it is left out."""

    number: int
    checked: Checked
    files: list[tuple[str, bytes]]


def write_shards(
    stores: Sequence[Store], folder: Path, *, name: str = "train", size: int = 1 << 28, max_pixels: int
) -> Written:
    """Write the examples of all stores into `folder` as `NAME-00000.tar` and so on; go on where a call was cut off.

    Args:
        size: bytes of a shard, at most, unless one example has more.
        max_pixels: larger pictures are left out, as are broken ones.

    Raises:
        UserError: other shards are in the folder; no picture can be used; a picture changes meanwhile.
    """
    folder, examples = Path(folder), _Examples(stores, max_pixels)
    make_folder(folder)
    clear_leftovers(folder)
    key = content_key("shards", VERSION, name, size, max_pixels, examples.key())
    there = _require_own(folder, name, key)
    indexes: list[ShardIndex] = []
    paths: list[Path] = []
    at, stream = 0, examples.ready(0)
    with progress("writing shards", "picture", total=len(examples)) as bar:
        while at < len(examples):
            path = folder / f"{name}-{len(paths):05d}.tar"
            index = there.pop(path, None)
            if index is not None and index.notes["first"] == at and _same(path, index, examples):
                stream = examples.ready(index.notes["next"])
            else:
                index, stream = _write(path, stream, examples, {"source": key, "first": at}, size)
            bar.update(index.notes["next"] - at)
            at = index.notes["next"]
            paths.append(path)
            indexes.append(index)
    for path in there:  # of the same input, when a picture in it was another
        path.unlink(missing_ok=True)
        path.with_name(path.name + ENDING).unlink()
    left_out = [(name, reason) for index in indexes for name, reason in index.notes["left_out"]]
    skipped = [*(item for store in stores for item in store.skipped), *left_out]
    return Written(paths, sum(len(index.entries) for index in indexes), sum(i.bytes for i in indexes), skipped)


class _Examples:
    """The examples of several stores, one store after the other."""

    def __init__(self, stores: Sequence[Store], max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self._of = [(store, index) for store in stores for index in range(len(store))]

    def __len__(self) -> int:
        return len(self._of)

    def key(self) -> str:
        digest = hashlib.sha256()
        for store, index in self._of:
            digest.update(content_key(store.name(index), store.captions(index)).encode())
        return digest.hexdigest()

    def name(self, number: int) -> str:
        store, index = self._of[number]
        return store.name(index)

    def content(self, number: int) -> bytes:
        store, index = self._of[number]
        return store.content(index)

    def second(self, number: int, kind: str) -> bytes | None:
        store, index = self._of[number]
        return store.second(index, kind)

    def ready(self, first: int) -> Iterator[_Ready]:
        """All from number `first` on, several read and decoded at a time."""
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            for start in range(first, len(self), _CHUNK):
                yield from pool.map(self._read, range(start, min(start + _CHUNK, len(self))))

    def _read(self, number: int) -> _Ready:
        store, index = self._of[number]
        try:
            content = self.content(number)
            checked = store.known(index) or check_pictures([partial(bytes, content)], self.max_pixels)[0]
            if checked.reason:
                return _Ready(number, checked, [])
            files = [(_ending(content), content)]
            for kind in SECONDS:
                second = self.second(number, kind)
                files += [] if second is None else [(f"{kind}.{_ending(second)}", second)]
        except BadPicture as error:
            return _Ready(number, Checked("", (0, 0), str(error)), [])
        captions, (height, width) = store.captions(index), checked.size
        about = {"captions": captions, "name": self.name(number), "sha256": checked.digest}
        about |= {"height": height, "width": width}
        files += [("txt", "".join(f"{caption}\n" for caption in captions).encode())]
        files += [("json", json.dumps(about, ensure_ascii=False).encode())]
        return _Ready(number, checked, files)


def _ending(content: bytes) -> str:
    """The ending of a picture's file by what it holds: its name may say another."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return _ENDINGS.get(image.format or "", (image.format or "").lower())
    except Exception as error:  # Pillow's plugins raise nearly every type of exception
        raise BadPicture(f"a second picture of it cannot be read ({type(error).__name__})") from error


def _require_own(folder: Path, name: str, key: str) -> dict[Path, ShardIndex]:
    """The shards in `folder` that an earlier call wrote of the same input; any others of this name are an error."""
    found = {}
    for path in sorted(folder.iterdir()):
        if not re.fullmatch(rf"{re.escape(name)}-[0-9]+\.tar({re.escape(ENDING)})?", path.name):
            continue
        shard = path.with_name(path.name.removesuffix(ENDING))
        beside = shard.with_name(shard.name + ENDING)
        try:
            index = read_index(beside.read_bytes())
        except (BadIndex, FileNotFoundError):
            index = None
        if index is None or index.notes.get("source") != key:
            raise UserError(f"{folder}: {path.name} is there already, of other pictures; choose another folder")
        found[shard] = index
    return found


def _same(path: Path, index: ShardIndex, examples: _Examples) -> bool:
    """Whether a shard is there and holds the pictures as they are now."""
    if not path.is_file() or path.stat().st_size != index.bytes:
        return False
    with open(path, "rb") as file:
        for entry in index.entries:
            number = int(entry.name)
            try:
                now = {kind: examples.second(number, kind) for kind in SECONDS}
                then = {kind: read_place(file.fileno(), place) for kind, place in entry.seconds.items()}
                if read_place(file.fileno(), entry.picture) != examples.content(number):
                    return False
            except BadPicture:
                return False
            if {kind: content for kind, content in now.items() if content is not None} != then:
                return False
    return True


def _write(
    path: Path, stream: Iterator[_Ready], examples: _Examples, notes: dict, size: int
) -> tuple[ShardIndex, Iterator[_Ready]]:
    """Write one shard of what comes next; returns its index, and what comes after it."""
    entries: list[Entry] = []
    left_out: list[tuple[str, str]] = []
    rest: list[_Ready] = []

    def blocks() -> Iterator[bytes]:
        at = 0
        for ready in stream:
            if ready.checked.reason:
                left_out.append((examples.name(ready.number), ready.checked.reason))
                continue
            more = sum(BLOCK + len(content) + _padding(content) for _, content in ready.files)
            if entries and at + more + len(_END) > size:
                rest.append(ready)
                break
            places = {}
            for ending, content in ready.files:
                yield _header(f"{ready.number:09d}.{ending}", len(content))
                yield content
                yield bytes(_padding(content))
                places[ending] = Place(at + BLOCK, len(content))
                at += BLOCK + len(content) + _padding(content)
            entries.append(_entry(ready, places))
        yield _END

    require_free_space(path.parent, size, "a shard")
    aside = path.with_name(f"{path.name}.{os.getpid()}{ASIDE}")
    digest = write_file(aside, blocks())
    if not entries:
        aside.unlink()
        why = f"{left_out[0][0]}: {left_out[0][1]}" if left_out else "it is empty"
        raise UserError(f"none of {len(examples)} pictures can be used ({why})")
    notes = {**notes, "next": rest[0].number if rest else len(examples), "left_out": left_out}
    index = ShardIndex(aside.stat().st_size, digest, examples.max_pixels, tuple(entries), notes=notes)
    write_bytes(path.with_name(path.name + ENDING), index_lines(index))
    aside.replace(path)
    fsync_folder(path.parent)
    return index, _chained(rest, stream)


def _chained(first: list[_Ready], then: Iterator[_Ready]) -> Iterator[_Ready]:
    yield from first
    yield from then


def _entry(ready: _Ready, places: dict[str, Place]) -> Entry:
    files = dict(ready.files)
    ending = ready.files[0][0]
    seconds = {kind: place for name, place in places.items() for kind in SECONDS if name.startswith(f"{kind}.")}
    text, data = files["txt"].decode(), json.loads(files["json"])
    return Entry(f"{ready.number:09d}", ending, places[ending], seconds, text, data, "", ready.checked)


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


def _padding(content: bytes) -> int:
    return -len(content) % BLOCK
