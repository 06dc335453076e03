"""Fills a cache that is killed at random instants, in a process without threads, which may fork safely.

Arguments: a folder. Prints how often it was killed; the caches are the folders `whole` and `killed N` in it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import tqdm

from latentgen.data.cache import ArrayCache
from latentgen.data.cache_entries import entries

KILLS = 20


def fill(folder: Path) -> None:
    own = entries("net", [(f"picture {row}", "") for row in range(11)])
    made = ArrayCache(folder / "key", own, (2, 3), "things")
    made.fill(lambda rows: np.stack([np.full((2, 3), row, dtype=np.float16) for row in rows]), rank=0, world=1, chunk=1)


def killed_after(delay: float, folder: Path) -> bool:
    """Fill a cache in a process that the system kills after so many seconds; whether it was."""
    child = os.fork()
    if child == 0:
        signal.setitimer(signal.ITIMER_REAL, delay)
        code = 1
        try:
            fill(folder)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


if __name__ == "__main__":
    root, kills, number, draws = Path(sys.argv[1]), 0, 0, np.random.default_rng(0)
    tqdm.tqdm.monitor_interval = 0  # the library's own thread would be one
    tqdm.tqdm.set_lock(threading.RLock())  # its own is shared with children, and stays locked when one is killed
    begun = time.monotonic()
    fill(root / "whole")
    whole = time.monotonic() - begun
    while kills < KILLS:
        while killed_after(draws.uniform(0, whole) + 1e-4, root / f"killed {number}"):
            kills += 1
            assert kills < 20 * KILLS, "it gets nowhere"
        number += 1
    print(kills)
