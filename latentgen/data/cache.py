"""Results computed once and kept on the disk, each entry named by the content that determines it.

An array cache is a folder `KEY/` with `values.npy` (memory-mapped), `keys.npy` and `contents.npy` (16 bytes a row) and
`cache.json`. All processes of a run fill it, each its share, with no collective call between them: a share is done
when its marker file is there. Rows that another cache beside it has under the same key are copied, not computed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latentgen.core.errors import UserError
from latentgen.core.files import (
    clear_leftovers,
    fsync_folder,
    remove_folder,
    require_free_space,
    write_bytes,
    write_json,
)
from latentgen.core.lock import FolderLock
from latentgen.core.log import progress
from latentgen.data.cache_entries import DONE, Donor, Entries, donors_of, opened, why_new

logger = logging.getLogger(__name__)

PATIENCE = 60.0
"""Seconds of waiting for other processes before a warning says what for."""

Compute = Callable[[Sequence[int]], NDArray[np.float16]]


@dataclass(frozen=True)
class ArrayCache:
    """Arrays of one shape, each computed once.

    Args:
        folder: where this cache lives; its name is the key of what determines the values.
        entries: a key for each row.
        shape: shape of one.
        what: shown to the user while it is made ("latents").
    """

    folder: Path
    entries: Entries
    shape: tuple[int, ...]
    what: str

    @property
    def rows(self) -> int:
        return len(self.entries)

    @property
    def values(self) -> Path:
        return self.folder / "values.npy"

    @property
    def bytes(self) -> int:
        return int(self.rows * np.prod(self.shape) * 2)

    def complete(self) -> bool:
        """True when every value is there."""
        return (self.folder / DONE).is_file()

    def open(self) -> NDArray[np.float16]:
        """The values `[rows, *shape]`, float16, memory-mapped and read-only; the folder may be read-only too.

        Raises:
            UserError: the file is not what was written.
        """
        return opened(self.folder, (self.rows, *self.shape))

    def fill(
        self,
        compute: Compute,
        *,
        rank: int,
        world: int,
        chunk: int = 256,
        alive: Callable[[], object] = lambda: None,
    ) -> None:
        """Compute what is missing; returns when all processes have done their share.

        Args:
            compute: rows -> values `[len(rows), *shape]`.
            rank, world: process `rank` of `world` computes every world-th chunk.
            alive: called all the while that another run fills it.
        """
        if self.complete():
            logger.info("%s: reused (%s)", self.what, self.folder)
            if rank == 0 and os.access(self.folder / DONE, os.W_OK):
                os.utime(self.folder / DONE)  # for `prune`: it is in use
            return
        if rank > 0:
            self._fill(compute, rank, world, chunk)
            return
        with FolderLock(self.folder, f"the cache of {self.what}") as lock:
            lock.wait(alive=alive)  # of two runs that need it, one fills it, and the other has it then
            if not self.complete():
                self._fill(compute, rank, world, chunk)

    def _fill(self, compute: Compute, rank: int, world: int, chunk: int) -> None:
        if rank == 0:
            self._allocate()
        wait_for(self.values.is_file, self.folder)
        (self.folder / "done").mkdir(exist_ok=True)
        donors = donors_of(self.folder, self.entries, self.shape)
        if rank == 0:
            self._tell(sum(len(donor.mine) for donor in donors))
        chunks = [range(at, min(at + chunk, self.rows)) for at in range(0, self.rows, chunk)]
        mine = [part for part in chunks[rank::world] if not self._marker(part).is_file()]
        first = self.values.stat().st_size - self.bytes
        with open(self.values, "r+b") as file:
            for part in progress(f"caching {self.what}", "chunk", over=mine, disable=rank != 0, leave=False):
                rows = self._rows(part, donors, compute)
                # Plain writes of exactly these bytes: a memory map would write back whole pages, neighbours' rows too.
                file.seek(first + part.start * self.bytes // self.rows)
                file.write(rows)
                file.flush()
                os.fsync(file.fileno())
                write_bytes(self._marker(part), hashlib.sha256(rows).hexdigest().encode())
        if rank == 0:
            wait_for(lambda: all(self._marker(part).is_file() for part in chunks), self.folder)
            self._finish(chunks)
        wait_for(self.complete, self.folder)

    def _rows(self, part: range, donors: Sequence[Donor], compute: Compute) -> bytes:
        """The values of some rows: what others have is copied, the rest computed, equal entries once."""
        values = np.empty((len(part), *self.shape), dtype=np.float16)
        missing = set(part)
        for donor in donors:
            for row in [row for row in missing if row in donor.mine]:
                values[row - part.start] = donor.values[donor.mine[row]]
                missing.remove(row)
        first: dict[bytes, int] = {}
        for row in sorted(missing):
            first.setdefault(self.entries.key(row), row)
        if first:
            wanted = list(first.values())
            made = dict(zip(first, np.ascontiguousarray(compute(wanted), dtype=np.float16), strict=True))
            for row in missing:
                values[row - part.start] = made[self.entries.key(row)]
        return values.tobytes()

    def _tell(self, copied: int) -> None:
        if copied:
            logger.info("%s: %d of %d computed, %d copied", self.what, self.rows - copied, self.rows, copied)
            return
        reason = why_new(self.folder, self.entries)
        if reason is not None:
            logger.info("%s: all %d are computed anew: %s", self.what, self.rows, reason)

    def _finish(self, chunks: Sequence[range]) -> None:
        """All values are there: the keys go beside them, and the file that says so comes last."""
        self.entries.save(self.folder)
        fsync_folder(self.folder)
        sums = [[part.start, part.stop, self._marker(part).read_text()] for part in chunks]
        about = {"what": self.what, "rows": self.rows, "shape": list(self.shape), "maker": self.entries.maker}
        write_json(self.folder / DONE, {**about, "sha256": sums})

    def _marker(self, part: range) -> Path:
        return self.folder / "done" / f"{part.start}-{part.stop}"

    def _allocate(self) -> None:
        """Make the file; a leftover of the right form from an interrupted run is continued."""
        if self.values.is_file():
            return
        clear_leftovers(self.folder)
        require_free_space(self.folder, self.bytes, f"the cache of {self.what}")
        aside = self.folder / f"values.{os.getpid()}.partial"
        array = np.lib.format.open_memmap(aside, mode="w+", dtype=np.float16, shape=(self.rows, *self.shape))
        array.flush()
        del array
        aside.rename(self.values)


def verify(folder: Path) -> str | None:
    """Read all of a complete cache; what is wrong with it, None where nothing is."""
    about = json.loads((folder / DONE).read_text(encoding="utf-8"))
    try:
        values = opened(folder, (about["rows"], *about["shape"]))
    except UserError as error:
        return str(error)
    for start, stop, digest in about["sha256"]:
        if hashlib.sha256(np.ascontiguousarray(values[start:stop]).tobytes()).hexdigest() != digest:
            return f"{folder}: rows {start} to {stop - 1} are not what was written; remove it, and it is made again"
    return None


def prune(folder: Path, days: float) -> list[tuple[Path, int]]:
    """Remove complete caches that nothing has used for so many days; their folders, and the bytes that they had.

    Args:
        folder: all caches, `data.cache`. One that is being filled is left alone.
    """
    removed = []
    for done in sorted(folder.glob(f"*/*/{DONE}")):
        if time.time() - done.stat().st_mtime < days * 86_400:
            continue
        with FolderLock(done.parent, f"the cache {done.parent}") as lock:
            lock.acquire()
        size = sum(path.stat().st_size for path in done.parent.rglob("*") if path.is_file())
        remove_folder(done.parent)
        removed.append((done.parent, size))
    return removed


def wait_for(ready: Callable[[], bool], folder: Path) -> None:
    """Wait on the disk, not in a collective call that would time out while another process is still computing.

    Args:
        folder: what is being filled, for the warning.
    """
    begun, told = time.monotonic(), False
    while not ready():
        if time.monotonic() - begun > PATIENCE and not told:
            logger.warning("still waiting for other processes to fill %s (do all of them share it?)", folder)
            told = True
        time.sleep(0.05)
