"""Shapes are the best choice there is of those allowed."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from latentgen.data.buckets import LONGEST, candidates, choose_shapes, cut_off
from latentgen.data.frame import Shape

SIDES = st.integers(10, 300)
SIZES = st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=12)


def loss(sizes: list[Shape], shapes: tuple[Shape, ...]) -> float:
    """What is cut off when every picture gets the shape whose aspect ratio is nearest to its own."""
    ratios = np.log([width / height for height, width in sizes])
    own = np.log([width / height for height, width in shapes])
    nearest = np.abs(ratios[:, None] - own[None]).argmin(axis=1)
    return sum(float(cut_off(np.exp(ratios[i : i + 1]), shapes[n])[0]) for i, n in enumerate(nearest))


@settings(max_examples=40)
@given(SIZES, st.integers(1, 3))
def test_no_other_choice_cuts_off_less(sizes: list[Shape], most: int) -> None:
    offered = candidates(64, 16)
    chosen = choose_shapes(sizes, 64, most, 16)
    assert 1 <= len(chosen) <= most
    best = min(loss(sizes, some) for count in range(1, most + 1) for some in combinations(offered, count))
    assert abs(loss(sizes, chosen) - best) < 1e-7


@settings(max_examples=40)
@given(SIZES)
def test_more_shapes_cut_off_no_more(sizes: list[Shape]) -> None:
    losses = [loss(sizes, choose_shapes(sizes, 96, most, 8)) for most in (1, 2, 3, 5, 8)]
    assert all(more <= fewer + 1e-7 for fewer, more in pairwise(losses))


@given(st.integers(16, 200), st.sampled_from([8, 16]))
def test_shapes_stay_within_the_pixels_of_the_square(resolution: int, step: int) -> None:
    offered = candidates(resolution, step)
    ratios = [width / height for height, width in offered]
    assert ratios == sorted(ratios)
    assert len(set(offered)) == len(offered)
    square = resolution // step * step
    assert (square, square) in offered
    for height, width in offered:
        assert height % step == width % step == 0 < height * width <= resolution**2
        assert max(height / width, width / height) <= LONGEST
        larger = max(height * (width + step), width * (height + step))
        assert larger > resolution**2 or (height, width) == (square, square), "one side cannot grow"


def test_pictures_of_one_shape_get_it_and_no_other() -> None:
    assert choose_shapes([(300, 400)] * 5, 96, 6, 8) == ((80, 112),)
    assert choose_shapes([(50, 50), (60, 60)], 64, 4, 16) == ((64, 64),)
