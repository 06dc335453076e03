"""The checks: each finds one kind of trouble. A new one is a function and a line in `CHECKS`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from latentgen.data.doctor.looking import Looked, near_pairs
from latentgen.data.frame import Shape

TINY = 24
"""Pixels of a short side below which a picture is hardly one."""
EXTREME = 4.0
"""Aspect ratio beyond which most of a picture is cut off."""
FLAT = 1.0
"""Levels of spread below which a picture is of one colour."""
NEAR = 7.0
"""Mean difference, in levels, of two pictures of 32 x 32 pixels that show the same ..."""
PLACE = 16.0
"""... and the largest of any of their 8 x 8 places."""
COMMON = 0.25
"""Share of the pictures that one caption may have."""
OUTLIER = 3.0
"""Standard deviations below the mean at which a caption does not seem to fit."""
ENDINGS = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "MPO": ("jpg", "jpeg", "mpo"),
    "PNG": ("png", "apng"),
    "TIFF": ("tif", "tiff"),
    "WEBP": ("webp",),
    "GIF": ("gif",),
    "BMP": ("bmp",),
    "AVIF": ("avif",),
}


@dataclass(frozen=True)
class Patient:
    """A set of pictures and all that is known of it.

    Args:
        looked: its usable pictures.
        skipped: (name, reason) of what is left out.
        against: pictures of the set that it is validated on.
        upscaling: how much training enlarges a picture of this height and width.
        max_upscale: how much it should at most.
        tokens: captions -> of each, how many tokens are cut and which words the tokenizer does not know; None where
            there is no tokenizer.
        scores: how well each picture's caption fits, in any unit; None where nothing tells.
        from_names: numbers of pictures in `looked` whose captions are words of their files' names.
        stray: files of captions without a picture.
        licences: of each picture whether its metadata name a licence; None where none does.
    """

    looked: Sequence[Looked]
    skipped: Sequence[tuple[str, str]] = ()
    against: Sequence[Looked] = ()
    upscaling: Callable[[Shape], float] = lambda size: 0.0
    max_upscale: float = 1.5
    tokens: Callable[[Sequence[str]], list[tuple[int, list[str]]]] | None = None
    scores: Sequence[float] | None = None
    from_names: Sequence[int] = ()
    stray: Sequence[str] = ()
    licences: Sequence[bool] | None = None


@dataclass(frozen=True)
class Trouble:
    """One trouble.

    Args:
        names: what has it.
        why: what is wrong with it, in words.
        pictures: thumbnails, where there are any.
        drop: numbers in the store of what a clean set would leave out.
    """

    names: tuple[str, ...]
    why: str
    pictures: tuple[bytes, ...] = ()
    drop: tuple[int, ...] = field(default=())


Find = Callable[[Patient], Iterator[Trouble]]


class Check(NamedTuple):
    """A kind of trouble: how bad it is ("error", "warning", "note"), what to do about it, and how it is found."""

    severity: str
    title: str
    remedy: str
    find: Find


def _one(picture: Looked, why: str, drop: bool = False) -> Trouble:
    return Trouble((picture.name,), why, (picture.thumb,), (picture.number,) if drop else ())


def _unreadable(patient: Patient) -> Iterator[Trouble]:
    known = ("no caption", "listed in", "leads outside")
    yield from (Trouble((name,), why) for name, why in patient.skipped if not why.startswith(known))


def _skipped(beginning: str) -> Find:
    def find(patient: Patient) -> Iterator[Trouble]:
        yield from (Trouble((name,), why) for name, why in patient.skipped if why.startswith(beginning))

    return find


def _without_caption(patient: Patient) -> Iterator[Trouble]:
    for name, why in patient.skipped:
        if why.startswith("no caption") and "is empty" not in why:
            yield Trouble((name,), why)


def _empty(patient: Patient) -> Iterator[Trouble]:
    for name, why in patient.skipped:
        if why.startswith("no caption") and "is empty" in why:
            yield Trouble((name,), why)


def _rotated(patient: Patient) -> Iterator[Trouble]:
    for picture in patient.looked:
        if picture.orientation != 1:
            yield _one(picture, f"EXIF orientation {picture.orientation}")


def _tiny(patient: Patient) -> Iterator[Trouble]:
    for picture in patient.looked:
        if min(picture.size) < TINY:
            yield _one(picture, f"{picture.size[1]} x {picture.size[0]} pixels")


def _extreme(patient: Patient) -> Iterator[Trouble]:
    for picture in patient.looked:
        ratio = max(picture.size) / min(picture.size)
        if ratio > EXTREME:
            yield _one(picture, f"{picture.size[1]} x {picture.size[0]} pixels, {ratio:.1f} to 1")


def _upscaled(patient: Patient) -> Iterator[Trouble]:
    for picture in patient.looked:
        factor = patient.upscaling(picture.size)
        if factor > patient.max_upscale:
            yield _one(picture, f"{picture.size[1]} x {picture.size[0]} pixels, enlarged {factor:.1f} times")


def _blank(patient: Patient) -> Iterator[Trouble]:
    for picture in patient.looked:
        if picture.spread < FLAT:
            yield _one(picture, f"spread {picture.spread:.1f} levels", drop=True)


def _colour(patient: Patient) -> Iterator[Trouble]:
    for picture in patient.looked:
        kinds = [
            text
            for there, text in (
                (picture.mode == "CMYK", "CMYK"),
                (picture.mode.startswith(("I", "F")), "16 bits or more"),
                (picture.profile and picture.mode != "CMYK", "a colour profile"),
            )
            if there
        ]
        if kinds:
            yield _one(picture, ", ".join(kinds))


def _transparent(patient: Patient) -> Iterator[Trouble]:
    yield from (_one(picture, picture.mode) for picture in patient.looked if picture.transparent)


def _grey(patient: Patient) -> Iterator[Trouble]:
    """Grey pictures where most are not."""
    grey = [picture for picture in patient.looked if picture.mode in ("1", "L", "LA") or picture.mode.startswith("I")]
    if 2 * len(grey) < len(patient.looked):
        yield from (_one(picture, f"mode {picture.mode}") for picture in grey)


def _animated(patient: Patient) -> Iterator[Trouble]:
    yield from (_one(p, f"{p.frames} frames") for p in patient.looked if p.frames > 1 and p.format != "MPO")


def _wrong_ending(patient: Patient) -> Iterator[Trouble]:
    for picture in patient.looked:
        ending = PurePosixPath(picture.name).suffix.lower().removeprefix(".")
        if ending and picture.format in ENDINGS and ending not in ENDINGS[picture.format]:
            yield _one(picture, f"is {picture.format}")


def _duplicates(patient: Patient) -> Iterator[Trouble]:
    groups: dict[str, list[Looked]] = {}
    for picture in patient.looked:
        groups.setdefault(picture.digest, []).append(picture)
    for group in groups.values():
        if len(group) > 1:
            drop = tuple(picture.number for picture in group[1:])
            yield Trouble(tuple(p.name for p in group), "the same file", (group[0].thumb,), drop)


def _alike(one: Looked, other: Looked) -> bool:
    if one.digest == other.digest or min(one.spread, other.spread) < FLAT:
        return False
    difference = np.abs(one.small.astype(np.int16) - other.small).mean(axis=2)
    # Two drawings of much the same differ in one place, a picture that was compressed or scaled a little everywhere.
    places = difference.reshape(8, 4, 8, 4).mean(axis=(1, 3))
    return bool(difference.mean() <= NEAR and places.max() <= PLACE)


def _near(patient: Patient) -> Iterator[Trouble]:
    for a, b in near_pairs(patient.looked, None, _alike):
        one, other = patient.looked[a], patient.looked[b]
        yield Trouble((one.name, other.name), "nearly the same picture", (one.thumb, other.thumb))


def _leaked(patient: Patient) -> Iterator[Trouble]:
    theirs = {picture.digest: picture for picture in patient.against}
    for picture in patient.looked:
        other = theirs.get(picture.digest)
        if other is not None:
            names = (picture.name, f"{other.name} (validation)")
            yield Trouble(names, "the same file", (picture.thumb,), (picture.number,))


def _nearly_leaked(patient: Patient) -> Iterator[Trouble]:
    for a, b in near_pairs(patient.looked, patient.against, _alike):
        one, other = patient.looked[a], patient.against[b]
        names = (one.name, f"{other.name} (validation)")
        yield Trouble(names, "nearly the same picture", (one.thumb, other.thumb))


def _common(patient: Patient) -> Iterator[Trouble]:
    counts = Counter(caption for picture in patient.looked for caption in picture.captions)
    for caption, count in counts.most_common():
        if count < max(4, COMMON * len(patient.looked)):
            return
        pictures = [picture for picture in patient.looked if caption in picture.captions]
        shown = tuple(picture.thumb for picture in pictures[:4])
        yield Trouble(tuple(p.name for p in pictures), f"{count} pictures say {caption!r}", shown)


def _from_names(patient: Patient) -> Iterator[Trouble]:
    for index in patient.from_names:
        yield _one(patient.looked[index], patient.looked[index].captions[0])


def _tokens(patient: Patient) -> list[tuple[Looked, str, int, list[str]]]:
    if patient.tokens is None:
        return []
    pairs = [(picture, caption) for picture in patient.looked for caption in picture.captions]
    answers = patient.tokens([caption for _, caption in pairs])
    return [(picture, caption, cut, words) for (picture, caption), (cut, words) in zip(pairs, answers, strict=True)]


def _long(patient: Patient) -> Iterator[Trouble]:
    for picture, caption, cut, _ in _tokens(patient):
        if cut:
            yield _one(picture, f"{cut} tokens are cut of {caption[:120]!r}")


def _unknown_words(patient: Patient) -> Iterator[Trouble]:
    found: dict[str, list[Looked]] = {}
    for picture, _, _, words in _tokens(patient):
        for word in words:
            found.setdefault(word, []).append(picture)
    for word, pictures in found.items():
        yield Trouble(tuple(p.name for p in pictures), f"spelled letter by letter: {word!r}", (pictures[0].thumb,))


def _mismatched(patient: Patient) -> Iterator[Trouble]:
    if patient.scores is None or len(patient.scores) < 8:
        return
    scores = np.asarray(patient.scores, dtype=np.float64)
    limit = scores.mean() - OUTLIER * scores.std()
    for index in np.argsort(scores):
        if scores[index] < limit:
            picture = patient.looked[int(index)]
            yield _one(picture, f"score {scores[index]:.2f}, mean {scores.mean():.2f}: {picture.captions[0]!r}")


def _stray(patient: Patient) -> Iterator[Trouble]:
    yield from (Trouble((name,), "a text without a picture") for name in patient.stray)


def _licences(patient: Patient) -> Iterator[Trouble]:
    if patient.licences is None:
        return
    for picture, there in zip(patient.looked, patient.licences, strict=True):
        if not there:
            yield _one(picture, "others name a licence, this one none")


CHECKS: Mapping[str, Check] = {
    "unreadable": Check("error", "Pictures that cannot be read", "replace or remove them", _unreadable),
    "missing": Check("error", "Listed, but not there", "put the file there, or drop its row", _skipped("listed in")),
    "outside": Check("error", "Files outside the folder", "put a copy inside", _skipped("leads outside")),
    "leaked": Check("error", "Training pictures in validation", "keep them in one of the two", _leaked),
    "no_caption": Check("warning", "Pictures without a caption", "write one, or give data.caption", _without_caption),
    "empty_caption": Check("warning", "Empty captions", "write one, or give data.caption", _empty),
    "duplicate": Check("warning", "The same file several times", "keep one", _duplicates),
    "near_duplicate": Check("warning", "Nearly the same picture", "keep the better one", _near),
    "nearly_leaked": Check("warning", "Nearly the same in validation", "keep them in one of the two", _nearly_leaked),
    "tiny": Check("warning", "Tiny pictures", "find larger ones, or leave them out", _tiny),
    "extreme_aspect": Check("warning", "Very long or very tall", "cut them by hand", _extreme),
    "upscaled": Check("warning", "Pictures that are enlarged", "lower data.resolution, or leave them out", _upscaled),
    "blank": Check("warning", "Pictures of one colour", "leave them out", _blank),
    "long_caption": Check("warning", "Captions that are cut", "shorten them, or raise text_encoder.chunks", _long),
    "mismatched": Check("warning", "Captions that do not seem to fit", "look at them", _mismatched),
    "stray_text": Check("warning", "Captions without a picture", "check their names", _stray),
    "rotated": Check("note", "Turned by their EXIF", "nothing: they are turned when read", _rotated),
    "colour_space": Check("note", "Other colours than 8-bit sRGB", "nothing: they are converted when read", _colour),
    "transparent": Check("note", "Transparent pictures", "look at data.background and data.mask", _transparent),
    "grey": Check("note", "Grey pictures among coloured ones", "say so in their captions", _grey),
    "animated": Check("note", "Animations", "nothing: the first frame is read", _animated),
    "wrong_ending": Check("note", "Files with another kind's ending", "nothing: their content counts", _wrong_ending),
    "common_caption": Check("note", "One caption for many pictures", "tell them apart in words", _common),
    "names_only": Check("note", "Captions from file names", "write captions, if names say too little", _from_names),
    "unknown_word": Check("note", "Words that the tokenizer spells out", "use words that it knows", _unknown_words),
    "licence": Check("note", "No licence named", "add it to the metadata", _licences),
}  # fmt: skip
