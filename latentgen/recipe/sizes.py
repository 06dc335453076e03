"""How large the training pictures are, and what their shapes cut off of them: for the log, and the run's report."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from latentgen.data.buckets import cut_off
from latentgen.data.frame import Shape
from latentgen.data.sources.base import Source
from latentgen.recipe.schema_data import Data

logger = logging.getLogger(__name__)

MOST = 2000
"""Different sizes that are written down, the most frequent ones."""


@dataclass(frozen=True)
class Sizes:
    """What there is of each size.

    Args:
        counts: (height and width of the picture as it lies there, its shape in training) -> how many.
        first: the same -> what the first of them is called.
        stretched: nothing is cut off.
    """

    counts: Mapping[tuple[Shape, Shape], int]
    first: Mapping[tuple[Shape, Shape], str]
    stretched: bool

    def shapes(self) -> dict[Shape, int]:
        """Shape -> how many pictures get it, from the tallest to the widest."""
        found: Counter[Shape] = Counter()
        for (_, shape), count in self.counts.items():
            found[shape] += count
        return {shape: found[shape] for shape in sorted(found, key=lambda shape: (shape[1] / shape[0], shape))}

    def cut_off(self, shape: Shape | None = None) -> float:
        """The mean share of a picture that is cut off; if all had another `shape`, that of it."""
        if self.stretched:
            return 0.0
        shares = [
            count * float(cut_off(np.array([size[1] / size[0]]), shape or own)[0])
            for (size, own), count in self.counts.items()
        ]
        return sum(shares) / sum(self.counts.values())

    def enlarged(self, most: float) -> tuple[int, str, float]:
        """How many pictures are enlarged by more than `most`; the first of them, and by how much it is."""
        factors = {(size, shape): max(shape[0] / size[0], shape[1] / size[1]) for size, shape in self.counts}
        found = [pair for pair, times in factors.items() if times > most]
        if not found:
            return 0, "", 1.0
        return sum(self.counts[pair] for pair in found), self.first[found[0]], factors[found[0]]

    def plain(self) -> bool:
        """Whether all pictures have their shape already."""
        return all(size == shape for size, shape in self.counts)

    def document(self) -> dict[str, Any]:
        """For `sizes.json`: `pictures`, rows of height, width, how many and the number of their shape; `shapes`, rows
        of height, width and how many; `cut_off`, a share."""
        shapes = self.shapes()
        number = {shape: at for at, shape in enumerate(shapes)}
        usual = Counter(self.counts).most_common(MOST)
        return {
            "pictures": [[*size, count, number[shape]] for (size, shape), count in usual],
            "shapes": [[*shape, count] for shape, count in shapes.items()],
            "cut_off": self.cut_off(),
        }


def sizes_of(source: Source, data: Data) -> Sizes:
    """The sizes of all pictures of a source that is cut as `data` says."""
    counts: Counter[tuple[Shape, Shape]] = Counter()
    first: dict[tuple[Shape, Shape], str] = {}
    for index in range(len(source)):
        pair = (source.frame(index).original, source.shape(index))
        counts[pair] += 1
        if counts[pair] == 1:
            first[pair] = source.name(index)
    return Sizes(counts, first, data.crop == "stretch")


def tell(sizes: Sizes, data: Data) -> None:
    """Log the shapes and what they cost; warn of pictures that are enlarged too much."""
    if sizes.plain():
        return
    shapes, side = sizes.shapes(), data.resolution
    told = ", ".join(f"{width} x {height} ({count})" for (height, width), count in shapes.items())
    logger.info("shapes of pictures, width x height: %s; %.1f%% of them is cut off", told, 100 * sizes.cut_off())
    if data.buckets is not None:
        logger.info("squares would cut off %.1f%%", 100 * sizes.cut_off((side, side)))
    count, name, times = sizes.enlarged(data.max_upscale)
    if count:
        logger.warning(
            "%d of %d pictures are enlarged by more than data.max_upscale, %g: they will be soft (the first is %s, "
            "%.1f times); lower data.resolution, or leave them out",
            *(count, sum(sizes.counts.values()), data.max_upscale, name, times),
        )
