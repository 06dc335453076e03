"""Draw -> batch: pictures with captions for the VAE and CLIP, cached latents and text states for the U-Net."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentgen.core.rand import Draw
from latentgen.data.sources.base import Source


def to_tensor(pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Pictures `[h, w, 3]` in 0 .. 255 to `[b, 3, h, w]` float32 in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return stacked.to(torch.float32) / 127.5 - 1


def first_captions(source: Source, index: int, limit: int | None) -> tuple[str, ...]:
    """The captions that training may show for one example."""
    return source.captions(index)[:limit]


@dataclass(frozen=True)
class PictureBatches:
    """Pictures as they are read, for the stages that see pixels.

    Args:
        source: the examples.
        flip: mirror each picture half of the time.
        patch: side of a random square cut out of each picture; None shows it whole.
        captions: at most so many captions of an example take part (None: all); 0 leaves captions out.
    """

    source: Source
    flip: bool = False
    patch: int | None = None
    captions: int | None = None

    def __call__(self, draw: Draw) -> dict[str, Any]:
        """`image` [b, 3, h, w] in [-1, 1] and `caption`, b strings."""
        image = to_tensor([self.source.image(index) for index in draw.indices])
        if self.flip:
            mirrored = draw.uniform("flip") < 0.5
            image[mirrored] = image[mirrored].flip(-1)
        if self.patch is not None:
            top = draw.integers("top", image.shape[-2] - self.patch + 1)
            left = draw.integers("left", image.shape[-1] - self.patch + 1)
            image = torch.stack(
                [x[:, t : t + self.patch, e : e + self.patch] for x, t, e in zip(image, top, left, strict=True)]
            )
        if self.captions == 0:
            return {"image": image}
        choice = draw.uniform("caption").tolist()
        options = [first_captions(self.source, index, self.captions) for index in draw.indices]
        return {"image": image, "caption": [o[int(c * len(o))] for o, c in zip(options, choice, strict=True)]}


@dataclass(frozen=True)
class CachedBatches:
    """Cached latents and text states, for the U-Net: neither the VAE nor the text encoder runs.

    Args:
        moments: [variants * n, 2, c, h, w] mean and standard deviation of the raw latents; variant 1 is mirrored.
        states: [m, t, d] text states; row 0 is the empty caption.
        rows: for each example, the rows of `states` that describe it.
        dropout: share of captions replaced by the empty one.
    """

    moments: NDArray[np.float16]
    states: NDArray[np.float16]
    rows: Sequence[tuple[int, ...]]
    dropout: float

    def __call__(self, draw: Draw) -> dict[str, Tensor]:
        """`mean` and `std` [b, c, h, w] of raw latents, `context` [b, t, d]; float32."""
        at = torch.tensor(draw.indices)
        examples = len(self.rows)
        if len(self.moments) > examples:
            at = at + examples * (draw.uniform("flip") < 0.5)
        moments = torch.from_numpy(np.asarray(self.moments[at.numpy()], dtype=np.float32))
        choice, drop = draw.uniform("caption").tolist(), (draw.uniform("dropout") < self.dropout).tolist()
        options = (self.rows[index] for index in draw.indices)
        rows = [0 if d else o[int(c * len(o))] for o, c, d in zip(options, choice, drop, strict=True)]
        context = torch.from_numpy(np.asarray(self.states[rows], dtype=np.float32))
        return {"mean": moments[:, 0], "std": moments[:, 1], "context": context}
