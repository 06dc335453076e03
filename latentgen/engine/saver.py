"""Checkpoints written in the background: training waits for the copy to host memory, not for the disk.

At most one is being written; the next save waits for it. What goes wrong meanwhile is raised by `check`, at the next
step. Where networks are cut, every process writes its rows and tells the first one their hashes, which then completes
the checkpoint; they talk through a group of their own, since the other one is busy with gradients.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from torch import distributed

from latentgen.core.errors import Elsewhere, Interrupted, UserError
from latentgen.core.files import ASIDE, begin_folder
from latentgen.engine.agreement import anywhere, mains
from latentgen.engine.checkpoint import (
    Checkpoint,
    Contents,
    Damaged,
    Keep,
    Listing,
    Wanted,
    commit,
    contents,
    name_of,
    prune,
    read_checkpoint,
    require_room,
    size_of,
    staged,
    steps_in,
    tidy,
    write_contents,
)
from latentgen.engine.staging import Staging

logger = logging.getLogger(__name__)

LONGEST_WRITE = timedelta(hours=2)
"""For which processes wait for each other's files."""


class Saver:
    """Saves and finds the checkpoints of one stage. All processes must call each method together, in the same order.

    As a context manager it waits for the checkpoint being written, unless training is left at once.

    Args:
        folder: of the stage's checkpoints.
        sharded: networks are cut, so that every process writes.

    Attributes:
        stalls: seconds that training waited for each save.
    """

    def __init__(self, folder: Path, keep: Keep, accelerator: Accelerator, sharded: bool = False) -> None:
        self.folder, self.keep, self.accelerator = folder, keep, accelerator
        self.rank, self.world = (accelerator.process_index, accelerator.num_processes) if sharded else (0, 1)
        self.main = accelerator.is_main_process
        self.stalls: list[float] = []
        self._group: Any = distributed.new_group(backend="gloo", timeout=LONGEST_WRITE) if self.world > 1 else None
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._passed_over: frozenset[int] = frozenset()

    def save(self, checkpoint: Checkpoint, score: float | None = None) -> None:
        """Copy the state and begin to write it; waits for the one before.

        Args:
            score: of a validation, the lower the better, for `Keep.best`.

        Raises:
            UserError: the disk has too little room for this one, or failed under the one before.
        """
        begun = time.perf_counter()
        self.wait()
        files: dict[str, Contents] = {}
        if self.main or self.world > 1:
            files = contents(checkpoint, self.rank, self.world)
        try:
            if self.main:
                require_room(self.folder, checkpoint.step, size_of(files) * self.world)
                begin_folder(self.folder / name_of(checkpoint.step))
        except (OSError, UserError) as error:
            self._error = self._explained(error, checkpoint.step)
        self.check(together=True)
        if not files:
            return
        files = staged(files, self._staging)
        arguments = (checkpoint.step, files, checkpoint.data, score)
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()
        self.stalls.append(time.perf_counter() - begun)

    def check(self, together: bool) -> None:
        """Raise what went wrong while a checkpoint was written.

        Args:
            together: the processes wait for each other here. Several do not find out without.

        Raises:
            UserError: the disk failed; what was there before is untouched.
        """
        if not together and self.accelerator.num_processes > 1:
            return
        if anywhere(self.accelerator, self._error is not None):
            error, self._error = self._error, None
            raise error or Elsewhere("another process could not write its part of a checkpoint")

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            UserError: see `check`.
        """
        self._join()
        self.check(together=True)

    def load(self, wanted: Wanted) -> Checkpoint | None:
        """The newest checkpoint that is undamaged for every process; damaged ones are named and passed over.

        Args:
            wanted: the rows that this process needs, as for `read_checkpoint`.

        Raises:
            UserError: there are checkpoints and all are damaged, or a process does not see the main one's files.
        """
        if self.main:
            tidy(self.folder)
        left, passed = (steps_in(self.folder) if self.main else []), set()
        while True:
            step = mains(self.accelerator, left[-1] if left else -1)
            if step < 0:
                break
            path, found, wrong = self.folder / name_of(step), None, ""
            unseen = not path.is_dir()
            try:
                found = None if unseen else read_checkpoint(path, wanted)
            except Damaged as error:
                wrong = str(error)
            if anywhere(self.accelerator, unseen):
                raise UserError(f"{path} is not there for every process; `--runs` must be on a disk they share")
            if not anywhere(self.accelerator, found is None):
                self._passed_over = frozenset(passed)
                return found
            if wrong or self.main:
                logger.warning("checkpoint %s: %s; taking an older one", path, wrong or "damaged for another process")
            passed.add(step)
            left = left[:-1]
        if passed:
            raise UserError(f"every checkpoint in {self.folder} is damaged; remove it to begin this stage anew")
        return None

    def _write(self, step: int, files: Mapping[str, Contents], data: dict[str, Any], score: float | None) -> None:
        aside, listing, error = self.folder / f"{name_of(step)}{ASIDE}", None, None
        try:
            listing = write_contents(aside, files)
        except Exception as caught:
            error = caught
        try:
            listings = self._exchanged(listing)
            if self.main and None not in listings and error is None:
                commit(self.folder, step, data, {k: v for part in listings if part for k, v in part.items()}, score)
                prune(self.folder, step, self.keep, self._passed_over)
        except Exception as caught:
            error = caught
        if self.main and aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)  # make room; what is not complete is of no use
        if error is not None:
            self._error = self._explained(error, step)

    def _exchanged(self, listing: Listing | None) -> list[Listing | None]:
        """What every process wrote, None where that failed."""
        if self._group is None:
            return [listing]
        text = torch.frombuffer(bytearray(json.dumps(listing).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        distributed.all_gather(sizes, torch.tensor([text.numel()]), group=self._group)
        longest = max(int(size) for size in sizes)
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world)]
        distributed.all_gather(texts, torch.nn.functional.pad(text, (0, longest - text.numel())), group=self._group)
        pairs = zip(texts, sizes, strict=True)
        return [json.loads(bytes(found[: int(size)].numpy())) for found, size in pairs]

    def _explained(self, error: BaseException, step: int) -> BaseException:
        """An error of the disk as one line that says what to do; others are the program's own."""
        if isinstance(error, UserError) or not isinstance(error, OSError):
            return error
        where = f" ({error.filename})" if error.filename else f" ({self.folder})"
        kept = steps_in(self.folder)[-1:]
        rest = f"that of step {kept[0]} is untouched" if kept else "there is none before it"
        return UserError(
            f"the checkpoint of step {step} could not be written: {error.strerror}{where}; {rest}; "
            "mend that and run the same command again"
        )

    def _tell(self) -> None:
        if self.main and self.stalls:
            count, mean, most = len(self.stalls), sum(self.stalls) / len(self.stalls), max(self.stalls)
            text = "%s: checkpoints saved: %d; training waited %.3f s for each, %.3f s at most"
            logger.info(text, self.folder.name, count, mean, most)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        at_once = isinstance(error, KeyboardInterrupt) and not isinstance(error, Interrupted)
        if error is None or isinstance(error, Interrupted):
            self.wait()  # and if it failed, that is what has to be said
            self._tell()
        elif not at_once:
            self._join()
            if self._error is not None and isinstance(error, OSError):
                raise self._error from error  # of one disk; that of the checkpoint is worse
            if self._error is not None:
                logger.warning("%s", self._error)
        if self._group is not None and not at_once:
            distributed.destroy_process_group(self._group)
