"""However the work is cut, each step sees the same examples at the same rows."""

from __future__ import annotations

from typing import Any

import pytest

from latentgen.core.errors import UserError
from latentgen.core.rand import Draw
from latentgen.data.loader import Cut, Loader
from latentgen.data.order import Shuffled

STEPS, BATCH, EXAMPLES = 5, 8, 13


def fetch(draw: Draw) -> dict[str, Any]:
    return {"example": draw.indices, "row": tuple(draw.rows), "uniform": draw.uniform("u").tolist()}


def seen(cut: Cut, start: int = 0, workers: int = 0) -> dict[int, list[tuple[int, int, float]]]:
    """(row, example, its random number) of every step of one process."""
    loader = Loader(fetch, Shuffled(EXAMPLES), 3, "unet", cut, STEPS, workers)
    steps: dict[int, list[tuple[int, int, float]]] = {}
    for step, parts in loader.iterate(start):
        assert all(draw.step == step for draw, _ in parts)
        assert step not in steps
        rows = [list(zip(b["row"], b["example"], b["uniform"], strict=True)) for _, b in parts]
        steps[step] = [pair for part in rows for pair in part]
    return steps


@pytest.fixture(scope="module")
def whole() -> dict[int, list[tuple[int, int, float]]]:
    return seen(Cut(BATCH))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro", [None, 1, 2])
def test_any_cut_gives_the_same_rows(world: int, micro: int | None, whole: dict) -> None:
    ranks = [seen(Cut(BATCH, micro, rank, world)) for rank in range(world)]
    assert {step: [pair for rank in ranks for pair in rank[step]] for step in range(STEPS)} == whole


def test_workers_change_nothing(whole: dict) -> None:
    assert seen(Cut(BATCH, 2), workers=2) == whole
    assert seen(Cut(BATCH, 2), start=3, workers=2) == {step: whole[step] for step in (3, 4)}


def refuse(draw: Draw) -> dict[str, Any]:
    raise UserError("shapes/7.png: too small")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mistake_stays_one_line(workers: int) -> None:
    with pytest.raises(UserError) as caught:
        list(Loader(refuse, Shuffled(EXAMPLES), 3, "unet", Cut(BATCH), STEPS, workers).iterate(0))
    assert str(caught.value) == "shapes/7.png: too small"


@pytest.mark.parametrize("start", range(STEPS + 1))
def test_resuming_gives_the_tail(start: int, whole: dict) -> None:
    assert seen(Cut(BATCH, 4), start) == {step: whole[step] for step in range(start, STEPS)}


def test_the_run_goes_through_the_examples_without_repeats(whole: dict) -> None:
    order = [example for step in range(STEPS) for _, example, _ in whole[step]]
    for epoch in range(len(order) // EXAMPLES):
        assert sorted(order[epoch * EXAMPLES : (epoch + 1) * EXAMPLES]) == list(range(EXAMPLES))


def test_micro_batches_arrive_in_the_order_of_rows() -> None:
    for _, parts in Loader(fetch, Shuffled(EXAMPLES), 0, "s", Cut(BATCH, 2, rank=1, world=2), 2).iterate(0):
        assert [draw.rows for draw, _ in parts] == [range(4, 6), range(6, 8)]


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(UserError, match=r"train.global_batch: 8 does not divide over 3 processes"):
        Cut(8, world=3)
    with pytest.raises(UserError, match=r"train.micro_batch: 3 does not divide the 4 examples each process has"):
        Cut(8, 3, world=2)
    with pytest.raises(UserError, match=r"train.micro_batch: 8 does not divide the 4 examples"):
        Cut(8, 8, world=2)
