"""Latents and text states, computed once and kept: the U-Net stage never runs the VAE or the text encoder."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from torch import nn

from latentgen.core.errors import UserError
from latentgen.core.files import content_key
from latentgen.data.cache import ArrayCache, Compute
from latentgen.data.cache_entries import Entries, entries
from latentgen.data.captions import first_captions
from latentgen.data.fetch import to_tensor
from latentgen.data.frame import Shape
from latentgen.data.latents import CachedLatents
from latentgen.data.sources.base import Source, shapes_of
from latentgen.formats.model import Model
from latentgen.models.autoencoder import encode_moments, factor
from latentgen.models.text import pooled_width, prompt_length, states_width

logger = logging.getLogger(__name__)

VERSION = 1
"""Part of every key; to be raised when what is cached for the same content changes."""


@dataclass(frozen=True)
class Share:
    """This process's part of the work: rank of world. `alive` is called all the while it waits for another run; the
    folders of the caches that are filled, or found full, are added to `folders`."""

    rank: int = 0
    world: int = 1
    alive: Callable[[], object] = lambda: None
    folders: list[Path] = field(default_factory=list)

    def fill(self, cache: ArrayCache, compute: Compute) -> None:
        """Fill a cache together."""
        cache.fill(compute, rank=self.rank, world=self.world, alive=self.alive)
        self.folders.append(cache.folder)


def weights_key(network: nn.Module) -> str:
    """A name for a network's weights: the SHA-256 of every tensor, with its name, type and shape."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        value = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name}:{value.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def cache_latents(model: Model, source: Source, folder: Path, *, flip: bool, share: Share) -> CachedLatents:
    """Mean and standard deviation of every example's raw latents, an array for each shape.

    Whitening and the draw from the posterior happen later, so they may change without a new cache.

    Args:
        folder: all caches; these are subfolders named by VAE, pictures and mirroring.
        flip: a second variant of every picture, mirrored, follows the first ones.

    Raises:
        UserError: a latent is not finite or does not fit float16.
    """
    shapes, which = shapes_of(source)
    rows = np.zeros(len(source), dtype=np.int64)
    arrays = []
    for number, shape in enumerate(shapes):
        members = np.flatnonzero(which == number)
        rows[members] = np.arange(len(members))
        arrays.append(_cache_shape(model, source, members, shape, folder, flip, share))
    return CachedLatents(tuple(arrays), which, rows, flip)


def _cache_shape(
    model: Model, source: Source, members: NDArray[np.int64], shape: Shape, folder: Path, flip: bool, share: Share
) -> NDArray[np.float16]:
    """The latents of the examples of one shape, `[variants * m, 2, c, h/f, w/f]`."""
    vae, m, times = model.vae, len(members), factor(model.vae)
    variants = range(1 + flip)
    pictures = [(source.digest(int(index)), source.picture_key(int(index))) for index in members]
    rows_of = ((digest, f"{key} {variant}") for variant in variants for digest, key in pictures)
    own = entries(f"{VERSION} {weights_key(vae)}", rows_of)
    values_shape = (2, model.latent_channels, shape[0] // times, shape[1] // times)
    cache = ArrayCache(folder / "latents" / name_of(own, values_shape), own, values_shape, "latents")

    def compute(rows: Sequence[int]) -> NDArray[np.float16]:
        image = to_tensor([source.image(int(members[row % m])) for row in rows])
        mirrored = torch.tensor([row >= m for row in rows])
        image[mirrored] = image[mirrored].flip(-1)
        moments = [torch.stack(encode_moments(vae, part.to(vae.device)), dim=1).cpu() for part in image.split(32)]
        values = torch.cat(moments).to(torch.float16)
        bad = (~values.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
        if bad:
            name = source.name(int(members[rows[bad[0]] % m]))
            raise UserError(f"the VAE gives latents that are not finite for {name}")
        return values.numpy()

    share.fill(cache, compute)
    return cache.open()


def name_of(rows: Entries, shape: tuple[int, ...]) -> str:
    """What the folder of a cache is called."""
    return content_key(hashlib.sha256(rows.keys.tobytes()).hexdigest(), shape)


Rows = Sequence[tuple[int, ...]]
"""For each example, the numbers of its captions in a table."""


class Texts(NamedTuple):
    """Of m distinct captions, row 0 the empty one: `states` `[m, t, d]` and `pooled` `[m, p]` (None where the U-Net
    reads none), float16; and each example's rows."""

    states: NDArray[np.float16]
    pooled: NDArray[np.float16] | None
    rows: Rows

    def parts(self) -> dict[str, NDArray[np.float16]]:
        """By the names that `models.context.context_of` reads."""
        return {"context": self.states, **({} if self.pooled is None else {"pooled": self.pooled})}


def distinct_captions(source: Source, limit: int | None) -> tuple[list[str], Rows]:
    """Every caption once, the empty one first; and for each example the numbers of its own."""
    number: dict[str, int] = {"": 0}
    rows = [
        tuple(number.setdefault(caption, len(number)) for caption in first_captions(source, index, limit))
        for index in range(len(source))
    ]
    return list(number), rows


@torch.no_grad()
def cache_text(model: Model, source: Source, folder: Path, *, captions: int | None, share: Share) -> Texts:
    """What the U-Net reads of every caption.

    Args:
        folder: all caches; this one is the subfolder named by text encoder, tokenizer and captions.
        captions: at most so many captions of an example.
    """
    distinct, rows = distinct_captions(source, captions)
    towers = [(weights_key(tower.encoder), tower.tokenizer.backend_tokenizer.to_str()) for tower in model.towers]
    length = prompt_length(model.towers, model.chunks)
    width, pooled = states_width(model.towers), pooled_width(model.towers)
    shape = (length * width + pooled,) if pooled else (length, width)
    maker = content_key("text", VERSION, towers, model.zero_empty)
    own = entries(maker, ((caption, caption) for caption in distinct))
    what = f"text states of {len(distinct)} captions"
    cache = ArrayCache(folder / "text" / name_of(own, shape), own, shape, what)

    def compute(part: Sequence[int]) -> NDArray[np.float16]:
        context = model.encode([distinct[row] for row in part])
        values = context.states
        if context.pooled is not None:
            values = torch.cat([values.flatten(1), context.pooled], dim=1)
        return values.to(torch.float16).cpu().numpy()

    share.fill(cache, compute)
    values = cache.open()
    if not pooled:
        return Texts(values, None, rows)
    # Views of the mapped file: the states would not fit into memory as copies.
    strides = (values.strides[0], width * values.itemsize, values.itemsize)
    states = as_strided(values, (len(distinct), length, width), strides, writeable=False)
    return Texts(states, values[:, length * width :], rows)
