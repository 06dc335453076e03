"""Pictures of any store: what is broken is left out by name, what an index knows is not decoded, windows follow."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from PIL import Image

from latentgen.core.errors import UserError
from latentgen.data.checking import Checked
from latentgen.data.order import ByShape, ReadAhead, Shuffled, Windowed
from latentgen.data.reading import Reading
from latentgen.data.sources.stored import Pictures


def png(number: int, width: int = 12, height: int = 8) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@dataclass
class Memory:
    """Files in memory; `read` counts what was asked for."""

    files: list[bytes]
    groups: tuple[int, ...] | None = None
    index: dict[int, Checked] = field(default_factory=dict)
    seconds: dict[int, bytes] = field(default_factory=dict)
    skipped: tuple[tuple[str, str], ...] = (("a10.png", "no caption"), ("a2.png", "no caption"))
    where: str = "memory"
    read: list[int] = field(default_factory=list)
    asked: list[tuple[int, ...]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return f"p{index}.png"

    def content(self, index: int) -> bytes:
        self.read.append(index)
        return self.files[index]

    def captions(self, index: int) -> tuple[str, ...]:
        return (f"picture {index}",)

    def second(self, index: int, kind: str) -> bytes | None:
        return self.seconds.get(index)

    def soon(self, groups: Sequence[int]) -> None:
        self.asked.append(tuple(groups))

    def known(self, index: int) -> Checked | None:
        return self.index.get(index)


FILES = [png(0), b"no picture", png(2), png(3), b"", png(5)]


def test_broken_pictures_are_left_out_and_named_in_natural_order() -> None:
    source = Pictures(Memory(FILES), Reading(8))
    assert [source.name(i) for i in range(len(source))] == ["p0.png", "p2.png", "p3.png", "p5.png"]
    assert [name for name, _ in source.skipped] == ["a2.png", "a10.png", "p1.png", "p4.png"]
    assert source.captions(1) == ("picture 2",)


def test_too_many_broken_ones_are_an_error_with_the_share_and_the_first() -> None:
    assert len(Pictures(Memory(FILES), Reading(8), broken=2 / 6)) == 4
    with pytest.raises(UserError, match=r"memory: 2 of 6 .* data.broken_share, 0.2; the first is p1.png: not a pict"):
        Pictures(Memory(FILES), Reading(8), broken=0.2)
    with pytest.raises(UserError, match=r"none of its 2 pictures can be used \(p0.png: the file is empty"):
        Pictures(Memory([b"", b"x"]), Reading(8))


def test_what_an_index_knows_is_not_read_beforehand() -> None:
    plain = Pictures(Memory(FILES), Reading(8))
    index = {i: Checked(plain.digest(k), (8, 12)) for k, i in enumerate((0, 2, 3, 5))}
    index |= {1: Checked("", (0, 0), "known to be broken"), 4: Checked("", (0, 0), "known to be empty")}
    store = Memory(FILES, index=index)
    source = Pictures(store, Reading(8))
    assert store.read == []
    assert source.key() == plain.key()
    assert ("p1.png", "known to be broken") in source.skipped
    assert (source.image(1) == plain.image(1)).all()


def test_windows_follow_the_shards_less_what_is_broken() -> None:
    store = Memory(FILES, groups=(2, 3, 1))
    order = Pictures(store, Reading(8), window=2).order(4)
    assert order == ReadAhead(Windowed((1, 2, 1), 2), store.soon)
    assert len(order.at(range(4), 0, "unet")) == 4
    assert len(store.asked) == 1
    assert Pictures(Memory(FILES), Reading(8)).order(4) == Shuffled(4)


def test_shapes_are_chosen_from_the_pictures() -> None:
    tall, wide = [png(i, 8, 16) for i in range(3)], [png(i, 16, 8) for i in range(3, 6)]
    source = Pictures(Memory([*tall, *wide]), Reading(16), buckets=4, step=4)
    shapes = {source.shape(i) for i in range(6)}
    assert len(shapes) == 2
    assert {h > w for h, w in shapes} == {True, False}
    assert all(source.image(i).shape[:2] == source.shape(i) for i in range(6))
    assert isinstance(source.order(2), ByShape)


def test_keys_follow_pictures_captions_cut_and_seconds() -> None:
    store = Memory([png(0), png(1)], seconds={0: png(7), 1: png(8)})
    keys = [
        Pictures(store, Reading(8)).key(),
        Pictures(store, Reading(8, "stretch")).key(),
        Pictures(store, Reading(8, background=(0, 0, 0))).key(),
        Pictures(store, Reading(4)).key(),
        Pictures(store, Reading(8), controls=True).key(),
        Pictures(replace(store, seconds={0: png(7), 1: png(9)}), Reading(8), controls=True).key(),
        Pictures(Memory([png(1), png(0)]), Reading(8)).key(),
    ]
    assert len(set(keys)) == len(keys)
    assert Pictures(Memory([png(0), png(1)]), Reading(8)).key() == keys[0]


def test_masks_beside_are_cut_like_the_pictures() -> None:
    mask = np.zeros((8, 12), dtype=np.uint8)
    mask[:, 6:] = 255
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "png")
    source = Pictures(Memory([png(0), png(1)], seconds={0: file.getvalue()}), Reading(8, mask="beside"))
    found = source.mask(0)
    assert found is not None
    assert (found == mask[:, 2:10]).all()
    assert source.mask(1) is None, "where there is none, all pixels count"
    with pytest.raises(UserError, match=r"data.mask: memory has no masks; put NAME.mask.png beside"):
        Pictures(Memory([png(0)]), Reading(8, mask="beside"))
