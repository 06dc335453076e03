"""Latents and text states, computed once and kept: the U-Net stage never runs the VAE or the text encoder."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from latentgen.core.errors import UserError
from latentgen.core.files import content_key
from latentgen.data.cache import ArrayCache
from latentgen.data.fetch import first_captions, to_tensor
from latentgen.data.sources.base import Source
from latentgen.formats.model_folder import Model
from latentgen.models.autoencoder import encode_moments, factor
from latentgen.models.text import encode_text

logger = logging.getLogger(__name__)

VERSION = 1
"""Part of every key; to be raised when what is cached for the same content changes."""


@dataclass(frozen=True)
class Share:
    """This process's part of the work: rank of world. `alive` is called all the while it waits for another run."""

    rank: int = 0
    world: int = 1
    alive: Callable[[], object] = lambda: None


def weights_key(network: nn.Module) -> str:
    """A name for a network's weights: the SHA-256 of every tensor, with its name, type and shape."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        value = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name}:{value.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def cache_latents(model: Model, source: Source, folder: Path, *, flip: bool, share: Share) -> NDArray[np.float16]:
    """Mean and standard deviation of every example's raw latents, `[variants * n, 2, c, h/f, w/f]` float16.

    Whitening and the draw from the posterior happen later, so they may change without a new cache.

    Args:
        folder: all caches; this one is the subfolder named by VAE, pictures and mirroring.
        flip: a second variant of every picture, mirrored, follows the first n rows.

    Raises:
        UserError: a latent is not finite or does not fit float16.
    """
    vae, n = model.vae, len(source)
    side = source.image(0).shape[0] // factor(vae)
    key = content_key("latents", VERSION, weights_key(vae), source.key(), flip)
    shape = (2, vae.config["latent_channels"], side, side)
    cache = ArrayCache(folder / "latents" / key, n * (1 + flip), shape, "latents")

    def compute(rows: range) -> NDArray[np.float16]:
        image = to_tensor([source.image(row % n) for row in rows])
        mirrored = torch.tensor([row >= n for row in rows])
        image[mirrored] = image[mirrored].flip(-1)
        moments = [torch.stack(encode_moments(vae, part.to(vae.device)), dim=1).cpu() for part in image.split(32)]
        values = torch.cat(moments).to(torch.float16)
        bad = (~values.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
        if bad:
            raise UserError(f"the VAE gives latents that are not finite for {source.name(rows[bad[0]] % n)}")
        return values.numpy()

    cache.fill(compute, rank=share.rank, world=share.world, alive=share.alive)
    return cache.open()


@torch.no_grad()
def cache_text(
    model: Model, source: Source, folder: Path, *, captions: int | None, share: Share
) -> tuple[NDArray[np.float16], Sequence[tuple[int, ...]]]:
    """Text states `[m, t, d]` float16 of every distinct caption, row 0 the empty one; and each example's rows.

    Args:
        folder: all caches; this one is the subfolder named by text encoder, tokenizer and captions.
        captions: at most so many captions of an example.
    """
    number: dict[str, int] = {"": 0}
    rows = [
        tuple(number.setdefault(caption, len(number)) for caption in first_captions(source, index, captions))
        for index in range(len(source))
    ]
    distinct = list(number)
    tokenizer = model.tokenizer.backend_tokenizer.to_str()
    shape = (model.tokenizer.model_max_length, model.text_encoder.config.hidden_size)
    key = content_key("text", VERSION, weights_key(model.text_encoder), tokenizer, distinct, shape)
    cache = ArrayCache(folder / "text" / key, len(distinct), shape, f"text states of {len(distinct)} captions")

    def compute(part: range) -> NDArray[np.float16]:
        states = encode_text(model.text_encoder, model.tokenizer, distinct[part.start : part.stop])
        return states.to(torch.float16).cpu().numpy()

    cache.fill(compute, rank=share.rank, world=share.world, alive=share.alive)
    return cache.open(), rows
