"""When held-out and training loss part, and when they only seem to."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from latentgen.engine.parting import FEWEST, PATIENCE, Parting, limit


def course(
    seed: int, *, examples: int = 64, rounds: int = 30, harder: float = 0.0, learned: float = 0.0
) -> list[tuple[Tensor, Tensor]]:
    """Losses of a run, [examples] each: both fall like 1 / (1 + t), each example is hard in its own way.

    `harder`: what held-out examples cost more, in the same proportion at all times. `learned`: how far training
    examples fall below the others from round 10 on, and held-out ones rise, each round.
    """
    draws = torch.Generator().manual_seed(seed)
    difficulty = torch.rand(2, examples, generator=draws) + 0.5
    found = []
    for t in range(rounds):
        noise = 0.02 * torch.randn(2, examples, generator=draws)
        loss = difficulty * (0.2 + 1 / (1 + t)) * (1 + noise)
        late = learned * max(0, t - 10)
        found.append((loss[0] * (1 + harder) + late, loss[1] - late))
    return found


def warned(losses: list[tuple[Tensor, Tensor]]) -> list[int]:
    watch, found = Parting(), []
    for number, (held_out, seen) in enumerate(losses):
        watch.add(held_out, seen)
        if watch.begins:
            found.append(number)
    return found


@pytest.mark.parametrize("examples", [FEWEST, 64])
def test_it_does_not_cry_wolf(examples: int) -> None:
    """300 runs of 30 validations of a network that learns nothing by heart."""
    cries = sum(bool(warned(course(seed, examples=examples))) for seed in range(300))
    assert cries <= 1


def test_harder_pictures_are_no_reason() -> None:
    """A validation folder of another kind: a gap from the start, and two losses that fall at different speeds."""
    assert not any(warned(course(seed, harder=0.5)) for seed in range(50))


def test_learning_by_heart_is_said_soon_and_once() -> None:
    found = [warned(course(seed, learned=0.02)) for seed in range(50)]
    assert all(len(rounds) == 1 for rounds in found)
    assert max(rounds[0] for rounds in found) <= 10 + 14
    assert min(rounds[0] for rounds in found) > 10, "and not before it begins"


def test_a_gap_that_stands_still_is_no_parting() -> None:
    torch.manual_seed(0)
    held_out, seen = 2 + torch.rand(64), torch.rand(64)
    watch = Parting()
    assert [watch.add(held_out, seen) for _ in range(8)] == [0] * 8


def test_few_examples_say_nothing() -> None:
    assert warned(course(0, examples=FEWEST - 1, learned=0.5)) == []
    assert warned(course(0, examples=FEWEST, learned=0.5)) != []


def test_few_examples_need_a_larger_gap() -> None:
    """Student's quantiles where a normal one passes 2 and 3: from tables, 7 and 63 degrees of freedom."""
    assert limit(2, 8) == pytest.approx(2.43, abs=0.03)
    assert limit(3, 8) == pytest.approx(4.53, abs=0.13)
    assert limit(3, 64) == pytest.approx(3.126, abs=0.005)
    assert limit(3, 10**9) == pytest.approx(3)
    assert math.isfinite(limit(3, 2))


@pytest.mark.parametrize("at", range(1, 24, 3))
def test_the_state_is_all_there_is(at: int) -> None:
    losses = course(3, learned=0.05)
    watch, counts = Parting(), []
    for number, pair in enumerate(losses):
        if number == at:
            state = watch.state_dict()
            assert len(state["seen"]) <= PATIENCE + 1
            watch = Parting()
            watch.load_state_dict(state)
        counts.append(watch.add(*pair))
    plain = Parting()
    assert counts == [plain.add(*pair) for pair in losses]
    assert max(counts) >= PATIENCE


def test_another_number_of_examples_begins_anew() -> None:
    watch = Parting()
    watch.load_state_dict({})
    for held_out, seen in course(3, learned=0.05)[:20]:
        watch.add(held_out, seen)
    assert watch.count > 0
    assert watch.add(torch.ones(10), torch.zeros(10)) == 0
