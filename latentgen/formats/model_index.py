"""model_index.json: which class each part of a model folder is, and which pipeline of diffusers opens the folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentgen.formats.parts import NETWORKS, TOKENIZERS
from latentgen.formats.scheduler import library_of


def model_index(classes: Mapping[str, str], scheduler: str, pipeline: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the file.

    Args:
        classes: of the networks that are there, by diffusers' names of the parts.
        scheduler: its class.
        pipeline: the rest: `_class_name` and options.
    """
    from diffusers import __version__ as diffusers_version

    entries: dict[str, list[str | None]] = {"scheduler": [library_of(scheduler), scheduler]}
    xl = "text_encoder_2" in classes
    for part in NETWORKS if xl else NETWORKS[:3]:
        library = "transformers" if part in TOKENIZERS else "diffusers"
        entries[part] = [library, classes[part]] if part in classes else [None, None]
        if part in TOKENIZERS:
            entries[TOKENIZERS[part]] = ["transformers", "CLIPTokenizer"] if part in classes else [None, None]
    for absent in ("feature_extractor", "image_encoder", *(() if xl else ("safety_checker",))):
        entries[absent] = [None, None]
    return {**pipeline, "_diffusers_version": diffusers_version, **dict(sorted(entries.items()))}


PIPELINES: Mapping[tuple[str, int], str] = {
    ("sd", 4): "StableDiffusionPipeline",
    ("sd", 9): "StableDiffusionInpaintPipeline",
    ("sd", 8): "StableDiffusionInstructPix2PixPipeline",
    ("sdxl", 4): "StableDiffusionXLPipeline",
    ("sdxl", 9): "StableDiffusionXLInpaintPipeline",
    ("sdxl", 8): "StableDiffusionXLInstructPix2PixPipeline",
    ("sdxl-refiner", 4): "StableDiffusionXLImg2ImgPipeline",
}
"""diffusers' class for a family and the U-Net's input channels."""


def pipeline_of(family: str, in_channels: int) -> dict[str, Any]:
    """What model_index.json says of a family besides the parts, as diffusers' own folders do."""
    kind = family if family.startswith("sdxl") else "sd"
    entry: dict[str, Any] = {"_class_name": PIPELINES.get((kind, in_channels), PIPELINES[kind, 4])}
    if kind == "sd":
        return entry | {"requires_safety_checker": False}
    refiner = kind == "sdxl-refiner"
    aesthetics = {"requires_aesthetics_score": True} if refiner else {}
    return entry | {"force_zeros_for_empty_prompt": not refiner} | aesthetics
