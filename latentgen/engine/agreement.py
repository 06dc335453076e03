"""What processes decide together: each asks, all get one answer. All must ask at once."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import distributed

from latentgen.core.errors import Elsewhere, UserError
from latentgen.core.lock import FolderLock

LONGEST_WAIT = timedelta(days=1)
"""For which processes wait for each other: while one draws a large preview, say. Who waits for one that is gone is told
so by `engine.watch`, long before."""


def anywhere(accelerator: Accelerator, here: bool) -> bool:
    """Whether it holds in any process. One byte over gloo, in host memory: no GPU is waited for."""
    if accelerator.num_processes == 1:
        return here
    flag = torch.tensor([here], dtype=torch.uint8)
    distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=_on_host(distributed.group.WORLD))
    return bool(flag)


@functools.lru_cache(maxsize=1)
def _on_host(world: Any) -> Any:
    """A group of its own for what is said beside the gradients; all processes make it when they first confer."""
    return distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)


def mains(accelerator: Accelerator, number: int) -> int:
    """The main process's number, everywhere."""
    if accelerator.num_processes == 1:
        return number
    sent = torch.tensor(number if accelerator.is_main_process else 0, dtype=torch.int64, device=accelerator.device)
    return int(accelerator.reduce(sent, "sum"))  # type: ignore[arg-type]


@contextlib.contextmanager
def held(folder: Path, what: str, accelerator: Accelerator) -> Iterator[None]:
    """Within it, the main process has the lock of `folder`, and no other run.

    Raises:
        UserError: another run has it.
    """
    error = None
    with FolderLock(folder, what) as lock:
        if accelerator.is_main_process:
            try:
                lock.acquire()
            except (UserError, OSError) as caught:  # first tell the others, which would wait for this process
                error = caught
        if anywhere(accelerator, error is not None):
            raise error or Elsewhere("the main process could not lock the run folder")
        yield
