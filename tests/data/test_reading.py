"""Where pictures are cut: inside, of the right shape, at the place that was asked for, masks and controls alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from latentgen.data.buckets import candidates
from latentgen.data.frame import Place, Shape
from latentgen.data.reading import Reading
from latentgen.data.sources.folder import FolderStore
from latentgen.data.sources.stored import Pictures

SIDES = st.integers(8, 500)
SIZES = st.tuples(SIDES, SIDES)
PLACES = st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
SHAPES = candidates(64, 16)


@given(SIZES, PLACES, st.sampled_from(["center", "random", "stretch"]), st.booleans())
def test_a_cut_lies_inside_and_keeps_as_much_as_it_can(size: Shape, at: Place, crop: str, buckets: bool) -> None:
    reading = Reading(64, crop, SHAPES if buckets else ())
    cut = reading.cut(size, at)
    left, top, right, bottom = cut.box
    assert 0 <= left < right <= size[1]
    assert 0 <= top < bottom <= size[0]
    assert cut.shape == reading.shape_of(size)
    assert cut.frame.original == size
    if crop == "stretch":
        assert cut.box == (0, 0, size[1], size[0])
        return
    whole = max(abs(right - left - size[1]), 0), max(abs(bottom - top - size[0]), 0)
    assert min(whole) <= 0.5, "one side is kept whole"
    if buckets:
        scale = max(cut.shape[0] / size[0], cut.shape[1] / size[1])
        for part, own in zip((bottom - top, right - left), cut.shape, strict=True):
            assert part == pytest.approx(own / scale, abs=0.5), "nothing is distorted by more than a pixel's rounding"


@given(SIZES, PLACES)
def test_the_frame_tells_where_the_cut_lies_in_the_scaled_picture(size: Shape, at: Place) -> None:
    reading = Reading(64, "random", SHAPES)
    cut = reading.cut(size, at)
    scale = max(cut.shape[0] / size[0], cut.shape[1] / size[1])
    for corner, edge, place, shape, side in zip(
        cut.frame.corner, (cut.box[1], cut.box[0]), at, cut.shape, size, strict=True
    ):
        assert corner == pytest.approx(edge * scale, abs=0.51)
        assert 0 <= corner <= max(0, round(side * scale) - shape + 1)
        assert edge == pytest.approx(place * max(0.0, side - shape / scale), abs=1.5)


def test_random_places_reach_from_edge_to_edge_and_others_are_ignored() -> None:
    random, center = Reading(64, "random"), Reading(64, "center")
    ends = [random.cut((64, 128), (0.5, across)).box[0] for across in (0.0, 0.5, 0.9999)]
    assert ends == [0, 32, 63]
    assert center.cut((64, 128), (0.1, 0.9)) == center.cut((64, 128))


def test_the_shape_is_the_nearest_by_ratio() -> None:
    reading = Reading(64, shapes=((80, 48), (64, 64), (48, 80)))
    assert [reading.shape_of(size) for size in ((300, 200), (100, 100), (100, 125), (90, 300))] == [
        (80, 48),
        (64, 64),
        (64, 64),
        (48, 80),
    ]


@given(SIZES)
def test_upscaling_is_by_how_much_a_picture_grows(size: Shape) -> None:
    reading = Reading(64, shapes=SHAPES)
    cut = reading.cut(size)
    assert reading.upscaling(size) == pytest.approx(cut.shape[1] / (cut.box[2] - cut.box[0]), rel=0.02)


@pytest.fixture(scope="module")
def ramps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One wide picture whose red tells the column, and a mask and a second picture that tell it too."""
    folder = tmp_path_factory.mktemp("ramps")
    ramp = np.broadcast_to(np.arange(160, dtype=np.uint8)[None, :, None], (48, 160, 3))
    for name in ("a", "a.control"):
        Image.fromarray(ramp).save(folder / f"{name}.png")
    Image.fromarray(ramp[..., 0]).save(folder / "a.mask.png")
    (folder / "a.txt").write_text("a ramp\n")
    return folder


@pytest.mark.parametrize("buckets", [None, 2])
@pytest.mark.parametrize("across", [0.0, 0.37, 0.99])
def test_masks_and_controls_are_cut_like_the_picture(ramps: Path, buckets: int | None, across: float) -> None:
    reading = Reading(32, "random", mask="beside")
    source = Pictures(FolderStore(str(ramps)), reading, buckets=buckets, step=8, controls=True)
    assert len(source) == 1
    at = (0.5, across)
    image, mask, control = source.image(0, at), source.mask(0, at), source.control(0, at)
    assert mask is not None
    assert image.shape[:2] == mask.shape == source.shape(0)
    assert np.abs(image[..., 0].astype(int) - mask).max() <= 1
    assert np.array_equal(control, image)
    corner, scale = source.frame(0, at).corner, source.shape(0)[0] / 48
    assert image[:, 0].mean() * scale == pytest.approx(corner[1], abs=1)
