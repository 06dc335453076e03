"""Orders of buckets, windows and mixtures: nothing lost, nothing twice, the same from any position."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentgen.data.order import ByShape, Interleaved, Order, ReadAhead, Shuffled, Windowed, WindowedByShape, slots

SHAPES = [0, 1, 1, 0, 2, 1, 1, 0, 1, 1, 1, 0, 0, 1]

ORDERS: dict[str, Order] = {
    "shuffled": Shuffled(13),
    "one": Shuffled(1),
    "windowed": Windowed((3, 5, 0, 4, 1), 2),
    "one window": Windowed((3, 5, 4), 9),
    "by shape": ByShape(SHAPES, 4),
    "by shape, fewer than a batch": ByShape([0, 1], 4),
    "interleaved": Interleaved((Shuffled(5), Windowed((2, 2), 1), Shuffled(1)), (3, 2, 1), (0, 5, 9)),
    "mixed shapes": ByShape(np.array(SHAPES)[slots((9, 3), (10, 4))], 4, slots((9, 3), (10, 4))),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
@given(st.lists(st.integers(0, 400), min_size=2, max_size=6), st.integers(0, 5))
def test_any_cut_gives_the_same_sequence(order: Order, edges: list[int], seed: int) -> None:
    edges = sorted(edges)
    whole = order.at(range(edges[0], edges[-1]), seed, "s")
    assert len(whole) == edges[-1] - edges[0]
    assert sum((order.at(range(a, b), seed, "s") for a, b in pairwise(edges)), ()) == whole


@pytest.mark.parametrize("order", [o for name, o in ORDERS.items() if "one" not in name])
def test_seeds_and_stages_have_orders_of_their_own(order: Order) -> None:
    seen = {order.at(range(48), seed, stage) for seed in (0, 1, 2) for stage in ("vae", "unet")}
    assert len(seen) == 6


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any), st.integers(1, 5), st.integers(0, 3))
def test_a_windowed_epoch_shows_every_example_once_and_few_groups_at_a_time(
    groups: list[int], window: int, epoch: int
) -> None:
    order, n = Windowed(tuple(groups), window), sum(groups)
    seen = order.at(range(epoch * n, (epoch + 1) * n), 7, "s")
    assert sorted(seen) == list(range(n))
    group_of = np.repeat(np.arange(len(groups)), groups)
    at = 0
    while at < n:
        members, end = order.window_at(epoch * n + at, 7, "s")
        size = sum(groups[group] for group in members)
        assert end == epoch * n + at + size
        assert len(members) <= window
        assert {int(group_of[i]) for i in seen[at : at + size]} == {group for group in members if groups[group]}
        assert order.window_at(end - 1, 7, "s") == (members, end)
        at += size


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 6), st.integers(0, 3))
def test_batches_are_of_one_shape_and_an_epoch_shows_every_example(shapes: list[int], batch: int, epoch: int) -> None:
    order = ByShape(shapes, batch)
    first = epoch * order.batches
    batches = [order.at(range(n * batch, (n + 1) * batch), 3, "s") for n in range(first, first + order.batches)]
    for rows in batches:
        (shape,) = {shapes[i] for i in rows}
        assert len(set(rows)) == min(batch, shapes.count(shape)), "none twice in a batch that they can fill"
    shown = Counter(i for rows in batches for i in rows)
    assert sorted(shown) == list(range(len(shapes))), "no picture is dropped"
    assert sum(shown.values()) - len(shapes) < batch * len(set(shapes)), "only last batches are filled up"


def test_what_fills_a_batch_is_another_each_epoch() -> None:
    order = ByShape([0] * 9, 4)
    fillers = set()
    for epoch in range(12):
        shown = Counter(order.at(range(epoch * 12, epoch * 12 + 12), 0, "s"))
        fillers.add(tuple(sorted(i for i, count in shown.items() if count > 1)))
    assert len(fillers) > 6


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=4), st.integers(0, 3), st.data())
def test_a_mixture_has_exact_shares(parts: list[tuple[int, int]], epoch: int, data: st.DataObject) -> None:
    lengths, counts = [n for n, _ in parts], tuple(count for _, count in parts)
    offsets = tuple(100 * k for k in range(len(parts)))
    order, total = Interleaved(tuple(Shuffled(n) for n in lengths), counts, offsets), sum(counts)
    seen = order.at(range(epoch * total, (epoch + 1) * total), 1, "s")
    assert tuple(Counter(i // 100 for i in seen)[k] for k in range(len(parts))) == counts
    stretch = data.draw(st.integers(1, total))
    for part, count in enumerate(counts):
        here = sum(i // 100 == part for i in seen[:stretch])
        assert abs(here - stretch * count / total) < len(parts)
    so_far = Counter(order.at(range(0, (epoch + 1) * total), 1, "s"))
    for part, n in enumerate(lengths):
        often = [so_far[100 * part + i] for i in range(n)]
        assert max(often) - min(often) <= 1, "of one part all are shown equally often"


def test_slots() -> None:
    assert slots((5, 2), (3, 4)).tolist() == [0, 1, 2, 0, 1, 3, 4]
    assert len({Windowed((4, 4), 2).at(range(8 * e, 8 * e + 8), 0, "s") for e in range(9)}) == 9


@pytest.mark.parametrize(
    "order", [Windowed((5, 3, 0, 7, 2, 4), 2), WindowedByShape((8, 6, 3, 9, 4), 2, [0, 1, 0, 0, 1] * 6, 4)]
)
def test_the_groups_of_the_window_behind_are_told(order: Windowed | WindowedByShape) -> None:
    told: list[tuple[int, ...]] = []
    ahead = ReadAhead(order, lambda groups: told.append(tuple(groups)))
    for at in range(0, 200, 4):
        told.clear()
        assert ahead.at(range(at, at + 4), 7, "s") == order.at(range(at, at + 4), 7, "s")
        (groups,) = told
        _, end = order.window_at(at + 3, 7, "s")
        assert groups == order.window_at(end, 7, "s")[0]
        shown = order.at(range(end, order.window_at(end, 7, "s")[1]), 7, "s")
        ends = np.cumsum(order.groups)
        assert {int(np.searchsorted(ends, i, side="right")) for i in shown} <= set(groups)
    told.clear()
    assert ahead.at(range(4, 4), 7, "s") == ()
    assert told == []
