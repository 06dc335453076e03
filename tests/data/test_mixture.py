"""Several sources as one: shares, weights, and a key that follows all; and pictures that a run makes itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from latentgen.core.errors import UserError
from latentgen.data.sources.made import MadePictures
from latentgen.data.sources.mixture import Mixture, counts_of, equal_counts


def test_each_has_half_and_all_of_the_first_are_there_equally_often(few: Callable) -> None:
    for own, beside in ((3, 7), (5, 2), (4, 4)):
        counts = equal_counts(own, beside)
        source = Mixture((few(own), few(beside, 1)), counts)
        seen = Counter(source.order(4).at(range(3 * source.epoch), 0, "unet"))
        parts = [Counter({i: n for i, n in seen.items() if source.part_of(i)[0] == part}) for part in (0, 1)]
        assert parts[0].total() == parts[1].total() == 3 * source.epoch // 2
        assert set(parts[0].values()) == {3 * counts[0] // own}
        assert max(parts[1].values()) - min(parts[1].values()) <= 1
        assert len(parts[1]) == beside


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0.01, 100)), min_size=1, max_size=5))
def test_counts_have_the_shares_and_show_everything(parts: list[tuple[int, float]]) -> None:
    lengths, shares = [n for n, _ in parts], [share for _, share in parts]
    counts = counts_of(lengths, shares)
    assert all(count >= n for count, n in zip(counts, lengths, strict=True))
    unit = max(n / share for n, share in zip(lengths, shares, strict=True))
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - unit * share) <= 1


def test_it_is_a_source(few: Callable) -> None:
    parts = few(3), few(5, 1)
    source = Mixture(parts, (3, 6), (1.0, 0.5))
    assert len(source) == 8
    assert source.epoch == 9
    for index in range(8):
        part, number = (parts[0], index) if index < 3 else (parts[1], index - 3)
        assert (source.image(index) == part.image(number)).all()
        assert np.array_equal(source.control(index), part.control(number))
        for method in ("name", "digest", "picture_key", "shape", "frame", "captions", "mask"):
            assert getattr(source, method)(index) == getattr(part, method)(number), method
        caption = part.captions(number)[0]
        assert source.contrasts(index, caption) == part.contrasts(number, caption)
    assert source.example_weights().tolist() == [1.0] * 3 + [0.5] * 5
    assert source.part_numbers().tolist() == [0] * 3 + [1] * 5
    nested = Mixture((source, few(2)), (8, 8), (2.0, 3.0))
    assert nested.example_weights().tolist() == [2.0] * 3 + [1.0] * 5 + [3.0] * 2
    keys = {source.key(), Mixture(parts[::-1], (6, 3)).key(), Mixture(parts, (3, 7)).key(), parts[0].key()}
    assert len(keys) == 4
    assert Mixture(parts, (3, 6), (1.0, 2.0)).key() == source.key(), "latents are shared whatever they weigh"
    with pytest.raises(UserError, match="example 8 does not exist"):
        source.image(8)


def test_parts_of_different_shapes_meet_in_batches_of_one(few: Callable) -> None:
    source = Mixture((few(6), few(9, 1, 32)), (6, 9))
    order = source.order(4)
    for step in range(10):
        (shape,) = {source.shape(i) for i in order.at(range(4 * step, 4 * step + 4), 0, "unet")}
        assert shape in ((16, 16), (32, 32))


def test_made_pictures_are_known_before_they_are_there(tmp_path: Path) -> None:
    source = MadePictures(tmp_path / "abc", 3, ("a dog",), 8)
    key = source.key()
    assert source.missing() == [0, 1, 2]
    (tmp_path / "abc").mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(picture).save(source.path(1))
    assert source.missing() == [0, 2]
    assert (source.image(1) == picture).all()
    assert source.captions(1) == ("a dog",)
    assert source.contrasts(1, "a dog") == ()
    assert source.control(1) is None
    assert source.key() == key == MadePictures(Path("elsewhere/abc"), 3, ("a dog",), 8).key()
    changed = [
        ("abd", 3, ("a dog",), 8),
        ("abc", 4, ("a dog",), 8),
        ("abc", 3, ("a cat",), 8),
        ("abc", 3, ("a dog",), 16),
    ]
    others = {MadePictures(Path(name), *rest).key() for name, *rest in changed}
    assert len(others | {key}) == 5
    several = MadePictures(tmp_path / "abc", 3, ("a dog", ""), 8)
    assert [several.captions(number) for number in range(3)] == [("a dog",), ("",), ("a dog",)]
    source.path(1).write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"00001.png: .*; remove it, and the same command makes it again"):
        source.image(1)
