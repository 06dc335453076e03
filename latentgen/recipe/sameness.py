"""Whether two commands are of one run: the same recipe but for what weights do not depend on, and the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentgen.core.files import content_key, file_sha256
from latentgen.recipe.schema import Recipe

FREE_KEYS = {
    "preview", "train.log_every", "train.save_every", "train.keep_last", "train.keep_every", "train.keep_best",
    "train.validate_every", "autoencoder.train.validate_every", "text_encoder.train.validate_every",
    "train.ema_precision", "train.ema_snapshots", "autoencoder.train.ema_snapshots", "text_encoder.train.ema_snapshots",
    "train.ema_device", "autoencoder.train.ema_device", "text_encoder.train.ema_device",
    "train.micro_batch", "train.processes", "autoencoder.train.micro_batch", "text_encoder.train.micro_batch",
    "train.bad_steps", "train.trackers", "unet.gradient_checkpointing", "data.workers", "data.cache",
    "data.max_upscale", "data.local", "data.local_gib",
}  # fmt: skip
"""What may change between two commands of one run: nothing that the weights depend on."""


def from_weights(recipe: Recipe) -> dict[str, str]:
    """What identifies the weights that the recipe starts from: folder -> hash of its files."""
    folders = {part.source for part in (recipe.autoencoder, recipe.text_encoder, recipe.unet)} - {None}
    return {
        str(folder): content_key(*(file_sha256(path) for path in sorted(Path(folder).rglob("*.safetensors"))))
        for folder in sorted(filter(None, folders))
    }


def difference(before: Recipe, now: Recipe) -> str | None:
    """The first key on which the weights depend and which differs, with both values; None when there is none."""
    there, here = _flat(before.model_dump(by_alias=True)), _flat(now.model_dump(by_alias=True))
    for key in sorted(there.keys() | here.keys()):
        free = any(key == name or key.startswith(name + ".") for name in FREE_KEYS)
        if there.get(key) != here.get(key) and not free:
            return f"{key}: {there.get(key)} there, {here.get(key)} now"
    return None


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
