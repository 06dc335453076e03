"""The stateless shuffle: every epoch shows every example once, in an order of its own."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentgen.data.order import Shuffled, permute, permuted


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 63, 64, 65, 1000, 4096, 4097, 20_000])
def test_permute_is_a_permutation(n: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, 0, "x")), np.arange(n))


@settings(max_examples=40)
@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.text(max_size=4))
def test_permute_is_a_permutation_under_every_key(n: int, seed: int, stage: str) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed, stage)), np.arange(n))


@pytest.mark.parametrize("n", [2**31 + 11, 10**12])
def test_permute_reaches_over_large_sets(n: int) -> None:
    values = np.concatenate([np.arange(500), np.arange(n - 500, n)])
    images = permute(values, n, 0)
    assert len(set(images.tolist())) == 1000
    assert images.min() >= 0
    assert images.max() < n
    assert 0.4 < images.mean() / n < 0.6


def test_permute_takes_each_value_for_itself() -> None:
    whole = permute(np.arange(100), 100, 5)
    assert [int(permute(np.array([i]), 100, 5)[0]) for i in range(100)] == whole.tolist()


def test_permute_mixes() -> None:
    """Neighbours part, and few stay: a random permutation has one fixed point on average."""
    images = permute(np.arange(4096), 4096, 0, "unet")
    assert int((images == np.arange(4096)).sum()) < 10
    assert abs(float(np.corrcoef(np.arange(4096), images)[0, 1])) < 0.08  # five standard errors
    assert float(np.abs(np.diff(images)).mean()) == pytest.approx(4096 / 3, rel=0.1)


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(0, 10**6), st.integers(0, 99))
def test_every_epoch_shows_every_example_once(n: int, epoch: int, seed: int) -> None:
    assert sorted(Shuffled(n).at(range(epoch * n, (epoch + 1) * n), seed, "vae")) == list(range(n))


@settings(max_examples=30)
@given(st.integers(1, 30), st.integers(0, 200), st.lists(st.integers(0, 40), max_size=5))
def test_positions_do_not_depend_on_the_split(n: int, start: int, lengths: list[int]) -> None:
    edges = [start]
    for length in lengths:
        edges.append(edges[-1] + length)
    parts = [Shuffled(n).at(range(a, b), 1, "s") for a, b in itertools.pairwise(edges)]
    assert sum(parts, ()) == Shuffled(n).at(range(start, edges[-1]), 1, "s")


def test_seed_stage_and_epoch_each_have_their_own_order() -> None:
    def order(seed: int = 0, stage: str = "unet", epoch: int = 0) -> tuple[int, ...]:
        return Shuffled(50).at(range(epoch * 50, epoch * 50 + 50), seed, stage)

    assert len({order(), order(seed=1), order(stage="vae"), order(epoch=1)}) == 4


def test_the_order_is_pinned() -> None:
    """A changed order would change every run that was begun before."""
    assert Shuffled(10).at(range(8, 24), 0, "unet") == (1, 0, 8, 3, 7, 4, 5, 0, 1, 2, 9, 6, 6, 0, 9, 8)


@given(st.integers(1, 5000), st.integers(0, 5000), st.integers(0, 3000), st.integers(0, 9))
def test_stretches_of_a_permutation_are_parts_of_the_whole(n: int, start: int, count: int, key: int) -> None:
    start = min(start, n)
    stop = min(start + count, n)
    np.testing.assert_array_equal(permuted(start, stop, n, key), permute(np.arange(start, stop), n, key))


def test_a_billion_examples_take_no_memory_and_resume_anywhere() -> None:
    n = 10**9
    order = Shuffled(n)
    tracemalloc.start()
    here = [order.at(range(at, at + 64), 0, "unet") for at in (0, 999, n // 2 + 7, n - 32, 3 * n - 1)]
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2_000_000
    assert all(0 <= number < n for part in here for number in part)
    assert len({number for part in here[:3] for number in part}) == 3 * 64
    assert order.at(range(n // 2, n // 2 + 100), 0, "unet")[7:71] == here[2]
