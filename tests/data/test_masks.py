"""Masks to learn inpainting from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from latentgen.core.rand import Draw
from latentgen.data.masks import NUMBERS, SHARES, draw_masks, mask_of

DrawOf = Callable[..., Draw]


def numbers(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(size=NUMBERS - 1)


@pytest.mark.parametrize("kind", SHARES)
def test_every_kind_is_a_hole_of_some_size(kind: str) -> None:
    masks = np.stack([mask_of(kind, numbers(seed), 48, 64) for seed in range(200)])
    assert masks.shape == (200, 48, 64)
    covered = masks.mean(axis=(1, 2))
    assert covered.min() > 0.01
    if kind == "all":
        assert masks.all()
        return
    assert covered.max() < 1
    assert covered.std() > 0.05, "they differ"
    assert masks.any(axis=0).mean() > 0.9, "everywhere"


@pytest.mark.parametrize("kind", [kind for kind in SHARES if kind != "border"])
def test_the_same_numbers_are_the_same_hole_at_every_size(kind: str) -> None:
    for seed in range(20):
        small, large = mask_of(kind, numbers(seed), 32, 32), mask_of(kind, numbers(seed), 96, 96)
        assert (small != large[1::3, 1::3]).mean() == 0, "the middles of pixels are the same points"


def test_the_border_leaves_a_rectangle() -> None:
    for seed in range(50):
        kept = ~mask_of("border", numbers(seed), 40, 40)
        rows, columns = np.flatnonzero(kept.any(axis=1)), np.flatnonzero(kept.any(axis=0))
        assert kept[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()


def test_a_quarter_is_all_of_the_picture(draw: DrawOf) -> None:
    d = draw(range(2000), global_batch=2000, indices=(0,) * 2000)
    masks = draw_masks(d, 8, 8)
    assert masks.shape == (2000, 1, 8, 8)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert sum(SHARES.values()) == pytest.approx(1)
    assert 0.22 < (masks.flatten(1).min(dim=1).values == 1).float().mean() < 0.28


@pytest.mark.parametrize("size", [1, 2, 4])
def test_masks_do_not_depend_on_the_micro_batch(size: int, draw: DrawOf) -> None:
    whole = draw_masks(draw(), 16, 16)
    parts = [draw_masks(draw(range(at, at + size)), 16, 16) for at in range(0, 8, size)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(draw_masks(draw(step=1), 16, 16), whole)
    assert not torch.equal(draw_masks(draw(seed=1), 16, 16), whole)
