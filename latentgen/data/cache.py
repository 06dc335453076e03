"""Results computed once and kept on the disk, named by the content that determines them.

An array cache is a folder `KEY/` with `values.npy` (memory-mapped) and `cache.json`. All processes of a run fill it,
each its share, with no collective call between them: a share is done when its marker file is there.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latentgen.core.files import clear_leftovers, fsync_folder, require_free_space, write_json
from latentgen.core.lock import FolderLock
from latentgen.core.log import progress

logger = logging.getLogger(__name__)

PATIENCE = 60.0
"""Seconds of waiting for other processes before a warning says what for."""


@dataclass(frozen=True)
class ArrayCache:
    """`rows` arrays of one shape, each computed once.

    Args:
        folder: where this cache lives; its name is the key of what determines the values.
        rows: how many there are.
        shape: shape of one.
        what: shown to the user while it is made ("latents").
    """

    folder: Path
    rows: int
    shape: tuple[int, ...]
    what: str

    @property
    def values(self) -> Path:
        return self.folder / "values.npy"

    @property
    def bytes(self) -> int:
        return int(self.rows * np.prod(self.shape) * 2)

    def complete(self) -> bool:
        """True when every value is there."""
        return (self.folder / "cache.json").is_file()

    def open(self) -> NDArray[np.float16]:
        """The values `[rows, *shape]`, float16, memory-mapped and read-only."""
        return np.load(self.values, mmap_mode="r")

    def fill(
        self,
        compute: Callable[[range], NDArray[np.float16]],
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
            return
        if rank > 0:
            self._fill(compute, rank, world, chunk)
            return
        with FolderLock(self.folder, f"the cache of {self.what}") as lock:
            lock.wait(alive=alive)  # of two runs that need it, one fills it, and the other has it then
            if not self.complete():
                self._fill(compute, rank, world, chunk)

    def _fill(self, compute: Callable[[range], NDArray[np.float16]], rank: int, world: int, chunk: int) -> None:
        if rank == 0:
            self._allocate()
        wait_for(self.values.is_file, self.folder)
        (self.folder / "done").mkdir(exist_ok=True)
        chunks = [range(at, min(at + chunk, self.rows)) for at in range(0, self.rows, chunk)]
        mine = [part for part in chunks[rank::world] if not self._marker(part).is_file()]
        first = self.values.stat().st_size - self.bytes
        with open(self.values, "r+b") as file:
            for part in progress(f"caching {self.what}", "chunk", over=mine, disable=rank != 0, leave=False):
                # Plain writes of exactly these bytes: a memory map would write back whole pages, neighbours' rows too.
                file.seek(first + part.start * self.bytes // self.rows)
                file.write(np.ascontiguousarray(compute(part), dtype=np.float16).tobytes())
                file.flush()
                os.fsync(file.fileno())
                self._marker(part).touch()
        if rank == 0:
            wait_for(lambda: all(self._marker(part).is_file() for part in chunks), self.folder)
            fsync_folder(self.folder)
            write_json(self.folder / "cache.json", {"what": self.what, "rows": self.rows, "shape": list(self.shape)})
        wait_for(self.complete, self.folder)

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
