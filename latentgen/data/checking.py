"""Every picture of a set decoded once, before anything is trained on it: what is broken is known by name beforehand."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from latentgen.data.images import BadPicture, decode
from latentgen.data.sources.base import Shape


class Checked(NamedTuple):
    """What is known of a picture's file.

    Attributes:
        digest: SHA-256 of its content; "" where it cannot be used.
        size: height and width, upright.
        reason: why it cannot be used; "" where it can.
    """

    digest: str
    size: Shape
    reason: str = ""


def check_picture(content: Callable[[], bytes], max_pixels: int) -> Checked:
    """Decode one picture.

    Args:
        content: gives the file's bytes, or raises `BadPicture`.
    """
    try:
        data = content()
        image = decode(data, max_pixels=max_pixels)
    except BadPicture as error:
        return Checked("", (0, 0), str(error))
    return Checked(hashlib.sha256(data).hexdigest(), (image.height, image.width))


def check_pictures(contents: list[Callable[[], bytes]], max_pixels: int) -> list[Checked]:
    """Decode all pictures, several at a time; the results in their order."""
    # Pillow decodes without the interpreter's lock. Few threads, for each may hold a large picture.
    pool = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1))
    try:
        return list(pool.map(lambda content: check_picture(content, max_pixels), contents))
    finally:  # after Ctrl-C nothing that waits is begun
        pool.shutdown(cancel_futures=True)
