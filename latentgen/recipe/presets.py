"""Settings for the usual jobs of fine-tuning, by the number of pictures: what the user did not set is filled in.

The numbers are for models of Stable Diffusion's size: what the documentation of the common trainers recommends, of
diffusers (examples/dreambooth and examples/text_to_image, README.md) and of sd-scripts (docs/train_network_README).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from latentgen.recipe.schema import Recipe

logger = logging.getLogger(__name__)


LORA, ADAPTERS = "lora", ("lora", "dora", "lokr", "loha")


@dataclass(frozen=True)
class Job:
    """What settings depend on.

    Args:
        pictures: to train on, those of the class not counted.
        method: as in `finetune.method`.
        prior: whether class pictures are trained beside them.
        made: whether these are made.
    """

    pictures: int
    method: str
    prior: bool
    made: bool


@dataclass(frozen=True)
class Default:
    """One key: what `subject` and `style` fill in, None for nothing; a function of the job, where it depends on it."""

    key: str
    subject: Any
    style: Any
    reason: str


def _within(low: int, high: int, each: int) -> Callable[[Job], int]:
    """So many for each picture, between two ends."""
    return lambda job: min(max(each * job.pictures, low), high)


def _adapters(value: Any) -> Callable[[Job], Any]:
    """For methods that train small matrices only."""
    return lambda job: value if job.method in ADAPTERS else None


def _rate(full: float) -> Callable[[Job], float]:
    return lambda job: full if job.method == "full" else 1e-4


def _made(job: Job) -> int | None:
    return 200 if job.made else None


TABLE: tuple[Default, ...] = (
    Default("finetune.method", LORA, LORA, "few pictures do not fill all weights, and some MB are easily shared"),
    Default("finetune.rank", _adapters(16), _adapters(32),
            "one thing needs few directions (diffusers' scripts begin at 4), a style changes more of them"),
    Default("finetune.targets", _adapters(("attention",)), _adapters(("attention", "feed_forward")),
            "a subject is a matter of what attends to its word; a style is in the textures, too"),
    Default("finetune.text_encoders", _adapters(True), False,
            "a new thing needs its word, faces above all (diffusers); a style has its words, whose states are cached"),
    Default("finetune.text_learning_rate", _adapters(5e-5), None,
            "somewhat lower for text encoders, such as 5e-5 (sd-scripts)"),
    Default("finetune.prior.pictures", _made, _made, "200 to 300 serve in most cases (diffusers)"),
    Default("train.learning_rate", _rate(5e-6), _rate(1e-5),
            "diffusers: DreamBooth 5e-6, text to image 1e-5, adapters 1e-4"),
    Default("train.global_batch", lambda job: 4 if job.prior else 2, 4,
            "two of the subject, and with a prior as many of the class; more pictures bear more"),
    Default("train.steps", _within(300, 2000, 50), _within(500, 4000, 25),
            "each picture about 100 times (diffusers: 3 to 5 pictures in 400 to 500 steps of one), within reason"),
    Default("train.schedule", "constant", "cosine", "short runs stay at their rate (diffusers), long ones settle"),
    Default("train.warmup_steps", 0, 50, "none (diffusers); to a longer run a soft start costs nothing"),
    Default("train.ema_decay", 0.99, 0.995, "an average over the last hundred steps, or two, of a short run"),
    Default("diffusion.weight", "min_snr", "min_snr", "no noise level outweighs the others (arXiv 2303.09556)"),
    Default("diffusion.min_snr_gamma", 5.0, 5.0, "as in that paper"),
    Default("diffusion.caption_dropout", 0.0, 0.1,
            "without words the model is to stay as it was; in a style it is to draw without them, for guidance"),
    Default("data.flip", False, True, "faces and letters have a side; strokes and colours have none"),
)  # fmt: skip
"""All that presets fill in, and why."""


def filled(recipe: Recipe, pictures: int) -> Recipe:
    """The recipe with what `finetune.preset` says for every key that is not set; others stay as they are.

    Args:
        recipe: as it was loaded: it knows which keys were set.
        pictures: that are trained on.
    """
    f = recipe.finetune
    if f is None or f.preset is None:
        return recipe
    method = f.method if is_set(recipe, "finetune.method") else LORA
    made = f.prior is not None and f.prior.path is None
    job = Job(pictures, method, f.prior is not None, made)
    values, added = recipe.model_dump(by_alias=True), {}
    for entry in TABLE:
        value = getattr(entry, f.preset)
        value = value(job) if callable(value) else value
        if value is not None and not is_set(recipe, entry.key):
            *sections, last = entry.key.split(".")
            inner = values
            for section in sections:
                inner = inner[section]
            inner[last], added[entry.key] = value, value
    if added:
        said = ", ".join(f"{key}={_shown(value)}" for key, value in added.items())
        logger.info("finetune.preset %s, for %d pictures: %s", f.preset, pictures, said)
    return Recipe.model_validate(values)


def is_set(recipe: Recipe, key: str) -> bool:
    """Whether a `section.key` was in the file or on the command line."""
    *sections, last = key.split(".")
    inner: Any = recipe
    for section in sections:
        if not isinstance(inner, BaseModel) or section not in inner.model_fields_set:
            return False
        inner = getattr(inner, section)
    return isinstance(inner, BaseModel) and last in inner.model_fields_set


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
