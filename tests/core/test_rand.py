"""Draws are functions of the seed, the stage, the name, the step and the row, and of nothing else."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentgen.core.rand import Draw, generator, seed_of

BATCH = 12
KINDS = {
    "normal": lambda d: d.normal("n", (3, 2)),
    "uniform": lambda d: d.uniform("n"),
    "permutation": lambda d: d.permutation("n"),
    "integers": lambda d: d.integers("n", 1000),
}


def whole(**changes) -> Draw:
    return dataclasses.replace(Draw(seed=3, stage="unet", step=5, global_batch=BATCH, rows=range(BATCH)), **changes)


def test_seed_of_is_pinned() -> None:
    """A changed value would change every draw of every run that was begun before."""
    assert seed_of(0, "unet", "noise", 7) == 8715365498785663424
    assert seed_of("a") != seed_of("b")


@given(st.lists(st.one_of(st.integers(), st.text(max_size=5)), max_size=4))
def test_seed_of_has_63_bits(parts: list[int | str]) -> None:
    assert 0 <= seed_of(*parts) < 2**63


@pytest.mark.parametrize(
    ("first", "second"), [((1,), ("1",)), (("ab", "c"), ("a", "bc")), ((1, 2), (12,)), ((), ("",))]
)
def test_seed_of_keeps_parts_apart(first: tuple, second: tuple) -> None:
    assert seed_of(*first) != seed_of(*second)


def test_generator_is_seeded_by_its_parts() -> None:
    assert torch.equal(torch.rand(4, generator=generator(1, "a")), torch.rand(4, generator=generator(1, "a")))
    assert not torch.equal(torch.rand(4, generator=generator(1, "a")), torch.rand(4, generator=generator(1, "b")))


@pytest.mark.parametrize("kind", KINDS)
@given(cuts=st.sets(st.integers(1, BATCH - 1)))
@settings(max_examples=15)
def test_draws_do_not_depend_on_the_split(kind: str, cuts: set[int]) -> None:
    edges = [0, *sorted(cuts), BATCH]
    parts = [KINDS[kind](whole(rows=range(a, b))) for a, b in itertools.pairwise(edges)]
    assert torch.equal(torch.cat(parts), KINDS[kind](whole()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [{"seed": 4}, {"stage": "vae"}, {"step": 6}])
def test_draws_depend_on_seed_stage_and_step(kind: str, change: dict) -> None:
    assert not torch.equal(KINDS[kind](whole(**change)), KINDS[kind](whole()))


def test_names_are_independent_of_one_another() -> None:
    draw = whole(global_batch=4096, rows=range(4096))
    a, b = draw.normal("a", ()), draw.normal("b", ())
    assert abs(float((a * b).mean())) < 5 / 64  # five standard errors
    assert abs(float(a.mean())) < 5 / 64
    assert abs(float(a.std()) - 1) < 5 / 64


def test_nothing_is_remembered_and_the_global_stream_is_left_alone() -> None:
    draw = whole()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = [KINDS[kind](draw) for kind in KINDS]
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, KINDS[kind](draw)) for a, kind in zip(first, KINDS, strict=True))


def test_values_are_what_their_names_say() -> None:
    draw = whole()
    assert sorted(draw.permutation("p").tolist()) == list(range(BATCH))
    assert bool(((draw.uniform("u") >= 0) & (draw.uniform("u") < 1)).all())
    assert whole(global_batch=500, rows=range(500)).integers("i", 3).unique().tolist() == [0, 1, 2]
    assert draw.normal("n", (2, 3)).shape == (BATCH, 2, 3)
