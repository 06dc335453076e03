"""What a stage is validated on: fixed held-out examples, and as many of those that are trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from latentgen.core.rand import Draw
from latentgen.data.order import permute
from latentgen.data.sources.base import Source
from latentgen.engine.validation import FixedExamples, Measure, Validation
from latentgen.recipe import build, sources
from latentgen.recipe.schema import Recipe

Fetch = Callable[[Draw], Any]


def wanted(recipe: Recipe, examples: sources.Examples, stage: str) -> bool:
    """Whether a stage is to be validated, and there is something to validate it on."""
    every = recipe.stage_train(stage).validate_every
    return every > 0 and examples.apart and _count(examples) > 1


def _count(examples: sources.Examples) -> int:
    return min(len(examples.held_out), len(examples.training))


def validation(
    recipe: Recipe,
    examples: sources.Examples,
    stage: str,
    measure: Measure,
    *,
    held_out: Fetch,
    seen: Fetch,
    parts: int = 1,
    together: bool = False,
    world: int = 1,
) -> Validation:
    """How a stage is validated.

    Args:
        measure: the task's loss of each example.
        held_out, seen: make batches of the one kind and of the other.
        parts, together: see `Validation`.
        world: number of processes.
    """
    count, seed = _count(examples), recipe.seed
    chosen = permute(np.arange(count), len(examples.training), seed, stage, "validation")
    return Validation(
        measure,
        _fixed(held_out, examples.held_out, range(count)),
        _fixed(seen, examples.training, [int(i) for i in chosen]),
        seed=seed,
        stage=stage,
        every=recipe.stage_train(stage).validate_every,
        parts=parts,
        batch=len(build.cut(recipe, stage, world=world).rows()[0]),
        together=together,
    )


def _fixed(fetch: Fetch, source: Source, indices: Sequence[int]) -> FixedExamples:
    """Examples by shape, which is what a batch has one of; else in the order in which they were chosen."""
    order = sorted(indices, key=source.shape)
    return FixedExamples(fetch, tuple(order), tuple(source.shape(index) for index in order))
