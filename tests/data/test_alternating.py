"""Two sources in turn: each half of an epoch, whatever their sizes, and a key that follows both."""

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
from latentgen.data.loader import Cut, Loader
from latentgen.data.sources.alternating import Alternating, length
from latentgen.data.sources.base import Source
from latentgen.data.sources.made import MadePictures


class Names:
    """A source of which only the names matter."""

    def __init__(self, letter: str, count: int) -> None:
        self.letter, self.count = letter, count

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"{self.letter}{range(self.count)[index]}"


def mixed(own: int, beside: int) -> Alternating:
    first: Source = Names("a", own)  # type: ignore[assignment]
    second: Source = Names("b", beside)  # type: ignore[assignment]
    return Alternating(first, second)


@given(st.integers(1, 60), st.integers(1, 60))
def test_each_has_half_and_all_of_the_first_are_there_equally_often(own: int, beside: int) -> None:
    source = mixed(own, beside)
    names = Counter(source.name(i) for i in range(len(source)))
    assert len(source) == length(own, beside) <= 2 * max(own, beside + own - 1)
    halves = {letter: [n for name, n in names.items() if name[0] == letter] for letter in "ab"}
    assert sum(halves["a"]) == sum(halves["b"])
    assert len(halves["a"]) == own
    assert len(halves["b"]) == beside
    assert len(set(halves["a"])) == 1
    assert max(halves["b"]) - min(halves["b"]) <= 1


def test_every_epoch_of_training_has_half_of_each() -> None:
    source = mixed(3, 7)
    epoch = len(source)
    seen: list[str] = []
    loader = Loader(lambda draw: [source.name(i) for i in draw.indices], epoch, 5, "unet", Cut(epoch // 2), 6)  # type: ignore[arg-type]
    for _, parts in loader.iterate(0):
        seen += parts[0][1]  # type: ignore[arg-type]
    for at in range(0, len(seen), epoch):
        names = Counter(seen[at : at + epoch])
        assert sum(n for name, n in names.items() if name[0] == "a") == epoch // 2
        assert {n for name, n in names.items() if name[0] == "a"} == {3}
    assert seen[:epoch] != seen[epoch : 2 * epoch]


def test_it_is_a_source(few: Callable) -> None:
    own, beside = few(3), few(5, 1)
    source = Alternating(own, beside, 0.5)
    assert len(source) == 12
    for index in range(12):
        part, number = (beside, index // 2 % 5) if index % 2 else (own, index // 2 % 3)
        assert (source.image(index) == part.image(number)).all()
        assert source.captions(index) == part.captions(number)
        assert source.name(index) == part.name(number)
        assert np.array_equal(source.control(index), part.control(number))
        caption = part.captions(number)[0]
        assert source.contrasts(index, caption) == part.contrasts(number, caption)
    assert source.weights().tolist() == [1.0, 0.5] * 6
    assert source.is_beside().tolist() == [False, True] * 6
    keys = {source.key(), Alternating(beside, own).key(), Alternating(few(4), beside).key(), own.key()}
    assert len(keys) == 4
    assert Alternating(own, beside, 2.0).key() == source.key(), "latents are shared whatever they weigh"


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
