"""Edges are where a picture changes, one pixel wide."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from latentgen.core.errors import UserError
from latentgen.data.controls import Controls
from latentgen.data.edges import edges
from latentgen.data.sources.shapes import ShapesSource


def on(picture: NDArray[np.uint8], **limits: int) -> NDArray[np.bool_]:
    found = edges(picture, **limits)
    assert found.shape == picture.shape
    assert found.dtype == np.uint8
    assert set(np.unique(found)) <= {0, 255}
    assert (found == found[..., :1]).all(), "the same in all channels"
    return found[..., 0] > 0


def square(colour: tuple[int, int, int], ground: tuple[int, int, int] = (255, 255, 255)) -> NDArray[np.uint8]:
    picture = np.full((24, 24, 3), ground, dtype=np.uint8)
    picture[6:18, 8:16] = colour
    return picture


def test_a_plain_picture_has_none() -> None:
    assert not on(np.full((9, 7, 3), 200, dtype=np.uint8)).any()


@pytest.mark.parametrize(("colour", "ground"), [((0, 0, 0), (255, 255, 255)), ((200, 0, 0), (0, 102, 0))])
def test_a_square_has_its_outline(colour: tuple[int, int, int], ground: tuple[int, int, int]) -> None:
    """Also where colours of one brightness meet: each channel is looked at."""
    found = on(square(colour, ground))
    ys, xs = np.nonzero(found)
    assert (ys.min(), ys.max(), xs.min(), xs.max()) == (5, 17, 7, 15)
    assert not found[7:16, 9:14].any(), "nothing inside"
    assert (found[8:15].sum(axis=1) == 2).all(), "one pixel wide, left and right"
    assert (found[:, 10:14].sum(axis=0) == 2).all()


@pytest.mark.parametrize("slope", [1, -1])
def test_slanted_lines_are_thin(slope: int) -> None:
    y, x = np.mgrid[:32, :32]
    picture = np.repeat(np.where(slope * (x - 16) > y - 16, 255, 0).astype(np.uint8)[..., None], 3, axis=2)
    found = on(picture)
    assert (found[4:28].sum(axis=1) <= 2).all()
    assert found[4:28].any(axis=1).all(), "and without gaps"


def test_weak_edges_count_where_they_hang_on_strong_ones() -> None:
    picture = np.full((16, 40, 3), 100, dtype=np.uint8)
    picture[8:] = 140  # |dy| of 160: between the limits
    assert not on(picture).any()
    assert on(picture, low=20, high=100)[7:9].any(axis=0).all()
    picture[8:, 20:] = 200  # |dy| of 400
    found = on(picture)
    assert found[7:9].any(axis=0)[2:38].all()


def test_what_an_example_is_to_follow(few: Callable) -> None:
    source = few(3)
    assert np.array_equal(Controls(source, "edge")(1), edges(source.image(1)))
    assert np.array_equal(Controls(source, "picture")(1), 255 - source.image(1))
    with pytest.raises(UserError, match=r"^shapes:train:2 has no picture to follow"):
        Controls(ShapesSource(size=4), "picture")(2)
