"""From the recipe's section `data` to sources of examples."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from latentgen.core.rand import seed_of
from latentgen.data.reading import Reading
from latentgen.data.sources.base import Source
from latentgen.data.sources.drawn import DrawnStore
from latentgen.data.sources.folder import FolderStore
from latentgen.data.sources.hub import DatasetsStore, streamed_paths
from latentgen.data.sources.mixture import Mixture, counts_of
from latentgen.data.sources.shapes import ShapesSource
from latentgen.data.sources.shards import ShardStore
from latentgen.data.sources.stored import Pictures, Store
from latentgen.data.sources.subset import Subset, hold_out
from latentgen.data.sources.table import TableStore, table_paths
from latentgen.data.sources.worded import Worded
from latentgen.recipe.captions import wording
from latentgen.recipe.schema import Recipe
from latentgen.recipe.schema_data import Data

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examples:
    """What a run trains and measures on.

    Args:
        training: the examples that are trained on.
        held_out: at most `data.holdout` others to measure on; where there are none, some of the same.
        apart: whether they are others.
        skipped: pictures that were left out, and why.
    """

    training: Source
    held_out: Source
    apart: bool = True
    skipped: Mapping[str, str] = field(default_factory=dict)


def reading(data: Data) -> Reading:
    """How pictures are cut."""
    return Reading(
        data.resolution,
        data.crop,
        background=data.colour(),
        max_pixels=data.max_pixels,
        mask=data.mask,
    )


def store_of(data: Data) -> Store:
    """Where the pictures of one source lie: anything but the shapes and mixtures."""
    assert data.path is not None
    if data.source == "folder":
        return FolderStore(data.path, split=data.split, caption=data.caption, caption_columns=data.caption_columns)
    if data.source == "shards":
        return shard_store(data)
    columns: dict[str, Any] = {"image_column": data.image_column, "caption_columns": data.caption_columns}
    columns["caption"] = data.caption
    if data.source == "datasets" and not data.streaming:
        return DatasetsStore(data.path, subset=data.subset, split=data.split, **columns)
    streamed = data.source == "datasets"
    paths = streamed_paths(data.path, data.subset, data.split) if streamed else table_paths(data.path)
    return TableStore(paths, local=data.local, window=data.window, max_pixels=data.max_pixels, **columns)


def shard_store(data: Data) -> ShardStore:
    """The shards of a section `data`."""
    assert data.path is not None
    if data.split is not None:
        logger.warning("data.split: %s is ignored: shards have no splits; name them in data.path", data.split)
    return ShardStore(
        data.path,
        caption_columns=data.caption_columns,
        caption=data.caption,
        local=data.local,
        local_gib=data.local_gib,
        window=data.window,
        max_pixels=data.max_pixels,
    )


def stores_of(data: Data) -> list[Store]:
    """The files of every source of a section `data`; those of the procedural world are drawn."""
    return [
        DrawnStore(
            ShapesSource(seed=0, size=part.size, split=part.split or "train", resolution=part.resolution), "shapes"
        )
        if part.source == "shapes"
        else store_of(part)
        for part in data.parts()
    ]


def pictures_of(data: Data, *, controls: bool = False) -> Pictures:
    """The pictures of one source, cut as the recipe says."""
    return Pictures(
        store_of(data),
        reading(data),
        buckets=data.buckets,
        step=data.bucket_step,
        controls=controls,
        broken=data.broken_share,
        window=data.window,
    )


def examples(recipe: Recipe) -> Examples:
    """The training examples and those that training does not see: other shapes; or pictures of `data.validation`, else
    of `validation` in the folder, else a part of the training pictures, chosen by their content.

    Raises:
        UserError: data are missing, empty or without captions.
    """
    data = recipe.data
    controls = recipe.finetune is not None and recipe.finetune.control == "picture"
    found = [_worded(part, _examples(recipe, part, controls)) for part in data.parts()]
    if data.source != "mixture":
        return found[0]
    training = tuple(each.training for each in found)
    counts = counts_of([len(part) for part in training], [part.share for part in data.mixture])
    weights = tuple(part.weight for part in data.mixture)
    held_out = tuple(each.held_out for each in found)
    return Examples(
        Mixture(training, counts, weights),
        some(Mixture(held_out, tuple(map(len, held_out))), data.holdout),
        all(each.apart for each in found),
        {name: reason for each in found for name, reason in each.skipped.items()},
    )


def _examples(recipe: Recipe, data: Data, controls: bool) -> Examples:
    if data.source == "shapes":
        seed = seed_of(recipe.seed, "held-out") % 2**31
        training = ShapesSource(
            seed=recipe.seed, size=data.size, split=data.split or "train", resolution=data.resolution
        )
        return Examples(training, ShapesSource(seed=seed, size=data.holdout, split="train", resolution=data.resolution))
    whole = pictures_of(data, controls=controls)
    skipped = dict(whole.skipped)
    path = data.validation or _beside(data)
    if path is not None and Path(path).resolve() != Path(whole.store.where).resolve():
        others = pictures_of(data.model_copy(update={"path": path, "split": None}), controls=controls)
        return Examples(whole, some(others, data.holdout), True, skipped)
    kept, chosen = hold_out(whole.digests, data.holdout if path is None else 0)
    if not chosen:
        logger.warning("%s: nothing is held out (%d pictures): measured on training pictures", data.path, len(whole))
        return Examples(whole, some(whole, data.holdout), False, skipped)
    logger.info("%s: %d pictures to train on, %d held out to measure on", data.path, len(kept), len(chosen))
    return Examples(Subset(whole, kept), Subset(whole, chosen), True, skipped)


def _worded(data: Data, found: Examples) -> Examples:
    """With the wording that the recipe asks for, in training and in what is measured on alike."""
    own = wording(data)
    if not own:
        return found
    return replace(found, training=Worded(found.training, own), held_out=Worded(found.held_out, own))


def _beside(data: Data) -> str | None:
    """The folder `validation` in a folder of pictures."""
    beside = Path(data.path or "") / "validation"
    return str(beside) if data.source == "folder" and beside.is_dir() else None


def some(source: Source, count: int) -> Source:
    """`count` examples spread evenly over a source, or all."""
    if len(source) <= count:
        return source
    return Subset(source, tuple(i * len(source) // count for i in range(count)))
