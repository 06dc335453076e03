"""The picture that a ControlNet is shown beside each example."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentgen.core.errors import UserError
from latentgen.data.edges import edges
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

    def __call__(self, index: int) -> NDArray[np.uint8]:
        """uint8 [resolution, resolution, 3].

        Raises:
            UserError: the example has no second picture.
        """
        if self.kind == "edge":
            return edges(self.source.image(index))
        picture = self.source.control(index)
        if picture is None:
            raise UserError(f"{self.source.name(index)} has no picture to follow; say finetune.control: edge")
        return picture
