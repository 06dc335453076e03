"""Shards wherever they lie: their indexes, and their bytes.

The local folder holds a folder for each shard: its index, what is known of the file that the index was made of, and,
where the shard lies elsewhere, the shard itself for as long as there is room. Any number of processes share it: one
fetches or indexes a shard, under a lock that ends with it, and the others wait for that shard alone.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

from latentgen.core.errors import UserError
from latentgen.core.files import content_key, file_sha256, make_folder, require_free_space, write_bytes, write_json
from latentgen.core.lock import FolderLock, remove_unused, share
from latentgen.data.images import BadPicture
from latentgen.data.remote import PARTIAL, Origin, download, is_remote, look
from latentgen.data.sources.shard_index import (
    ENDING,
    BadIndex,
    Place,
    ShardIndex,
    index_lines,
    make_index,
    read_index,
    read_place,
)

log = logging.getLogger(__name__)

SHARD, INDEX, ORIGIN = "shard.tar", "index.jsonl", "origin.json"
FETCHED, EXPECTED = "fetched.tar", "expected"
"""A shard that is on its way, and how large it will be."""
MAX_INDEX = 1 << 30
AT_ONCE = 8
"""Shards that are asked about, or fetched, at the same time."""
OPEN = 64
"""Local shards that a process holds open."""


class ShardFiles:
    """The bytes of shards, and what their indexes say.

    Args:
        names: paths and addresses of the shards.
        folder: the local folder.
        gib: how large the shards in it may become. One that a process has open is never removed: where those in use
            need more, the folder becomes larger for as long.
        window: shards from elsewhere that a process needs at once, and holds open.
        max_pixels: of the pictures that are decoded while an index is made.

    Raises:
        UserError: a shard is not there, or cannot be fetched.
    """

    def __init__(self, names: Sequence[str], folder: Path, *, gib: float, window: int, max_pixels: int) -> None:
        self.names, self.folder, self.limit = tuple(names), Path(folder), int(gib * 2**30)
        self.window, self.max_pixels = window, max_pixels
        self._forget()
        make_folder(self.folder)
        numbers = range(len(self.names))
        # Processes that begin at different shards index them together, in place of waiting for each other.
        first = os.getpid() % len(numbers)
        found: dict[int, ShardIndex] = {}
        if any(map(is_remote, self.names)):
            with ThreadPoolExecutor(AT_ONCE) as pool:
                found = dict(zip(numbers, pool.map(self._index, numbers), strict=True))
        else:
            found = {number: self._index(number) for number in (*numbers[first:], *numbers[:first])}
        self.indexes = tuple(found[number] for number in numbers)
        # Those in use, those of the next window, and one on its way.
        self.room_ahead = self.limit >= (2 * window + 1) * max(index.bytes for index in self.indexes)

    def read(self, number: int, place: Place) -> bytes:
        """Bytes of shard `number`. Raises `BadPicture` where they are not there any more."""
        return read_place(self._opened(number).fileno(), place)

    def soon(self, numbers: Sequence[int]) -> None:
        """Fetch these shards from elsewhere in the background, unless that has been begun already.

        Where there is no room for them beside those in use, they are fetched when they are read, as is one that could
        not be fetched here.
        """
        if not self.room_ahead:
            return
        self._own()
        away = [number for number in numbers if is_remote(self.names[number]) and number not in self._asked]
        if away and (self._ahead is None or not self._ahead.is_alive()):
            self._asked = set(numbers)
            # A daemon: what it has not fetched when the process ends, nobody waits for.
            self._ahead = threading.Thread(target=self._fetch_ahead, args=(away,), daemon=True)
            self._ahead.start()

    def _fetch_ahead(self, numbers: Sequence[int]) -> None:
        try:
            for number in numbers:
                self._at_hand(number)
        except (UserError, OSError) as error:  # said again to whoever reads the shard
            log.debug("%s", error)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def _forget(self) -> None:
        self._handles: OrderedDict[int, FileIO] = OrderedDict()
        self._owner, self._lock = os.getpid(), threading.Lock()
        self._asked: set[int] = set()
        self._ahead: threading.Thread | None = None

    def _own(self) -> None:
        """Leave to the other process what a forked one has inherited."""
        if self._owner != os.getpid():
            self._forget()

    def _place(self, number: int) -> Path:
        """The folder of one shard."""
        name = self.names[number]
        where = name if is_remote(name) else str(Path(name).resolve())
        return self.folder / f"{Path(name).stem[-60:]}-{content_key(where)[:16]}"

    def _index(self, number: int) -> ShardIndex:
        name, place = self.names[number], self._place(number)
        place.mkdir(exist_ok=True)
        with FolderLock(place, f"the index of {name}") as lock:
            lock.wait(level=logging.DEBUG)
            return self._index_of_remote(number) if is_remote(name) else _index_of_local(name, place, self.max_pixels)

    def _index_of_remote(self, number: int) -> ShardIndex:
        """The index beside a shard, else one that is made of the shard after it is fetched; a changed one anew."""
        name, place = self.names[number], self._place(number)
        beside = look(name + ENDING)
        origin = beside or look(name)
        if origin is None:
            raise UserError(f"{name}: not there; check data.path")
        kept = _kept(place, origin)
        if kept is not None:
            return kept
        for old in (SHARD, FETCHED, FETCHED + PARTIAL, INDEX, ORIGIN):
            (place / old).unlink(missing_ok=True)
        index = None if beside is None else _fetched_index(name, place, beside)
        if index is None:
            fetched = self._download(number, origin.bytes if beside is None else None)
            index = _made(name, fetched, self.max_pixels)
            self._finish(number)
        return _keep(place, index, origin)

    def _opened(self, number: int) -> FileIO:
        self._own()
        with self._lock:
            file = self._handles.get(number)
            if file is not None:
                self._handles.move_to_end(number)
                return file
        remote = is_remote(self.names[number])
        file = self._open_remote(number) if remote else self._open_local(number)
        with self._lock:
            self._handles[number] = file
            most = self.window if remote else OPEN
            while len(self._handles) > most:
                self._handles.popitem(last=False)  # closed when no thread reads it any more
        return file

    def _open_local(self, number: int) -> FileIO:
        try:
            file = FileIO(self.names[number])
        except OSError as error:
            raise BadPicture(f"its shard cannot be read: {error.strerror}") from error
        if os.fstat(file.fileno()).st_size != self.indexes[number].bytes:
            raise BadPicture("its shard has changed")
        return file

    def _open_remote(self, number: int) -> FileIO:
        path = self._place(number) / SHARD
        while True:
            self._at_hand(number)
            try:
                file = FileIO(str(path))
            except FileNotFoundError:  # another process has made room this moment
                continue
            if share(file.fileno(), path):
                os.utime(path)
                return file

    def _at_hand(self, number: int) -> None:
        if (self._place(number) / SHARD).is_file():
            return
        with FolderLock(self._place(number), f"the shard {self.names[number]}") as lock:
            lock.wait(level=logging.DEBUG)
            if not (self._place(number) / SHARD).is_file():
                index = self.indexes[number]
                self._fetch(number, index.bytes, index.sha256)

    def _fetch(self, number: int, size: int, sha256: str) -> None:
        """Download a shard, and compare it with its index."""
        for _ in range(2):
            if file_sha256(self._download(number, size)) == sha256:
                self._finish(number)
                return
            (self._place(number) / FETCHED).unlink()  # parts of two versions, perhaps: once more from its beginning
        raise UserError(f"{self.names[number]}: is not the shard that its index was made of; make the index anew")

    def _download(self, number: int, size: int | None) -> Path:
        path = self._place(number) / FETCHED
        self._make_room(path.parent, size or 0)
        log.debug("%s: fetching %s bytes", self.names[number], size)
        download(self.names[number], path, size=size)
        return path

    def _finish(self, number: int) -> None:
        """What was fetched is good: from now on others see it, and may remove it."""
        place = self._place(number)
        (place / FETCHED).replace(place / SHARD)
        (place / EXPECTED).unlink(missing_ok=True)

    def _make_room(self, place: Path, needed: int) -> None:
        """Remove shards, those first that were not used for longest, until there is room for one more in `place`."""
        with FolderLock(self.folder, f"the folder {self.folder}") as lock:
            lock.wait(level=logging.DEBUG)
            others = [file.parent for file in self.folder.glob(f"*/{EXPECTED}") if file.parent != place]
            underway = sum(int((other / EXPECTED).read_text() or 0) for other in others if not _abandoned(other))
            there = [(file.stat(), file) for file in self.folder.glob(f"*/{SHARD}")]
            excess = sum(stat.st_size for stat, _ in there) + underway + needed - self.limit
            for stat, file in sorted(there, key=lambda item: item[0].st_mtime_ns):
                if excess > 0 and remove_unused(file):
                    excess -= stat.st_size
            if excess > 0:
                log.warning(
                    "%s becomes %.2f GiB larger than data.local_gib: all that is in it is in use; a smaller "
                    "data.window needs less",
                    *(self.folder, excess / 2**30),
                )
            require_free_space(self.folder, needed, "a shard")
            write_bytes(place / EXPECTED, str(needed).encode())


def _abandoned(place: Path) -> bool:
    """Whether nobody fetches there any more; what was begun is then removed."""
    lock = FolderLock(place, "a shard")
    try:
        lock.acquire()
    except UserError:
        return False
    with lock:
        for name in (FETCHED, FETCHED + PARTIAL, EXPECTED):
            (place / name).unlink(missing_ok=True)
    return True


def _index_of_local(name: str, place: Path, max_pixels: int) -> ShardIndex:
    """What is known of an unchanged file; else the index beside it, if it was made of this very file; else a new one.

    That a file is unchanged is told by its size and time. One with others is hashed, and its index used again where the
    content is what it was.
    """
    path = Path(name)
    try:
        stat = path.stat()
        origin = Origin(stat.st_size, str(stat.st_mtime_ns))
        kept = _kept(place, origin)
        if kept is not None:
            return kept
        digest = file_sha256(path)
        for file in (place / INDEX, path.with_name(path.name + ENDING)):
            index = _read(file)
            if index is not None and (index.sha256, index.bytes) == (digest, stat.st_size):
                return _keep(place, index, origin)
            if index is not None and file.parent != place:
                log.warning("%s: the index beside it is of another file; it is not used", name)
        return _keep(place, _made(name, path, max_pixels, digest), origin)
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror}); check data.path") from error


def _made(name: str, path: Path, max_pixels: int, digest: str | None = None) -> ShardIndex:
    index = make_index(path, max_pixels, digest)
    log.info("%s: indexed, %d pictures", name, len(index.entries))
    return index


def _read(file: Path) -> ShardIndex | None:
    """The index in a file; None where there is none that can be used."""
    try:
        return read_index(file.read_bytes())
    except FileNotFoundError:
        return None
    except BadIndex as error:
        log.warning("%s: %s; it is not used", file, error)
        return None


def _fetched_index(name: str, place: Path, beside: Origin) -> ShardIndex | None:
    if beside.bytes is not None and beside.bytes > MAX_INDEX:
        log.warning("%s%s: has %d bytes; it is not used", name, ENDING, beside.bytes)
        return None
    path = place / f"fetched{ENDING}"
    download(name + ENDING, path, size=beside.bytes)
    index = _read(path)
    path.unlink()
    return index


def _kept(place: Path, origin: Origin) -> ShardIndex | None:
    """The index in the local folder, if it is of this file."""
    try:
        there = json.loads((place / ORIGIN).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return _read(place / INDEX) if there == [*origin] else None


def _keep(place: Path, index: ShardIndex, origin: Origin) -> ShardIndex:
    write_bytes(place / INDEX, index_lines(index))
    write_json(place / ORIGIN, [*origin])  # after it: it says that the index is there
    return index
