"""Draw -> batch: pictures with captions for the VAE and CLIP, cached latents and text states for the U-Net."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentgen.core.rand import Draw
from latentgen.data.captions import TagDraws, Words, as_tensor, drawn_captions
from latentgen.data.latents import CachedLatents
from latentgen.data.masks import draw_masks
from latentgen.data.sources.base import Source


def to_tensor(pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Pictures `[h, w, 3]` in 0 .. 255 to `[b, 3, h, w]` float32 in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return stacked.to(torch.float32) / 127.5 - 1


def to_unit(pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Pictures `[h, w, 3]` in 0 .. 255 to `[b, 3, h, w]` float32 in [0, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(torch.float32) / 255


@dataclass(frozen=True)
class PictureBatches:
    """Pictures as they are read, for the stages that see pixels.

    Args:
        source: the examples.
        flip: mirror each picture half of the time.
        patch: side of a random square cut out of each picture; None shows it whole.
        patch_steps: from this step on pictures are shown whole after all (None: never).
        patch_tries: squares drawn for each picture, of which the one with the most contrast is kept: most of a
            drawing is plain background, which teaches an autoencoder little.
        captions: at most so many captions of an example take part (None: all); 0 leaves captions out.
        contrasts: false captions drawn for each picture, where the source knows any.
        tags: what is drawn of a caption's tags, and of those of its false captions alike; None takes them as they are.
    """

    source: Source
    flip: bool = False
    patch: int | None = None
    patch_steps: int | None = None
    patch_tries: int = 1
    captions: int | None = None
    contrasts: int = 0
    tags: TagDraws | None = None

    def __call__(self, draw: Draw) -> dict[str, Any]:
        """`image` [b, 3, h, w] in [-1, 1]; `caption`, b strings; `contrast`, b tuples of strings."""
        image = to_tensor([self.source.image(index) for index in draw.indices])
        if self.flip:
            mirrored = draw.uniform("flip") < 0.5
            image[mirrored] = image[mirrored].flip(-1)
        if self.patch is not None and (self.patch_steps is None or draw.step < self.patch_steps):
            image = self._cut(image, draw, self.patch)
        if self.captions == 0:
            return {"image": image}
        caption = drawn_captions(draw, self.source, self.captions)
        texts = [[own, *false] for own, false in zip(caption, self._contrasts(draw, caption), strict=True)]
        if self.tags is not None:
            texts = self.tags(draw, texts)
        return {"image": image, "caption": [t[0] for t in texts], "contrast": [tuple(t[1:]) for t in texts]}

    def _contrasts(self, draw: Draw, caption: Sequence[str]) -> list[tuple[str, ...]]:
        """For each caption, false ones: first which respect differs is drawn, then how."""
        if self.contrasts == 0:
            return [()] * len(caption)
        draws = [
            (draw.uniform(f"respect {n}").tolist(), draw.uniform(f"way {n}").tolist()) for n in range(self.contrasts)
        ]
        found: list[tuple[str, ...]] = []
        for row, (index, true) in enumerate(zip(draw.indices, caption, strict=True)):
            respects = self.source.contrasts(index, true)
            picked = []
            for respect, way in draws if respects else ():
                ways = respects[int(respect[row] * len(respects))]
                picked.append(ways[int(way[row] * len(ways))])
            found.append(tuple(picked))
        return found

    def _cut(self, image: Tensor, draw: Draw, side: int) -> Tensor:
        """One square `[b, 3, side, side]` of each picture."""
        best, contrast = image[..., :side, :side], torch.full((len(image),), -1.0)
        for number in range(self.patch_tries):
            top = draw.integers(f"top {number}", image.shape[-2] - side + 1).tolist()
            left = draw.integers(f"left {number}", image.shape[-1] - side + 1).tolist()
            cut = torch.stack([x[:, t : t + side, e : e + side] for x, t, e in zip(image, top, left, strict=True)])
            value = cut.flatten(2).std(dim=2).sum(dim=1)
            best = torch.where((value > contrast)[:, None, None, None], cut, best)
            contrast = torch.maximum(contrast, value)
        return best


@dataclass(frozen=True)
class CachedBatches:
    """Cached latents and texts, for the U-Net: neither the VAE nor, as a rule, the text encoder runs.

    Args:
        latents: mean and standard deviation of the raw latents of n examples.
        words: what the network reads of the captions of a draw.
        values: by name what else there is of the examples, [n, ...].
        pictures: [h, w, 3] of every example, where pixels are needed as well.
        masks: also draw what of the pictures is to be drawn anew.
        controls: example -> [h, w, 3], the picture that a ControlNet is shown beside it.
    """

    latents: CachedLatents
    words: Words
    values: Mapping[str, NDArray] = field(default_factory=dict)
    pictures: Source | None = None
    masks: bool = False
    controls: Callable[[int], NDArray[np.uint8]] | None = None

    def __call__(self, draw: Draw) -> dict[str, Tensor]:
        """`mean` and `std` [b, c, h, w] of raw latents, and [b, ...] all that `words` and `values` name; `image`
        [b, 3, H, W] in [-1, 1] where there are `pictures`, `mask` [b, 1, H, W] of them, 1 where to draw anew; `control`
        [b, 3, H, W] in [0, 1]."""
        numbers = np.array(draw.indices)
        mirrored = torch.zeros(len(numbers), dtype=torch.bool)
        if self.latents.mirrors:
            mirrored = draw.uniform("flip") < 0.5
        moments = as_tensor(self.latents(draw.indices, mirrored.numpy()))
        batch = {"mean": moments[:, 0], "std": moments[:, 1], **self.words(draw)}
        batch |= {name: as_tensor(value[numbers]) for name, value in self.values.items()}
        if self.pictures is not None:
            image = to_tensor([self.pictures.image(index) for index in draw.indices])
            image[mirrored] = image[mirrored].flip(-1)
            batch["image"] = image
            if self.masks:
                batch["mask"] = draw_masks(draw, *image.shape[2:])
        if self.controls is not None:
            control = to_unit([self.controls(index) for index in draw.indices])
            control[mirrored] = control[mirrored].flip(-1)
            batch["control"] = control
        return batch
