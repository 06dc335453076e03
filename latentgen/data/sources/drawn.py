"""A source that draws its pictures, as a store of files: what is needed to write them down."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from latentgen.data.checking import Checked
from latentgen.data.sources.base import Source


@dataclass(frozen=True)
class DrawnStore:
    """The pictures of `source` as PNG files.

    Args:
        where: what to call all of them.
    """

    source: Source
    where: str
    skipped: tuple[tuple[str, str], ...] = ()
    groups: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def content(self, index: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(self.source.image(index)).save(file, "PNG")
        return file.getvalue()

    def captions(self, index: int) -> tuple[str, ...]:
        return self.source.captions(index)

    def second(self, index: int, kind: str) -> bytes | None:
        """None: what a source computes beside its pictures it can compute again."""
        del index, kind

    def soon(self, groups: Sequence[int]) -> None:
        """Nothing is done: all is at hand."""

    def known(self, index: int) -> Checked | None:
        """None: these files are made when they are asked for."""
        del index
