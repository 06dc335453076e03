"""One look at every picture: all that the checks need to know, from decoding each once."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentgen.core.log import progress
from latentgen.data.checking import Checked, check_pictures
from latentgen.data.frame import Shape
from latentgen.data.images import decode, transparency
from latentgen.data.quiet import quiet_pillow
from latentgen.data.sources.stored import Store

SMALL = 32
"""Side of the pictures that are compared."""
THUMB = 112
"""Side of the pictures that are shown."""


@dataclass(frozen=True)
class Looked:
    """What is known of one picture.

    Attributes:
        number: in its store.
        name: what a person finds it by.
        digest: SHA-256 of its file.
        size: height and width, upright.
        captions: as the store has them.
        format, mode: of the file, in Pillow's names.
        orientation: by its EXIF; 1 is upright.
        frames: more than 1 of an animation.
        profile: it has a colour profile.
        transparent: something shows through it.
        spread: standard deviation of its pixels, in levels.
        small: `[SMALL, SMALL, 3]` uint8.
        hash: 64 bits that near pictures share, nearly.
        thumb: a JPEG to show.
    """

    number: int
    name: str
    digest: str
    size: Shape
    captions: tuple[str, ...]
    format: str
    mode: str
    orientation: int
    frames: int
    profile: bool
    transparent: bool
    spread: float
    small: NDArray[np.uint8]
    hash: np.uint64
    thumb: bytes


def look(store: Store, max_pixels: int, what: str) -> tuple[list[Looked], list[tuple[str, str]]]:
    """Every usable picture of a store, and (name, reason) of the others.

    Args:
        what: shown while it lasts.
    """
    numbers = range(len(store))
    checked = check_pictures([partial(store.content, i) for i in numbers], max_pixels)
    good = [i for i in numbers if not checked[i].reason]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        each = pool.map(lambda i: _look(store, i, checked[i]), good)
        looked = list(progress(what, "picture", over=each, total=len(good), leave=False))
    bad = [(store.name(i), checked[i].reason) for i in numbers if checked[i].reason]
    return looked, bad


def _look(store: Store, number: int, checked: Checked) -> Looked:
    content = store.content(number)
    with quiet_pillow():
        header = Image.open(io.BytesIO(content))
        layered = header.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in header.info
        facts = (header.format or "", header.mode, _orientation(header), int(getattr(header, "n_frames", 1)))
        profile = bool(header.info.get("icc_profile"))
    image = decode(content, short_side=max(THUMB, 2 * SMALL))
    small = np.asarray(image.resize((SMALL, SMALL), Image.Resampling.BOX), dtype=np.uint8)
    spread = float(np.asarray(image.resize((64, 64), Image.Resampling.BOX), dtype=np.float32).std(axis=(0, 1)).max())
    image.thumbnail((THUMB, THUMB))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=82)
    return Looked(
        *(number, store.name(number), checked.digest, checked.size, store.captions(number), *facts, profile),
        transparent=layered and transparency(content) is not None,
        spread=spread,
        small=small,
        hash=fingerprint(small),
        thumb=file.getvalue(),
    )


def fingerprint(small: NDArray[np.uint8]) -> np.uint64:
    """Of a picture `[SMALL, SMALL, 3]` whether it gets brighter from each of 8 x 9 places to the one beside it: 64 bits
    that scaling and compression leave nearly alone."""
    grey = Image.fromarray(small).convert("L").resize((9, 8), Image.Resampling.BOX)
    values = np.asarray(grey, dtype=np.int16)
    return np.packbits(values[:, 1:] > values[:, :-1]).view(">u8")[0].astype(np.uint64)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except (SyntaxError, ValueError, TypeError, LookupError, OSError):  # damaged metadata: upright, as `decode` has it
        return 1


Pairs = Sequence[tuple[int, int]]


def near_pairs(
    one: Sequence[Looked], other: Sequence[Looked] | None, alike: Callable[[Looked, Looked], bool]
) -> list[tuple[int, int]]:
    """Numbers of pictures, of one set or of two, that are alike though their files are not.

    Fingerprints that differ in few bits agree in one of their 8 bytes: only those that do are compared.
    """
    second = one if other is None else other
    found: set[tuple[int, int]] = set()
    for byte in range(8):
        groups: dict[int, list[int]] = {}
        for number, picture in enumerate(second):
            groups.setdefault(int(picture.hash) >> (8 * byte) & 255, []).append(number)
        hashes = np.array([picture.hash for picture in second], dtype=np.uint64)
        for number, picture in enumerate(one):
            group = np.array(groups.get(int(picture.hash) >> (8 * byte) & 255, []), dtype=np.int64)
            if other is None:
                group = group[group > number]
            close = group[np.bitwise_count(hashes[group] ^ picture.hash) <= FEW]
            found |= {(number, int(k)) for k in close}
    return sorted((a, b) for a, b in found if alike(one[a], second[b]))


FEW = 6
"""Bits in which fingerprints of near pictures may differ; fewer than there are bytes."""
