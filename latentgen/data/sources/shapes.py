"""The embedded data set: a world of coloured shapes with captions. Nothing to download; captions can be judged exactly.

Example number -> (picture, caption, scene) is a pure function of the seed, the split and the number. Pictures are
64x64 RGB, antialiased. One to four objects out of six shapes, eight colours and two sizes stand on a white or gray
background; the categories mirror GenEval (arXiv 2310.11513). Twelve (shape, colour) pairs and a tenth of the pairs of
objects are never shown in the training split, so that composition can be measured (`shapes_scene.HELDOUT_KINDS`,
`shapes_scene.heldout_pairs`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from latentgen.core.errors import UserError
from latentgen.core.files import content_key
from latentgen.data.frame import CENTRE, Frame, Place, Shape
from latentgen.data.order import Order, Shuffled
from latentgen.data.sources.shapes_captions import alterations, captions_of, parse, phrase
from latentgen.data.sources.shapes_layout import Draws, draw_scene
from latentgen.data.sources.shapes_render import render
from latentgen.data.sources.shapes_scene import SIDE, SPLITS, Scene

VERSION = 1
"""Part of every content key; to be raised whenever a picture or a caption of any number changes."""


@dataclass(frozen=True)
class Example:
    """`image` uint8 [resolution, resolution, 3] RGB, its true `captions` (the first is the default), and the scene."""

    image: np.ndarray
    captions: tuple[str, ...]
    scene: Scene

    @property
    def caption(self) -> str:
        return self.captions[0]


def example(number: int, *, seed: int = 0, split: str = "train", resolution: int = SIDE) -> Example:
    """Example `number` of the world with this seed and split. Raises `UserError` for an unknown split or resolution."""
    scene = draw_scene(number, seed=seed, split=split)
    return Example(render(scene, resolution), captions_of(scene, _words(seed, split, number)), scene)


def _words(seed: int, split: str, number: int) -> Draws:
    return Draws("words", seed, split, number)


class ShapesSource:
    """The shapes as a source of the data loader: `size` examples, numbered from 0.

    Args:
        seed: another seed is another data set from the same world.
        size: how many examples there are.
        split: "train" (no held-out combination), "heldout" (nothing else) or "all".
        resolution: side of the pictures in pixels, a multiple of 64.

    Raises:
        UserError: a size below 1, an unknown split or resolution; from the methods, an index outside the source.
    """

    def __init__(self, *, seed: int = 0, size: int = 100_000, split: str = "train", resolution: int = SIDE) -> None:
        if size < 1:
            raise UserError(f"shapes: size is {size}; choose at least 1 example")
        if split not in SPLITS:
            raise UserError(f"shapes: unknown split {split!r}; choose one of {', '.join(SPLITS)}")
        if resolution < SIDE or resolution % SIDE:
            raise UserError(f"shapes: resolution is {resolution}; choose a multiple of {SIDE}")
        self.seed = seed
        self.size = size
        self.split = split
        self.resolution = resolution

    def __len__(self) -> int:
        return self.size

    def key(self) -> str:
        """The content key: equal keys mean the same pictures and captions."""
        return content_key("shapes", VERSION, self.seed, self.split, self.size, self.resolution)

    def scene(self, index: int) -> Scene:
        """What picture `index` shows."""
        if not 0 <= index < self.size:
            raise UserError(f"shapes: example {index} does not exist; there are {self.size}, numbered from 0")
        return draw_scene(index, seed=self.seed, split=self.split)

    def digest(self, index: int) -> str:
        return content_key("shapes", VERSION, self.seed, self.split, index)

    def picture_key(self, index: int) -> str:
        return content_key("shapes", VERSION, self.seed, self.split, index, self.resolution)

    def shape(self, index: int) -> Shape:
        del index
        return self.resolution, self.resolution

    def frame(self, index: int, at: Place = CENTRE) -> Frame:
        """The whole picture: nothing is cut off."""
        del at
        return Frame(self.shape(index), (0, 0))

    def image(self, index: int, at: Place = CENTRE) -> np.ndarray:
        """Picture `index`, uint8 [resolution, resolution, 3], RGB."""
        del at
        return render(self.scene(index), self.resolution)

    def captions(self, index: int) -> tuple[str, ...]:
        """True captions of picture `index`; the first is the default, one says everything, others say less."""
        return captions_of(self.scene(index), _words(self.seed, self.split, index))

    def mask(self, index: int, at: Place = CENTRE) -> None:
        """None: every pixel counts."""
        del index, at

    def control(self, index: int, at: Place = CENTRE) -> None:
        """None: the world has no second pictures."""
        del index, at

    def contrasts(self, index: int, caption: str) -> tuple[tuple[str, ...], ...]:
        """False captions of picture `index`: one shape, colour, size, count, relation or background is changed.

        The colours of two objects exchanged are a respect of their own. None names a held-out combination, unless the
        split shows them.
        """
        draws = Draws("contrasts", self.seed, self.split, index, caption)
        respects: dict[str, list[str]] = {}
        for respect, requirement in alterations(parse(caption)):
            if self.split != "train" or not requirement.heldout:
                respects.setdefault(respect, []).append(phrase(requirement, draws))
        return tuple(tuple(options) for options in respects.values())

    def name(self, index: int) -> str:
        """A name for reports: "shapes:train:123"."""
        return f"shapes:{self.split}:{index}"

    def order(self, batch: int) -> Order:
        del batch
        return Shuffled(self.size)
