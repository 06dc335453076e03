"""Prior preservation (arXiv 2208.12242, section 3.2): pictures of the class, trained in turn with those of the subject.

They are drawn once by the model that training starts from, and kept: picture i is a function of that model, its prompt,
the settings of previews, their number and i, so that runs share them, and a killed run goes on.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path

from latentgen.core.errors import UserError
from latentgen.core.files import clear_leftovers, content_key, make_folder
from latentgen.core.lock import FolderLock
from latentgen.core.log import progress
from latentgen.data.cache import wait_for
from latentgen.data.sources.base import Source
from latentgen.data.sources.made import MadePictures
from latentgen.data.sources.mixture import Mixture, equal_counts
from latentgen.formats.model import Model
from latentgen.models.autoencoder import at_once
from latentgen.pipelines.generate import Request, generate
from latentgen.pipelines.pictures import save_png
from latentgen.recipe import build
from latentgen.recipe.schema import Recipe
from latentgen.recipe.sources import pictures_of
from latentgen.tasks.caching import Share

logger = logging.getLogger(__name__)

TOGETHER = 8
"""Pictures drawn together, at most."""

VERSION = 1
"""Part of the pictures' key; to be raised when the same request gives others."""


def with_prior(recipe: Recipe, source: Source, weights: Mapping[str, str]) -> Source:
    """The subject's pictures and, where `finetune.prior` asks for them, those of the class beside them.

    Args:
        source: the subject's pictures.
        weights: model folder -> what identifies its weights.

    Raises:
        UserError: `finetune.prior.path` is no folder of pictures.
    """
    prior = recipe.finetune.prior if recipe.finetune is not None else None
    if prior is None:
        return source
    beside = _of_class(recipe, weights)
    return Mixture((source, beside), equal_counts(len(source), len(beside)), (1.0, prior.weight))


def keeps(recipe: Recipe) -> bool:
    """Whether the model is asked, while it trains, what it predicted of class pictures before."""
    prior = recipe.finetune.prior if recipe.finetune is not None else None
    return prior is not None and prior.target == "prediction"


def _of_class(recipe: Recipe, weights: Mapping[str, str]) -> Source:
    assert recipe.finetune is not None
    prior, data = recipe.finetune.prior, recipe.data
    assert prior is not None
    if prior.path is not None:
        return class_folder(recipe)
    sources = (recipe.unet.source, recipe.autoencoder.source, recipe.text_encoder.source)
    start = [weights[str(name)] for name in sources]
    key = content_key("prior", VERSION, start, prior.pictures, prior.prompts(), dataclasses.asdict(request(recipe)))
    return MadePictures(Path(data.cache) / "prior" / key, prior.pictures, prior.prompts(), data.resolution)


def class_folder(recipe: Recipe) -> Source:
    """The pictures of `finetune.prior.path`; those without captions get the (first) prompt that says something."""
    assert recipe.finetune is not None
    prior, data = recipe.finetune.prior, recipe.data
    assert prior is not None
    assert prior.path is not None
    if not Path(prior.path).is_dir():
        raise UserError(
            f"finetune.prior.path: {prior.path}: no such folder; leave it out, and the model makes the pictures"
        )
    own = data.model_copy(
        update={
            "source": "folder",
            "path": prior.path,
            "split": None,
            "caption": next(filter(None, prior.prompts())),
            "mask": None,  # what the subject's masks leave out, class pictures are there to keep
        }
    )
    return pictures_of(own)


def request(recipe: Recipe, number: int = 0) -> Request:
    """What class picture `number` is asked for with: the settings of previews, and its number as seed."""
    assert recipe.finetune is not None
    assert recipe.finetune.prior is not None
    prompts = recipe.finetune.prior.prompts()
    return build.request(recipe, prompts[number % len(prompts)], number)


def class_part(source: Source) -> MadePictures | None:
    """The class pictures of `source` that the run makes itself; None where it has none."""
    parts = source.parts if isinstance(source, Mixture) else ()
    return next((part for part in parts if isinstance(part, MadePictures)), None)


def make_class_pictures(recipe: Recipe, model: Model, source: Source, share: Share) -> None:
    """Make the class pictures of `source` that are not there yet; returns when all processes have made their share.

    Args:
        model: what training starts from, on the device.
        source: as `with_prior` gave it.

    Raises:
        UserError: the model cannot draw what the settings of previews ask for.
    """
    pictures = class_part(source)
    if pictures is None:
        return
    if not pictures.missing():
        logger.info("class pictures: reused (%s)", pictures.folder)
    elif share.rank > 0:
        _make(recipe, model, pictures, share)
    else:
        with FolderLock(pictures.folder, "the folder of class pictures") as lock:
            lock.wait(alive=share.alive)  # of two runs that need them, one makes them, and the other has them then
            _make(recipe, model, pictures, share)
            clear_leftovers(pictures.folder)  # now that nobody writes there


def _make(recipe: Recipe, model: Model, pictures: MadePictures, share: Share) -> None:
    make_folder(pictures.folder)
    missing = set(pictures.missing())
    if share.rank == 0:
        logger.info(
            "class pictures: %d of %d to be drawn of %r (%s)",
            *(len(missing), len(pictures), ", ".join(pictures.prompts), pictures.folder),
        )
    side = recipe.data.resolution
    size = min(TOGETHER, at_once(side, side))
    batches = [range(at, min(at + size, len(pictures))) for at in range(0, len(pictures), size)]
    # Whole batches, although some of one may be there: a picture is to have the same bits however often this began.
    mine = [batch for batch in batches[share.rank :: share.world] if missing.intersection(batch)]
    for batch in progress("class pictures", "batch", over=mine, disable=share.rank != 0, leave=False):
        requests = [request(recipe, number) for number in batch]
        for number, picture in zip(batch, generate(model, requests, batch_size=size), strict=True):
            if number in missing:
                save_png(picture, pictures.path(number), recipe=dataclasses.asdict(requests[number - batch.start]))
    wait_for(lambda: not pictures.missing(), pictures.folder)
