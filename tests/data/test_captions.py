"""Captions: what is put round them once, and what is drawn of them each time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentgen.core.rand import Draw
from latentgen.data.captions import LiveWords, TagDraws
from latentgen.data.fetch import PictureBatches
from latentgen.data.loader import Cut, Loader
from latentgen.data.sources.base import Source
from latentgen.data.sources.worded import Worded, Wording

DrawOf = Callable[..., Draw]


@pytest.fixture
def tagged(few: Callable) -> Source:
    """Pictures whose captions are four tags."""
    return Worded(few(12), Wording(suffix=", t1, t2, t3"))


def spelled(captions: Sequence[str]) -> dict[str, torch.Tensor]:
    """Captions as rows of numbers, so that they go through the loader like token ids."""
    rows = [[ord(sign) for sign in caption.ljust(60)] for caption in captions]
    return {"text_encoder": torch.tensor(rows)}


def texts(batch: dict[str, torch.Tensor]) -> list[str]:
    return ["".join(map(chr, row)).rstrip() for row in batch["text_encoder"].tolist()]


@pytest.mark.parametrize(
    ("wording", "caption", "expected"),
    [
        (Wording(prefix="a photo of "), "a dog", "a photo of a dog"),
        (Wording(prefix="a photo of", suffix=", outdoors"), "a dog", "a photo of a dog, outdoors"),
        (Wording(suffix="outdoors"), "a dog", "a dog outdoors"),
        (Wording(trigger="sks"), "a dog", "sks a dog"),
        (Wording(trigger="sks"), "a SKS dog", "a SKS dog"),
        (Wording(trigger="sks"), "a sksy dog", "sks a sksy dog"),
        (Wording(trigger="<thing>"), "a <thing>, red", "a <thing>, red"),
        (Wording(prefix="sks", trigger="sks"), "a dog", "sks a dog"),
        (Wording("best", "detailed", "sks", ","), "1girl, solo", "sks, best, 1girl, solo, detailed"),
        (Wording("best,", ", detailed", "", ","), "1girl", "best, 1girl, detailed"),
        (Wording("a", "z", "", " | "), "1girl", "a | 1girl | z"),
    ],
)
def test_what_is_put_round_a_caption(wording: Wording, caption: str, expected: str) -> None:
    assert wording(caption) == expected
    assert wording


def test_no_wording_is_none() -> None:
    assert not Wording(separator=",")
    assert not Wording(prefix=" ")


def test_a_worded_source_is_the_source_in_other_words(few: Callable) -> None:
    source = few(6)
    worded = Worded(source, Wording(prefix="see"))
    assert worded.captions(2) == tuple(f"see {caption}" for caption in source.captions(2))
    assert worded.key() not in (source.key(), Worded(source, Wording(prefix="look")).key())
    assert worded.picture_key(2) == source.picture_key(2)
    for caption in worded.captions(2):
        own = source.contrasts(2, caption.removeprefix("see "))
        assert worded.contrasts(2, caption) == tuple(tuple(f"see {text}" for text in ways) for ways in own)


@settings(max_examples=60)
@given(
    tags=st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=20),
    keep=st.integers(0, 4),
    dropout=st.sampled_from([0.0, 0.5, 0.99]),
    shuffle=st.booleans(),
    step=st.integers(0, 5),
)
def test_tags_drawn(tags: list[str], keep: int, dropout: float, shuffle: bool, step: int) -> None:
    draws = TagDraws(shuffle=shuffle, keep=keep, dropout=dropout)
    draw = Draw(0, "unet", step, 2, range(1, 2), (5,))
    ((drawn,),) = draws(draw, [[", ".join(tags)]])
    shown = drawn.split(", ")
    assert shown[:keep] == tags[:keep]
    assert not Counter(shown) - Counter(tags)
    assert drawn
    if dropout == 0:
        assert len(shown) == len(tags)
    if not shuffle:
        left = iter(tags)
        assert all(tag in left for tag in shown), "order stays"


def test_shuffling_and_dropping_are_even(draw: DrawOf) -> None:
    rows = range(400)
    d = draw(rows, global_batch=400, indices=tuple(rows))
    drawn = [own.split("|") for (own,) in TagDraws("|", shuffle=True, dropout=0.25)(d, [["a|b|c|d"]] * 400)]
    assert sum(map(len, drawn)) / 1600 == pytest.approx(0.75, abs=0.05)
    first = Counter(tags[0] for tags in drawn)
    assert all(count == pytest.approx(100, abs=35) for count in first.values())
    assert len({tuple(tags) for tags in drawn}) > 30


def test_separators_keep_their_spaces(draw: DrawOf) -> None:
    d = draw(range(1))
    for separator, caption in ((",", "a, b"), (" | ", "a | b"), (";", "a; b")):
        assert TagDraws(separator, shuffle=True, keep=1, dropout=0.0)(d, [[caption]]) == [[caption]]


def test_live_words_are_drawn_as_pictures_captions_are(few: Callable, draw: DrawOf) -> None:
    d = draw()
    shown = PictureBatches(few(8))(d)["caption"]
    assert texts(LiveWords(few(8), spelled, 0.0)(d)) == shown
    some = texts(LiveWords(few(8), spelled, 0.5)(d))
    assert {""} < set(some)
    assert all(caption in ("", own) for caption, own in zip(some, shown, strict=True))


def test_pictures_of_the_class_keep_their_words(tagged: Source, draw: DrawOf) -> None:
    words = LiveWords(tagged, spelled, 0.0, 1, TagDraws(shuffle=True, examples=7))
    shown = [texts(words(draw(step=step))) for step in range(8)]
    assert {own[-1] for own in shown} == {tagged.captions(7)[0]}
    assert len({own[-2] for own in shown}) > 3


def test_false_captions_are_drawn_like_the_true_one(tagged: Source, draw: DrawOf) -> None:
    d, tags = draw(), TagDraws(shuffle=True, dropout=0.3)
    plain, batch = PictureBatches(tagged, contrasts=2)(d), PictureBatches(tagged, contrasts=2, tags=tags)(d)
    assert batch["caption"] != plain["caption"]
    for true, others, shown, false in zip(
        plain["caption"], plain["contrast"], batch["caption"], batch["contrast"], strict=True
    ):
        heads = [other.split(", ")[0] for other in others]
        assert list(false) == [shown.replace(true.split(", ")[0], head) for head in heads]


@pytest.mark.parametrize(("world", "micro", "workers"), [(1, None, 1), (2, 2, 0), (4, 1, 0)])
def test_the_same_captions_however_the_run_is_cut(tagged: Source, world: int, micro: int | None, workers: int) -> None:
    fetch = LiveWords(tagged, spelled, 0.2, None, TagDraws(shuffle=True, keep=1, dropout=0.3))

    def run(cut: Cut, start: int = 0, workers: int = 0) -> list[tuple[int, list[str]]]:
        loader = Loader(fetch, tagged.order(8), 3, "unet", cut, 4, workers)
        return [(step, [t for _, b in parts for t in texts(b)]) for step, parts in loader.iterate(start)]

    whole = run(Cut(8))
    parts: list[Any] = [run(Cut(8, micro, rank, world), 2, workers) for rank in range(world)]
    joined = [(step, [text for part in parts for text in part[at][1]]) for at, (step, _) in enumerate(parts[0])]
    assert joined == whole[2:]
    assert len({text for _, shown in whole for text in shown}) > 12, "tags are drawn anew"
