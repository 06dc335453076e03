"""How pictures are cut and scaled: one geometry for every source, known from a picture's size alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from latentgen.core.errors import UserError
from latentgen.core.files import content_key
from latentgen.data.frame import CENTRE, Frame, Place, Shape
from latentgen.data.images import MAX_PIXELS

VERSION = 3
"""Part of every key; to be raised whenever the same file would give other pixels."""

CROPS = ("center", "stretch", "random")
MASKS = ("alpha", "beside")
WHITE = (255, 255, 255)


class Cut(NamedTuple):
    """What of an upright picture is kept and what becomes of it.

    Attributes:
        box: left, top, right and bottom in the picture's own pixels.
        shape: height and width that it is scaled to.
        frame: the same, as SDXL is told of it.
    """

    box: tuple[int, int, int, int]
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
        # Whole pixels: what is not scaled keeps its pixels, and of what is, no side is off by more than half a one.
        kept = tuple(max(1, min(round(own / scale), whole)) for own, whole in zip(shape, size, strict=True))
        place = CENTRE if self.crop == "center" else at
        top, left = (int((whole - part) * share) for whole, part, share in zip(size, kept, place, strict=True))
        frame = Frame(size, (round(top * scale), round(left * scale)))
        return Cut((left, top, left + kept[1], top + kept[0]), shape, frame)

    def upscaling(self, size: Shape) -> float:
        """How much a picture of this size is enlarged; below 1 it is made smaller."""
        shape = self.shape_of(size)
        return max(shape[0] / size[0], shape[1] / size[1])


def scale(pixels: NDArray[np.uint8], cut: Cut) -> NDArray[np.uint8]:
    """The part of an upright picture, uint8 `[h, w, 3]` or `[h, w]`, by Lanczos resampling (antialiased).

    The picture may have been decoded smaller than the cut was reckoned for. A part that has its size already keeps its
    pixels exactly.
    """
    height, width = pixels.shape[:2]
    (left, top, right, bottom), (whole_height, whole_width) = cut.box, cut.frame.original
    if (height, width) != (whole_height, whole_width):
        across, down = width / whole_width, height / whole_height
        left, top = min(round(left * across), width - 1), min(round(top * down), height - 1)
        right, bottom = max(left + 1, round(right * across)), max(top + 1, round(bottom * down))
    part = pixels[top:bottom, left:right]
    if part.shape[:2] == cut.shape:
        return np.ascontiguousarray(part)
    planes = torch.from_numpy(part if part.ndim == 3 else part[..., None]).permute(2, 0, 1)[None]
    scaled = functional.interpolate(planes, cut.shape, mode="lanczos", antialias=True)[0].permute(1, 2, 0)
    return np.ascontiguousarray(scaled.numpy() if part.ndim == 3 else scaled[..., 0].numpy())
