"""A cache is filled by all processes, continued after an interruption, and then reused."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from latentgen.core.errors import UserError
from latentgen.data.cache import ArrayCache

ROWS, SHAPE, CHUNK = 11, (2, 3), 2


class Compute:
    """Row r is r + 0.5 everywhere; remembers what it was asked, and may fail at one chunk."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.asked: list[range] = []
        self.fail_at = fail_at

    def __call__(self, rows: range) -> NDArray[np.float16]:
        if rows.start == self.fail_at:
            raise KeyboardInterrupt
        self.asked.append(rows)
        return np.stack([np.full(SHAPE, r + 0.5, dtype=np.float16) for r in rows])


def cache(folder: Path) -> ArrayCache:
    return ArrayCache(folder / "key", ROWS, SHAPE, "things")


def expected() -> NDArray[np.float16]:
    return Compute()(range(ROWS))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "key").iterdir())


def test_one_process_fills_it(tmp_path: Path) -> None:
    compute, made = Compute(), cache(tmp_path)
    assert not made.complete()
    made.fill(compute, rank=0, world=1, chunk=CHUNK)
    assert made.complete()
    assert [len(rows) for rows in compute.asked] == [2, 2, 2, 2, 2, 1]
    assert np.array_equal(made.open(), expected())
    assert names(tmp_path) == ["cache.json", "done", "values.npy"]
    with pytest.raises(ValueError, match="read-only"):
        made.open()[0] = 1


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    computes = Compute(), Compute()
    threads = [
        threading.Thread(
            target=cache(tmp_path).fill, args=(compute,), kwargs={"rank": rank, "world": 2, "chunk": CHUNK}, daemon=True
        )
        for rank, compute in enumerate(computes)
    ]
    for thread in reversed(threads):  # the second process comes first, and has to wait
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert np.array_equal(cache(tmp_path).open(), expected())
    assert [[rows.start for rows in compute.asked] for compute in computes] == [[0, 4, 8], [2, 6, 10]]
    assert names(tmp_path) == ["cache.json", "done", "values.npy"]


@pytest.mark.parametrize("fail_at", [0, 4, 10])
def test_an_interruption_is_continued(fail_at: int, tmp_path: Path) -> None:
    cache(tmp_path / "whole").fill(Compute(), rank=0, world=1, chunk=CHUNK)
    made, first, second = cache(tmp_path), Compute(fail_at), Compute()
    with pytest.raises(KeyboardInterrupt):
        made.fill(first, rank=0, world=1, chunk=CHUNK)
    assert not made.complete()
    made.fill(second, rank=0, world=1, chunk=CHUNK)
    assert first.asked + second.asked == [range(at, min(at + CHUNK, ROWS)) for at in range(0, ROWS, CHUNK)]
    assert made.values.read_bytes() == cache(tmp_path / "whole").values.read_bytes()


def test_a_complete_cache_is_reused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache(tmp_path).fill(Compute(), rank=0, world=1)
    before, again = cache(tmp_path).values.stat().st_mtime_ns, Compute()
    with caplog.at_level(logging.INFO):
        cache(tmp_path).fill(again, rank=0, world=1)
    assert again.asked == []
    assert cache(tmp_path).values.stat().st_mtime_ns == before
    assert "things: reused" in caplog.text


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 100, 0))
    with pytest.raises(UserError, match="the cache of things needs"):
        cache(tmp_path).fill(Compute(), rank=0, world=1)
    assert names(tmp_path) == []


def test_of_two_runs_that_need_it_one_fills_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    begun, go_on, first, second = threading.Event(), threading.Event(), Compute(), Compute()

    def slow(rows: range) -> NDArray[np.float16]:
        begun.set()
        assert go_on.wait(timeout=60)
        return first(rows)

    def fill(compute: Callable[[range], NDArray[np.float16]]) -> threading.Thread:
        thread = threading.Thread(target=cache(tmp_path).fill, args=(compute,), kwargs={"rank": 0, "world": 1})
        thread.start()
        return thread

    with caplog.at_level(logging.INFO):
        one = fill(slow)
        assert begun.wait(timeout=60)
        two = fill(second)
        while "the cache of things is in use by process" not in caplog.text:
            time.sleep(0.001)
        go_on.set()
        for thread in (one, two):
            thread.join()
    assert second.asked == []
    assert np.array_equal(cache(tmp_path).open(), expected())
    assert names(tmp_path) == ["cache.json", "done", "values.npy"]


def test_its_size_is_that_of_the_values(tmp_path: Path) -> None:
    assert cache(tmp_path).bytes == expected().nbytes
