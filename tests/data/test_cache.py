"""A cache is filled by all processes, continued after an interruption, and then reused."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from latentgen.core.errors import UserError
from latentgen.data.cache import ArrayCache, prune, verify
from latentgen.data.cache_entries import entries
from latentgen.data.cache_pack import pack, unpack

ROWS, SHAPE, CHUNK = 11, (2, 3), 2
PICTURES = tuple(f"picture {row}" for row in range(ROWS))
FILES = ["cache.json", "contents.npy", "done", "keys.npy", "values.npy"]


class Compute:
    """Row r is r + 0.5 everywhere; remembers what it was asked, and may fail at one chunk."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.asked: list[list[int]] = []
        self.fail_at = fail_at

    def __call__(self, rows: Sequence[int]) -> NDArray[np.float16]:
        if rows[0] == self.fail_at:
            raise KeyboardInterrupt
        self.asked.append(list(rows))
        return np.stack([np.full(SHAPE, r + 0.5, dtype=np.float16) for r in rows])


def cache(
    folder: Path, name: str = "key", pictures: Sequence[str] = PICTURES, how: str = "", maker: str = "net"
) -> ArrayCache:
    own = entries(maker, [(picture, f"{picture} {how}") for picture in pictures])
    return ArrayCache(folder / name, own, SHAPE, "things")


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
    assert names(tmp_path) == FILES
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
    assert [[rows[0] for rows in compute.asked] for compute in computes] == [[0, 4, 8], [2, 6, 10]]
    assert names(tmp_path) == FILES


@pytest.mark.parametrize("fail_at", [0, 4, 10])
def test_an_interruption_is_continued(fail_at: int, tmp_path: Path) -> None:
    cache(tmp_path / "whole").fill(Compute(), rank=0, world=1, chunk=CHUNK)
    made, first, second = cache(tmp_path), Compute(fail_at), Compute()
    with pytest.raises(KeyboardInterrupt):
        made.fill(first, rank=0, world=1, chunk=CHUNK)
    assert not made.complete()
    made.fill(second, rank=0, world=1, chunk=CHUNK)
    assert first.asked + second.asked == [list(range(at, min(at + CHUNK, ROWS))) for at in range(0, ROWS, CHUNK)]
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

    def slow(rows: Sequence[int]) -> NDArray[np.float16]:
        begun.set()
        assert go_on.wait(timeout=60)
        return first(rows)

    def fill(compute: Callable[[Sequence[int]], NDArray[np.float16]]) -> threading.Thread:
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
    assert names(tmp_path) == FILES


def test_its_size_is_that_of_the_values(tmp_path: Path) -> None:
    assert cache(tmp_path).bytes == expected().nbytes


def test_killed_at_random_instants_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_cache.py")
    env = {**os.environ, "PYTHONPATH": str(script.parents[2])}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=env, text=True, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 20
    whole = {name: (tmp_path / "whole" / "key" / name).read_bytes() for name in FILES if name != "done"}
    folders = list(tmp_path.glob("killed *"))
    assert folders
    for folder in folders:
        assert {name: (folder / "key" / name).read_bytes() for name in whole} == whole
        assert verify(folder / "key") is None


def test_only_what_changed_is_computed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache(tmp_path).fill(Compute(), rank=0, world=1)
    changed = list(PICTURES)
    changed[4] = "another"
    cases = {
        "one changed": (changed, "", "net", [[4]]),
        "in another order": (list(reversed(PICTURES)), "", "net", []),
        "one more": ([*PICTURES, "new"], "", "net", [[11]]),
        "some": (PICTURES[2:5], "", "net", []),
    }
    for name, (pictures, how, maker, asked) in cases.items():
        compute, made = Compute(), cache(tmp_path, name, pictures, how, maker)
        made.fill(compute, rank=0, world=1)
        assert compute.asked == asked, name
        original = np.stack([np.full(SHAPE, PICTURES.index(p) + 0.5) for p in pictures if p in PICTURES])
        kept = [row for row, picture in enumerate(pictures) if picture in PICTURES]
        assert np.array_equal(made.open()[kept], original), name
    with caplog.at_level(logging.INFO):
        for name, how, maker, told in (
            ("cut", "cut otherwise", "net", "they are cut or scaled in another way than before"),
            ("net", "", "another net", "another network computes them than before"),
        ):
            compute = Compute()
            cache(tmp_path, name, how=how, maker=maker).fill(compute, rank=0, world=1)
            assert compute.asked == [list(range(ROWS))]
            assert f"things: all 11 are computed anew: {told}" in caplog.text


def test_equal_pictures_are_computed_once(tmp_path: Path) -> None:
    compute = Compute()
    made = cache(tmp_path, pictures=["a", "b", "a", "a"])
    made.fill(compute, rank=0, world=1)
    assert compute.asked == [[0, 1]]
    assert made.open()[:, 0, 0].tolist() == [0.5, 1.5, 0.5, 0.5]


def test_damage_is_told(tmp_path: Path) -> None:
    made = cache(tmp_path)
    made.fill(Compute(), rank=0, world=1, chunk=CHUNK)
    assert verify(made.folder) is None
    whole = bytearray(made.values.read_bytes())
    whole[-1] ^= 1
    made.values.write_bytes(whole)
    assert "rows 10 to 10 are not what was written" in str(verify(made.folder))
    made.values.write_bytes(whole[:-8])
    with pytest.raises(UserError, match=r"values.npy: damaged .* remove .*, and it is made again"):
        made.open()


def test_what_nobody_uses_is_removed_and_the_rest_is_not(tmp_path: Path) -> None:
    old, new = cache(tmp_path / "latents", "old"), cache(tmp_path / "latents", "new")
    for made in (old, new):
        made.fill(Compute(), rank=0, world=1)
        os.utime(made.folder / "cache.json", (0, 0))
    new.fill(Compute(), rank=0, world=1)
    assert [path for path, _ in prune(tmp_path, 1.0)] == [old.folder]
    assert not old.folder.exists()
    assert new.complete()


def test_packed_and_unpacked_it_is_the_same(tmp_path: Path) -> None:
    made = cache(tmp_path / "here" / "latents", "abc")
    made.fill(Compute(), rank=0, world=1)
    for target in (str(tmp_path / "packed"), "memory://packed"):
        assert pack([made.folder], target, part=50) > made.bytes
        there = tmp_path / target.replace("/", "_").replace(":", "")
        assert unpack(target, there) == [there / "latents" / "abc"]
        assert unpack(target, there) == []
        moved = cache(there / "latents", "abc")
        compute = Compute()
        moved.fill(compute, rank=0, world=1)
        assert compute.asked == []
        assert np.array_equal(moved.open(), made.open())
    (part,) = (tmp_path / "packed").glob("*values.npy-00002")
    part.write_bytes(b"x" * part.stat().st_size)
    with pytest.raises(UserError, match="00002: not what was packed"):
        unpack(str(tmp_path / "packed"), tmp_path / "other")
    assert not (tmp_path / "other" / "latents" / "abc").exists()
    manifest = tmp_path / "packed" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("latents/abc", "latents/../../abc"))
    with pytest.raises(UserError, match="which is no cache"):
        unpack(str(tmp_path / "packed"), tmp_path / "other")
