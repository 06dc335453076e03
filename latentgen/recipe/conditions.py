"""What a U-Net is shown beside words: mask and surroundings (inpainting), or a picture to follow (ControlNet)."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentgen.core.errors import UserError
from latentgen.core.rand import Draw
from latentgen.data.controls import Controls
from latentgen.data.fetch import CachedBatches
from latentgen.data.frame import Place
from latentgen.data.masks import NUMBERS, mask_of
from latentgen.data.sources.base import Source
from latentgen.formats.model import Model
from latentgen.models.autoencoder import factor
from latentgen.models.context import AESTHETIC_SCORE, sizes_of
from latentgen.models.control import build_control, widen
from latentgen.pipelines.generate import Request
from latentgen.pipelines.pictures import save_png
from latentgen.recipe import build
from latentgen.recipe.schema import Preview, Recipe

logger = logging.getLogger(__name__)

SHOWN = 4
"""Held-out pictures that previews begin from."""

MASKS = ("rectangles", "strokes", "border", "ellipses")
"""Of these pictures, one after the other."""


def control_kind(recipe: Recipe) -> str | None:
    """ "edge" or "picture" where a ControlNet is trained, None elsewhere."""
    return recipe.finetune.control if recipe.finetune is not None else None


def starting_model(recipe: Recipe, model: Model) -> Model:
    """The model with the channels or the ControlNet that fine-tuning asks for; it draws what it drew before.

    Args:
        model: of `unet.from`; its U-Net may be changed in place.

    Raises:
        UserError: it cannot learn what is asked for.
    """
    f = recipe.finetune
    if f is None:
        return model
    if f.inpainting and not model.inpaints:
        if f.method != "full":
            raise UserError(
                f"finetune.inpainting: the U-Net of unet.from ({recipe.unet.source}) has no channels for a mask; say "
                "finetune.method: full, or start from an inpainting model"
            )
        widen(model.unet, model.latent_channels)
    if f.control is not None:
        build.seeded(recipe, "control")
        control = build_control(model.unet, model.latent_channels, factor(model.vae))
        model = dataclasses.replace(model, control=control)
    return model


@dataclasses.dataclass(frozen=True)
class Told:
    """What SDXL's U-Net is told of an example: the size of the picture before it was scaled, where it is cut, and the
    size that training sees.

    Args:
        count: how many numbers the U-Net reads, as `models.context.sizes_of` knows them.
    """

    source: Source
    count: int

    def __call__(self, index: int, at: Place) -> list[float]:
        frame = self.source.frame(index, at)
        return sizes_of(self.count, frame.original, frame.corner, self.source.shape(index), AESTHETIC_SCORE)


def conditioned(recipe: Recipe, model: Model, source: Source, batches: CachedBatches) -> CachedBatches:
    """The batches of `source`, with what `model` is shown or told beside words."""
    more: dict[str, Any] = {"pictures": source, "masks": True} if model.inpaints else {}
    if model.sizes:
        more["sizes"] = Told(source, model.sizes)
    kind = control_kind(recipe)
    if kind is not None:
        more["controls"] = Controls(source, kind)
    return dataclasses.replace(batches, **more)


def write_inputs(recipe: Recipe, model: Model, held_out: Source, folder: Path) -> None:
    """Write what previews begin from: of each held-out picture that is shown, the files that `previews` names."""
    kind, numbers = (
        control_kind(recipe),
        Draw(recipe.seed, "preview", 0, SHOWN, range(SHOWN)).uniform("mask", (NUMBERS,)),
    )
    for number in range(min(SHOWN, len(held_out))):
        files: dict[str, NDArray[np.uint8]] = {}
        if model.inpaints:
            files["image"] = picture = held_out.image(number)
            hole = mask_of(MASKS[number % len(MASKS)], numbers[number].double().numpy(), *picture.shape[:2])
            files["mask"] = np.where(hole, 255, 0).astype(np.uint8)
        if kind is not None:
            files["control"] = Controls(held_out, kind)(number)
        for name, levels in files.items():
            save_png(Image.fromarray(levels), _input(folder, number, name))


def previews(recipe: Recipe, model: Model, held_out: Source, folder: Path) -> list[Request]:
    """The requests of a preview: the recipe's prompts or, where the model is shown pictures, those that `write_inputs`
    put into `folder`, with their own captions; `preview.num` of each in a row."""
    asked = build.previews(recipe)
    if not model.inpaints and model.control is None:
        return asked
    if recipe.preview.prompts != Preview().prompts:
        logger.warning("preview.prompts is ignored: previews show held-out pictures, with their own captions")
    made = []
    for number in range(min(SHOWN, len(held_out))):
        names = (("image", model.inpaints), ("mask", model.inpaints), ("control", model.control is not None))
        files = {name: str(_input(folder, number, name)) for name, shown in names if shown}
        prompt = held_out.captions(number)[0]
        made += [dataclasses.replace(r, prompt=prompt, **files) for r in asked[: recipe.preview.num]]
    return made


def _input(folder: Path, number: int, name: str) -> Path:
    return folder / "inputs" / f"{number}-{name}.png"
