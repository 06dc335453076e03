"""Pictures that a run makes itself before it reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latentgen.core.errors import UserError
from latentgen.core.files import content_key
from latentgen.data.frame import CENTRE, Frame, Place, Shape
from latentgen.data.images import BadPicture, decode
from latentgen.data.order import Order, Shuffled


@dataclass(frozen=True)
class MadePictures:
    """`count` PNG files `folder/00000.png` and on, captions in turn; its key is known before the first is there.

    Args:
        folder: its name stands for all that determines the pictures.
        resolution: their side.
    """

    folder: Path
    count: int
    prompts: tuple[str, ...]
    resolution: int

    def __len__(self) -> int:
        return self.count

    def key(self) -> str:
        return content_key("made", self.folder.name, self.count, self.prompts, self.resolution)

    def path(self, index: int) -> Path:
        """Where picture `index` is, or will be: it is there whole or not at all."""
        return self.folder / f"{index:05d}.png"

    def missing(self) -> list[int]:
        """Numbers of the pictures that are still to be made."""
        return [index for index in range(self.count) if not self.path(index).is_file()]

    def name(self, index: int) -> str:
        return str(self.path(index))

    def digest(self, index: int) -> str:
        return content_key("made", self.folder.name, index)

    def picture_key(self, index: int) -> str:
        return content_key("made", self.folder.name, index, self.resolution)

    def shape(self, index: int) -> Shape:
        del index
        return self.resolution, self.resolution

    def frame(self, index: int, at: Place = CENTRE) -> Frame:
        """The whole picture: nothing is cut off."""
        del at
        return Frame(self.shape(index), (0, 0))

    def image(self, index: int, at: Place = CENTRE) -> NDArray[np.uint8]:
        del at
        try:
            picture = np.asarray(decode(self.path(index)))
        except BadPicture as error:
            raise UserError(f"{self.path(index)}: {error}; remove it, and the same command makes it again") from error
        assert picture.shape == (self.resolution, self.resolution, 3), picture.shape
        return picture

    def captions(self, index: int) -> tuple[str, ...]:
        return (self.prompts[index % len(self.prompts)],)

    def mask(self, index: int, at: Place = CENTRE) -> None:
        """None: every pixel counts."""
        del index, at

    def control(self, index: int, at: Place = CENTRE) -> None:
        """None: they are pictures of words alone."""
        del index, at

    def contrasts(self, index: int, caption: str) -> tuple[tuple[str, ...], ...]:
        """None: nobody has looked at them."""
        del index, caption
        return ()

    def order(self, batch: int) -> Order:
        del batch
        return Shuffled(self.count)
