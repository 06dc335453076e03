"""A source whose captions are put into other words."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from latentgen.core.files import content_key
from latentgen.data.frame import CENTRE, Frame, Place, Shape
from latentgen.data.order import Order
from latentgen.data.sources.base import Source


@dataclass(frozen=True)
class Wording:
    """What is put round every caption, always alike.

    Args:
        prefix, suffix: what stands before and after; a space is put between, but none before a comma or full stop.
        trigger: a word put before captions that do not have it, prefix and suffix included; case does not matter.
        separator: captions are lists of tags with this between them, and so it also stands between what is put
            together here; "": they are sentences.
    """

    prefix: str = ""
    suffix: str = ""
    trigger: str = ""
    separator: str = ""

    def __bool__(self) -> bool:
        """Whether anything is put to captions."""
        return bool(self.prefix.strip() or self.suffix.strip() or self.trigger.strip())

    def __call__(self, caption: str) -> str:
        whole = self._joined(self._joined(self.prefix, caption), self.suffix)
        word = self.trigger.strip()
        if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", whole, re.IGNORECASE):
            return whole
        return self._joined(word, whole)

    def _joined(self, first: str, second: str) -> str:
        first, second, sign = first.strip(), second.strip(), self.separator.strip()
        if not first or not second:
            return first or second
        if sign and not first.endswith(sign) and not second.startswith(sign):
            first += self.separator.rstrip()
        return f"{first}{second}" if re.match(r"[,.;:!?]", second) else f"{first} {second}"


@dataclass(frozen=True)
class Worded:
    """The examples of `source` with its captions in this wording; pictures and order are the source's."""

    source: Source
    wording: Wording

    def __len__(self) -> int:
        return len(self.source)

    def key(self) -> str:
        return content_key("worded", self.source.key(), asdict(self.wording))

    def name(self, index: int) -> str:
        return self.source.name(index)

    def digest(self, index: int) -> str:
        return self.source.digest(index)

    def picture_key(self, index: int) -> str:
        return self.source.picture_key(index)

    def shape(self, index: int) -> Shape:
        return self.source.shape(index)

    def frame(self, index: int, at: Place = CENTRE) -> Frame:
        return self.source.frame(index, at)

    def image(self, index: int, at: Place = CENTRE) -> NDArray[np.uint8]:
        return self.source.image(index, at)

    def mask(self, index: int, at: Place = CENTRE) -> NDArray[np.uint8] | None:
        return self.source.mask(index, at)

    def captions(self, index: int) -> tuple[str, ...]:
        """In the wording, each once."""
        return tuple(dict.fromkeys(map(self.wording, self.source.captions(index))))

    def control(self, index: int, at: Place = CENTRE) -> NDArray[np.uint8] | None:
        return self.source.control(index, at)

    def contrasts(self, index: int, caption: str) -> tuple[tuple[str, ...], ...]:
        """Those of the caption that became `caption`, in the same wording."""
        own = next(text for text in self.source.captions(index) if self.wording(text) == caption)
        return tuple(tuple(map(self.wording, ways)) for ways in self.source.contrasts(index, own))

    def order(self, batch: int) -> Order:
        return self.source.order(batch)
