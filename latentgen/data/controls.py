"""The picture that a ControlNet is shown beside each example."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentgen.core.errors import UserError
from latentgen.data.edges import edges
from latentgen.data.frame import CENTRE, Place
from latentgen.data.sources.base import Source


@dataclass(frozen=True)
class Controls:
    """Pictures to follow, by the number of the example.

    Args:
        source: the examples.
        kind: "edge", the edges in the example's own picture, or "picture", the second one that it comes with.
    """

    source: Source
    kind: str

    def __call__(self, index: int, at: Place = CENTRE) -> NDArray[np.uint8]:
        """uint8 [h, w, 3], cut like the example's picture.

        Raises:
            UserError: the example has no second picture.
        """
        if self.kind == "edge":
            return edges(self.source.image(index, at))
        picture = self.source.control(index, at)
        if picture is None:
            raise UserError(f"{self.source.name(index)} has no picture to follow; say finetune.control: edge")
        return picture
