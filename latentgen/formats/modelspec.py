"""What a file says of itself to people and programs: SAI ModelSpec 1.0.1 (github.com/Stability-AI/ModelSpec)."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping
from itertools import islice
from typing import Any

from torch import Tensor

from latentgen import __version__
from latentgen.core.errors import UserError
from latentgen.core.tensors import encoded
from latentgen.formats.component_configs import VAE_HALVINGS
from latentgen.formats.credits import Credits
from latentgen.formats.parts import Parts

VERSION = "1.0.1"
ARCHITECTURES: Mapping[str, str] = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl-refiner": "stable-diffusion-xl-v1-refiner",
}
SUFFIXES: Mapping[int, str] = {9: "-inpainting", 8: "-edit"}
"""Of an architecture, by the U-Net's input channels."""
PREDICTIONS: Mapping[str, str] = {"epsilon": "epsilon", "v_prediction": "v"}


def model_spec(parts: Parts, tensors: Mapping[str, Tensor], title: str, said: Credits | None = None) -> dict[str, str]:
    """The entries `modelspec.*` of a single file.

    Args:
        parts: the model.
        tensors: what the file will hold; hashed.
        title: where nobody gave one.
        said: what a person says of it.

    Raises:
        UserError: the model is of no family.
    """
    if parts.family is None:
        raise UserError("a model without a U-Net has no architecture to name")
    said = said or Credits()
    unet: Mapping[str, Any] = parts.configs["unet"]
    side = int(unet.get("sample_size") or 64) * VAE_HALVINGS
    vae: Any = parts.configs.get("vae", {}).get("block_out_channels")
    if vae:
        side = int(unet.get("sample_size") or 64) * 2 ** (len(vae) - 1)
    prediction = PREDICTIONS.get(str(parts.scheduler.get("prediction_type", "epsilon")))
    entries = {
        "sai_model_spec": VERSION,
        "architecture": _architecture(parts, side, prediction),
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": said.title or title,
        "resolution": f"{side}x{side}",
        "description": said.description,
        "author": said.author,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "hash_sha256": f"0x{tensors_sha256(tensors)}",
        "implementation_version": f"latentgen {__version__}",
        "license": said.license,
        "tags": said.tags,
        "trigger_phrase": said.trigger_phrase,
        "prediction_type": prediction,
    }
    return {f"modelspec.{key}": value for key, value in entries.items() if value}


def _architecture(parts: Parts, side: int, prediction: str | None) -> str:
    name = ARCHITECTURES[parts.family or "sd1"]
    suffix = SUFFIXES.get(int(parts.configs["unet"].get("in_channels", 4)), "")
    if parts.family == "sd2" and not suffix:
        suffix = "-768-v" if prediction == "v" else "-512"
    return name + suffix


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of what follows the header of a file with these tensors, hexadecimal."""
    digest = hashlib.sha256()
    for block in islice(encoded(tensors), 1, None):
        digest.update(block)
    return digest.hexdigest()
