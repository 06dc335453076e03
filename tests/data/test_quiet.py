"""libtiff's handler under threads."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import pytest

from latentgen.data import quiet


def test_threads_that_begin_at_once_install_one_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one would replace the first in libtiff, and only one of them is kept alive."""
    installed: list[object] = []

    @lru_cache(maxsize=1)
    def slow() -> object:
        time.sleep(0.05)  # as finding the library takes
        installed.append(object())
        return installed[-1]

    monkeypatch.setattr(quiet, "_libtiff_handler", slow)
    together = threading.Barrier(4)

    def decode(_: int) -> None:
        together.wait()
        with quiet.quiet_pillow():
            pass

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(decode, range(4)))
    assert len(installed) == 1
