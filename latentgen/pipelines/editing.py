"""What a request brings besides words: a picture to start from, and a mask of what to draw anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from latentgen.core.errors import UserError
from latentgen.data.fetch import to_tensor
from latentgen.data.images import BadPicture, decode
from latentgen.formats.model import Model
from latentgen.models.autoencoder import encode_moments, factor, latents_of

STRENGTH = 0.8
"""Of a picture without a mask, where none is asked for."""


class Sized(Protocol):
    """The part of a request that says how large the picture is to be."""

    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...


class Edit(Sized, Protocol):
    """The part of a request that this is about; `pipelines.generate.Request` says what each means."""

    @property
    def image(self) -> str | None: ...
    @property
    def mask(self) -> str | None: ...
    @property
    def strength(self) -> float | None: ...


class Given(NamedTuple):
    """What a batch of requests brings.

    Attributes:
        latents: `[b, c, h, w]` of the pictures, None where there are none.
        mask: `[b, 1, h, w]`, 1 where to draw; None draws everywhere.
        channels: `[b, 1 + c, h, w]`, the mask and the latents of what is outside of it, which an inpainting U-Net is
            shown beside the noisy latents; None for others.
    """

    latents: Tensor | None = None
    mask: Tensor | None = None
    channels: Tensor | None = None


def strength_of(edit: Edit) -> float:
    """How much of the process is gone through, above 0 up to 1; 1 keeps nothing of the picture where it is drawn."""
    if edit.strength is not None:
        return edit.strength
    return STRENGTH if edit.image is not None and edit.mask is None else 1.0


def check_edit(edit: Edit, own_steps: bool) -> None:
    """Raise `UserError` for settings that do not go together, and for files that are no pictures.

    Args:
        own_steps: the sampler chooses its steps itself.
    """
    if edit.image is None:
        for name, value in (("--mask", edit.mask), ("--strength", edit.strength)):
            if value is not None:
                raise UserError(f"{name} {value}: says what to do with a picture; add --image FILE, or leave it out")
        return
    strength = strength_of(edit)
    if not 0 < strength <= 1:
        raise UserError(f"--strength {strength}: choose it above 0 (keep nearly all) and at most 1 (keep nothing)")
    if own_steps and strength < 1:
        raise UserError("--sampler: one that chooses its steps itself cannot begin in the middle; say --strength 1")
    for name, path in (("--image", edit.image), ("--mask", edit.mask)):
        if path is not None:
            open_picture(name, path)


def steps_left(edit: Edit, sigmas: Tensor) -> Tensor:
    """The levels to go through, `[m + 1]`, the last of all `[n + 1]` as the strength says; at least one step."""
    n = len(sigmas) - 1
    return sigmas[n - max(1, int(n * strength_of(edit))) :]


@torch.no_grad()
def given(model: Model, batch: Sequence[Edit]) -> Given:
    """Read and encode what the requests of a batch, all of one kind, bring.

    An inpainting model without a picture draws everywhere, as any other.
    """
    device, first = model.unet.device, batch[0]
    if first.image is None and not model.inpaints:
        return Given()
    side = factor(model.vae)
    size = (len(batch), 1, first.height // side, first.width // side)
    latents, mask, masked = None, None, None
    if first.image is not None:
        image = to_tensor([pixels("--image", edit.image, edit) for edit in batch])
        latents = _encode(model, image)
        if first.mask is not None:
            hole = _mask(batch)
            mask = functional.interpolate(hole, size[2:], mode="nearest").to(device)
            masked = _encode(model, image * (1 - hole)) if model.inpaints else None
    if not model.inpaints:
        return Given(latents, mask)
    if masked is None or mask is None:  # all is to be drawn: what is shown is a picture of nothing
        everything = torch.ones(size, device=device)
        nothing = _encode(model, torch.zeros(1, 3, first.height, first.width)).expand(size[0], -1, -1, -1)
        return Given(latents, None, torch.cat([everything, nothing], dim=1))
    return Given(latents, None, torch.cat([mask, masked], dim=1))


def _encode(model: Model, image: Tensor) -> Tensor:
    mean, _ = encode_moments(model.vae, image.to(model.unet.device, model.vae.dtype))
    return latents_of(model.vae, mean).float()


def _mask(batch: Sequence[Edit]) -> Tensor:
    """`[b, 1, h, w]` in pixels: white is to be drawn anew, black stays."""
    return torch.from_numpy(np.stack([hole_of(edit) for edit in batch]))[:, None].float()


def hole_of(edit: Edit) -> np.ndarray:
    """What is to be drawn anew, bool `[h, w]` in pixels, of a request with a mask."""
    return pixels("--mask", edit.mask, edit).mean(axis=2) >= 127.5


def pixels(name: str, path: str | None, size: Sized) -> np.ndarray:
    """The picture of an option, of the request's size, cut in the middle where its shape is another: uint8
    `[h, w, 3]`."""
    assert path is not None
    picture = open_picture(name, path)
    if picture.size != (size.width, size.height):
        how = Image.Resampling.NEAREST if name == "--mask" else Image.Resampling.LANCZOS
        picture = ImageOps.fit(picture, (size.width, size.height), how)
    return np.asarray(picture)


def open_picture(name: str, path: str) -> Image.Image:
    """The picture that the option `name` names; raises `UserError` where there is none, or it cannot be read."""
    if not Path(path).is_file():
        raise UserError(f"{name} {path}: no such file; name a picture")
    try:
        return decode(path)
    except BadPicture as error:
        raise UserError(f"{name} {path}: {error}; name another picture") from error
