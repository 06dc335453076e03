"""How pictures are cut and scaled: one geometry for every source, known from a picture's size alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentgen.core.errors import UserError
from latentgen.core.files import content_key
from latentgen.data.images import MAX_PIXELS
from latentgen.data.sources.base import CENTRE, Frame, Place, Shape

VERSION = 2
"""Part of every key; to be raised whenever the same file would give other pixels."""

CROPS = ("center", "stretch", "random")
MASKS = ("alpha", "beside")
WHITE = (255, 255, 255)


class Cut(NamedTuple):
    """What of an upright picture is kept and what becomes of it.

    Attributes:
        box: left, top, right and bottom in the picture's own pixels, perhaps fractions.
        shape: height and width that it is scaled to.
        frame: the same, as SDXL is told of it.
    """

    box: tuple[float, float, float, float]
    shape: Shape
    frame: Frame


@dataclass(frozen=True)
class Reading:
    """How pictures become examples.

    Args:
        resolution: side of a square picture; the area of others is about its square.
        crop: "center" cuts the middle out, "random" a place that is drawn anew each time, "stretch" keeps all.
        shapes: heights and widths to choose from, by aspect ratio; () makes every picture square.
        background: what lies behind transparent pixels.
        max_pixels: larger pictures are refused.
        mask: what weighs pixels in the loss: the picture's own transparency ("alpha"), or `NAME.mask.png` beside it,
            white where they count ("beside"); None: all count.
    """

    resolution: int
    crop: str = "center"
    shapes: tuple[Shape, ...] = ()
    background: tuple[int, int, int] = WHITE
    max_pixels: int = MAX_PIXELS
    mask: str | None = None

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise UserError(f"data.crop: {self.crop!r} is unknown; choose one of {', '.join(CROPS)}")
        if self.resolution < 1:
            raise UserError(f"data.resolution: {self.resolution} is too small; choose at least 1 pixel")

    def key(self) -> str:
        """Equal keys cut equal pictures to equal pixels (to equal ones at equal places)."""
        kept = {name: value for name, value in asdict(self).items() if name not in ("shapes", "max_pixels")}
        return content_key("reading", VERSION, kept)

    def with_shapes(self, shapes: tuple[Shape, ...]) -> Reading:
        return replace(self, shapes=shapes)

    def shape_of(self, size: Shape) -> Shape:
        """The shape, of those there are, whose aspect ratio is nearest to a picture's."""
        if not self.shapes:
            return self.resolution, self.resolution
        ratios = np.log([width / height for height, width in self.shapes])
        return self.shapes[int(np.argmin(np.abs(ratios - np.log(size[1] / size[0]))))]

    def cut(self, size: Shape, at: Place = CENTRE) -> Cut:
        """Which part of a picture of this height and width is kept.

        Args:
            at: where the part lies, if `crop` is "random".
        """
        shape = self.shape_of(size)
        if self.crop == "stretch":
            return Cut((0, 0, size[1], size[0]), shape, Frame(size, (0, 0)))
        scale = max(shape[0] / size[0], shape[1] / size[1])
        kept = (min(shape[0] / scale, size[0]), min(shape[1] / scale, size[1]))
        if shape[0] == shape[1] or scale == 1:  # whole pixels: what is not scaled keeps its pixels
            kept = (round(kept[0]), round(kept[1]))
        place = CENTRE if self.crop == "center" else at
        top, left = ((whole - part) * share for whole, part, share in zip(size, kept, place, strict=True))
        if shape[0] == shape[1] or scale == 1:
            top, left = int(top), int(left)
        frame = Frame(size, (round(top * scale), round(left * scale)))
        return Cut((left, top, left + kept[1], top + kept[0]), shape, frame)

    def upscaling(self, size: Shape) -> float:
        """How much a picture of this size is enlarged; below 1 it is made smaller."""
        shape = self.shape_of(size)
        return max(shape[0] / size[0], shape[1] / size[1])


def scale(image: Image.Image, cut: Cut) -> NDArray[np.uint8]:
    """The part of an upright image, uint8 `[h, w, 3]` of mode RGB or `[h, w]` of mode L, by Lanczos resampling
    (antialiased).

    The image may have been decoded smaller than the cut was reckoned for. A part that has its size already keeps its
    pixels exactly.
    """
    left, top, right, bottom = cut.box
    height, width = cut.frame.original
    if (image.height, image.width) != (height, width):
        across, down = image.width / width, image.height / height
        left, top, right, bottom = left * across, top * down, right * across, bottom * down
    height, width = cut.shape
    if (right - left, bottom - top) == (width, height) and left == int(left) and top == int(top):
        return np.array(image.crop((int(left), int(top), int(right), int(bottom))), dtype=np.uint8)
    # Resampling only inside the box: a 3 x 4000 picture is not blown up before its middle is cut out.
    box = (left, top, min(right, image.width), min(bottom, image.height))
    scaled = image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    return np.array(scaled, dtype=np.uint8)
