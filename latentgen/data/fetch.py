"""Draw -> batch: pictures with captions for the VAE and CLIP, cached latents and text states for the U-Net."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from latentgen.core.rand import Draw
from latentgen.data.captions import TagDraws, Words, as_tensor, drawn_captions
from latentgen.data.frame import CENTRE, Place
from latentgen.data.latents import CachedLatents
from latentgen.data.masks import draw_masks
from latentgen.data.sources.base import Source


def to_bytes(pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Pictures `[h, w, 3]` of one shape as one uint8 tensor `[b, 3, h, w]`: what travels from workers to the device."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def from_bytes(image: Tensor) -> Tensor:
    """uint8 `[b, 3, h, w]` to float32 in [-1, 1], where it is."""
    assert image.dtype == torch.uint8, image.dtype
    return image.to(torch.float32).div_(127.5).sub_(1)  # in place: a new tensor costs more than the arithmetic


def to_tensor(pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Pictures `[h, w, 3]` in 0 .. 255 to `[b, 3, h, w]` float32 in [-1, 1]."""
    return from_bytes(to_bytes(pictures))


def to_unit(pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Pictures `[h, w, 3]` in 0 .. 255 to `[b, 3, h, w]` float32 in [0, 1]."""
    return to_bytes(pictures).to(torch.float32) / 255


def squared(picture: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """The whole picture `[h, w, 3]` as a square `[side, side, 3]`, by Lanczos resampling (antialiased); one of that
    shape is kept exactly."""
    if picture.shape[:2] == (side, side):
        return picture
    return np.array(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS), dtype=np.uint8)


def places(draw: Draw, crop: bool) -> list[Place]:
    """Where the pictures of a draw are cut: at places of its own if `crop`, else in their middle."""
    if not crop:
        return [CENTRE] * len(draw.rows)
    return [(top, left) for top, left in draw.uniform("crop", (2,)).tolist()]


@dataclass(frozen=True)
class PictureBatches:
    """Pictures as they are read, for the stages that see pixels.

    Args:
        source: the examples; those of a draw have one shape, unless they become squares.
        flip: mirror each picture half of the time.
        crop: cut each picture at another place each time.
        square: resample every picture to a square of this side, whatever its shape.
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
    crop: bool = False
    square: int | None = None
    patch: int | None = None
    patch_steps: int | None = None
    patch_tries: int = 1
    captions: int | None = None
    contrasts: int = 0
    tags: TagDraws | None = None

    def __call__(self, draw: Draw) -> dict[str, Any]:
        """`image` uint8 [b, 3, h, w]; `caption`, b strings; `contrast`, b tuples of strings."""
        where = zip(draw.indices, places(draw, self.crop), strict=True)
        pictures = [self.source.image(index, at) for index, at in where]
        image = to_bytes(pictures if self.square is None else [squared(each, self.square) for each in pictures])
        if self.flip:
            image = _turned(image, draw.uniform("flip") < 0.5)
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
            value = from_bytes(cut).flatten(2).std(dim=2).sum(dim=1)
            best = torch.where((value > contrast)[:, None, None, None], cut, best)
            contrast = torch.maximum(contrast, value)
        return best


@dataclass(frozen=True)
class CachedBatches:
    """Latents and texts for the U-Net. They are cached, so that neither the VAE nor, as a rule, the text encoder runs;
    or there are pictures in their place, which the task encodes.

    Args:
        latents: mean and standard deviation of the raw latents of n examples; None where pictures are encoded anew each
            time.
        words: what the network reads of the captions of a draw.
        values: by name what else there is of the examples, [n, ...].
        pictures: [h, w, 3] of every example, where pixels are needed.
        flip, crop: of pictures that are encoded: mirrored half of the time, cut at another place each time.
        weighing: source of the masks that weigh pixels in the loss.
        sizes: (example, place of its cut) -> what an SDXL U-Net is told of it.
        masks: also draw what of the pictures is to be drawn anew.
        controls: (example, place of its cut) -> [h, w, 3], the picture that a ControlNet is shown beside it.
    """

    latents: CachedLatents | None
    words: Words
    values: Mapping[str, NDArray] = field(default_factory=dict)
    pictures: Source | None = None
    flip: bool = False
    crop: bool = False
    weighing: Source | None = None
    sizes: Callable[[int, Place], Sequence[float]] | None = None
    masks: bool = False
    controls: Callable[[int, Place], NDArray[np.uint8]] | None = None

    def __post_init__(self) -> None:
        assert self.latents is not None or self.pictures is not None, "nothing to learn from"
        assert self.latents is None or not (self.flip or self.crop), "cached latents are cut and mirrored already"

    def __call__(self, draw: Draw) -> dict[str, Tensor]:
        """[b, ...] all that `words` and `values` name, and where they are asked for: `mean` and `std` [b, c, h, w] of
        raw latents; `image` uint8 [b, 3, H, W], the pictures; `mask` [b, 1, H, W] of them, 1 where to draw anew;
        `loss_mask` uint8 [b, 1, H, W], from 0 to 255 what a pixel counts; `sizes` [b, k]; `control` [b, 3, H, W] in
        [0, 1].

        All of an example is cut at one place, and mirrored along with it.
        """
        numbers, at = np.array(draw.indices), places(draw, self.crop)
        mirrored = torch.zeros(len(numbers), dtype=torch.bool)
        if self.flip if self.latents is None else self.latents.mirrors:
            mirrored = draw.uniform("flip") < 0.5
        batch: dict[str, Tensor] = {}
        if self.latents is not None:
            moments = as_tensor(self.latents(draw.indices, mirrored.numpy()))
            batch |= {"mean": moments[:, 0], "std": moments[:, 1]}
        batch |= self.words(draw)
        batch |= {name: as_tensor(value[numbers]) for name, value in self.values.items()}
        where = list(zip(draw.indices, at, strict=True))
        if self.pictures is not None:
            batch["image"] = _turned(to_bytes([self.pictures.image(*each) for each in where]), mirrored)
            if self.masks:
                batch["mask"] = draw_masks(draw, *batch["image"].shape[2:])
        if self.weighing is not None:
            masks = torch.from_numpy(np.stack([_mask(self.weighing, *each) for each in where]))
            batch["loss_mask"] = _turned(masks[:, None], mirrored)
        if self.sizes is not None:
            # The corner of a mirrored picture is counted from the other side: that of the mirrored place.
            seen = zip(where, mirrored.tolist(), strict=True)
            rows = [
                self.sizes(index, (top, 1 - left) if turned else (top, left)) for (index, (top, left)), turned in seen
            ]
            batch["sizes"] = torch.tensor(rows, dtype=torch.float32)
        if self.controls is not None:
            batch["control"] = _turned(to_unit([self.controls(*each) for each in where]), mirrored)
        return batch


def _turned(image: Tensor, mirrored: Tensor) -> Tensor:
    """`[b, c, h, w]`, changed in place: mirrored where `mirrored` `[b]` says so."""
    for row in mirrored.nonzero()[:, 0].tolist():  # one by one: an index of many rows copies them twice
        image[row] = image[row].flip(-1)
    return image


def _mask(source: Source, index: int, at: Place) -> NDArray[np.uint8]:
    """What the pixels of an example count, `[h, w]` from 0 to 255."""
    mask = source.mask(index, at)
    return np.full(source.shape(index), 255, dtype=np.uint8) if mask is None else mask
