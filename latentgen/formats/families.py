"""What a safetensors file holds, told by the names and shapes of its tensors alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from latentgen.core.errors import UserError
from latentgen.formats.found import Found, dtypes_of, parameters_of
from latentgen.formats.headers import Entry, Header
from latentgen.formats.original.layouts import (
    IGNORED,
    LAYOUTS,
    OTHERS,
    TITLES,
    UNET_PREFIXES,
    V_PREDICTION,
    VAE_PREFIXES,
    ZERO_SNR,
    Place,
)
from latentgen.formats.original.renaming import diffusers_names
from latentgen.formats.original.unet_names import Structure, structure_of_diffusers
from latentgen.formats.small_files import controlnet_in, embedding_in, lora_in

CONFIGS = "latentgen.configs"
"""The entry of a file's metadata in which our exports say what no tensor tells."""


def recognise(header: Header) -> Found:
    """What a file holds.

    Raises:
        UserError: it is a model of a kind that is not supported, or its U-Net is not whole.
    """
    tensors = header.tensors
    adapter = lora_in(tensors) or embedding_in(tensors) or controlnet_in(tensors)
    if adapter is not None:
        return adapter
    for piece, name in OTHERS.items():
        if any(piece in key for key in tensors):
            raise UserError(f"this is {name}, which latentgen does not open; it opens {', '.join(TITLES.values())}")
    places = find_places(tensors)
    if not places:
        return Found(kind="unknown", dtypes={"": dtypes_of(tensors)}, parameters={"": parameters_of(tensors)})
    shapes = {part: part_shapes(tensors, place) for part, place in places.items()}
    unet = shapes.get("unet")
    family = said(header).get("family") or _family(places, unet)
    prediction, zero_snr = _said_prediction(header)
    own = {part: {name: tensors[name] for name in part_names(tensors, place)} for part, place in places.items()}
    return Found(
        kind="model" if "unet" in places and len(places) > 1 else _kind_alone(shapes),
        family=family,
        variant=variant_of(structure_of_diffusers(unet), family) if unet else None,
        places=places,
        prediction=prediction,
        zero_terminal_snr=zero_snr,
        in_channels=unet["conv_in.weight"][1] if unet else None,
        dtypes={part: dtypes_of(entries) for part, entries in own.items()},
        parameters={part: parameters_of(entries) for part, entries in own.items()},
    )


def said(header: Header) -> dict[str, Any]:
    """What our own exports say of themselves; empty for files of others.

    Raises:
        UserError: the entry is not JSON.
    """
    if CONFIGS not in header.metadata:
        return {}
    try:
        content = json.loads(header.metadata[CONFIGS])
    except ValueError as error:
        raise UserError(f"the metadata {CONFIGS} of the file is not JSON ({error}); export the model again") from error
    return content if isinstance(content, dict) else {}


def find_places(tensors: Mapping[str, Entry]) -> dict[str, Place]:
    """Where each part of a model lies, by diffusers' names of the parts."""
    places: dict[str, Place] = {}

    def under(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in tensors)

    for prefix in UNET_PREFIXES:
        if f"{prefix}input_blocks.0.0.weight" in tensors:
            places["unet"] = Place(prefix, "unet")
        elif f"{prefix}conv_in.weight" in tensors and under(f"{prefix}down_blocks."):
            places["unet"] = Place(prefix, "diffusers")
    for prefix in VAE_PREFIXES:
        if f"{prefix}decoder.conv_in.weight" in tensors:
            places["vae"] = Place(prefix, "diffusers" if under(f"{prefix}decoder.up_blocks.") else "vae")
    if under("taesd_decoder."):
        places["vae"] = Place("", "tiny_vae")
    elif "decoder.layers.0.weight" in tensors:
        places["vae"] = Place("", "diffusers")
    return places | _text_places(under, with_unet="unet" in places, size_ids=under("model.diffusion_model.label_emb."))


def _text_places(under: Callable[[str], bool], with_unet: bool, size_ids: bool) -> dict[str, Place]:
    """The text encoders; one in a file of its own may lack any beginning."""
    first, second = "conditioner.embedders.0.", "conditioner.embedders.1.model."
    if under(second) or under(f"{first}transformer."):
        wanted = LAYOUTS["sdxl"]
    elif under(f"{first}model."):
        # Stable Diffusion 2 in the later programs' layout has its text encoder where the refiner's is.
        part = "text_encoder_2" if size_ids or not with_unet else "text_encoder"
        wanted = {part: Place(f"{first}model.", "open_clip")}
    else:
        wanted = LAYOUTS["sd2" if under("cond_stage_model.model.") else "sd1"]
    found = {part: place for part, place in wanted.items() if part.startswith("text") and under(place.prefix)}
    if found or with_unet:
        return found
    for prefix, kind, witness in TEXT_ALONE:
        if under(prefix + witness):
            return {"text_encoder": Place(prefix, kind)}
    return {}


TEXT_ALONE = (
    ("", "clip", "text_model."),
    ("", "clip", "embeddings.token_embedding."),
    ("", "open_clip", "transformer.resblocks."),
    ("text.", "open_clip", "transformer.resblocks."),
)
"""Text encoders in files of their own: beginning, kind, and what follows."""
VISION = ("visual.", "vision_model.", "visual_projection.", "logit_scale", "logit_bias")
"""The other half of CLIP, which a text encoder's file may bring."""


def part_names(names: Iterable[str], place: Place) -> list[str]:
    """Those names of a file that belong to a part, as they are in the file."""
    own = [name for name in names if name.startswith(place.prefix) and not IGNORED.match(name)]
    return own if place.prefix else [name for name in own if not name.startswith(VISION)]


def part_shapes(tensors: Mapping[str, Entry], place: Place) -> dict[str, tuple[int, ...]]:
    """The shapes of one part's tensors under diffusers' names; those without such a name are left out."""
    own = {name.removeprefix(place.prefix): tensors[name].shape for name in part_names(tensors, place)}
    if place.kind == "diffusers":
        return own
    return {new: own[old] for old, new in diffusers_names(place.kind, own).items() if new is not None}


def _kind_alone(shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> str:
    if "unet" in shapes:
        return "unet"
    if "vae" in shapes:
        return "tiny_vae" if "decoder.layers.0.weight" in shapes["vae"] else "vae"
    return "clip"


def _family(places: Mapping[str, Place], unet: Mapping[str, tuple[int, ...]] | None) -> str | None:
    """By the text encoders, which differ in their names, else by the U-Net."""
    prefixes = {place.prefix for place in places.values()}
    if "conditioner.embedders.1.model." in prefixes or "conditioner.embedders.0.transformer." in prefixes:
        return "sdxl"
    if unet is None:
        if "cond_stage_model.transformer." in prefixes:
            return "sd1"
        return "sd2" if "cond_stage_model.model." in prefixes else None
    if "add_embedding.linear_1.weight" in unet:
        context = {shape[1] for name, shape in unet.items() if name.endswith("attn2.to_k.weight")}
        return "sdxl-refiner" if "conditioner.embedders.0.model." in prefixes or context == {1280} else "sdxl"
    if "cond_stage_model.transformer." in prefixes:
        return "sd1"
    if "cond_stage_model.model." in prefixes or "conditioner.embedders.0.model." in prefixes:
        return "sd2"
    matrices = {len(shape) for name, shape in unet.items() if name.endswith(".proj_in.weight")}
    return "sd2" if matrices == {2} else "sd1"


def variant_of(structure: Structure, family: str | None) -> str | None:
    """The name of a pruned U-Net: SSD-1B and Vega (arXiv 2401.02677), KOALA (2312.04005), BK-SDM (2305.15798)."""
    down, layers = [level[0] for level in structure.down], len(structure.down[0])
    if family == "sdxl" and structure.mid in (None, 0):
        if layers == 1:
            return "koala"
        return {2: "vega", 4: "ssd-1b"}.get(down[-1])
    if family == "sdxl" and layers == 1:
        return "koala"
    if family in ("sd1", "sd2") and layers == 1 and len(down) >= 3 and down[0]:
        if structure.mid:
            return "bk-sdm-base" if len(down) == 4 else None
        return "bk-sdm-small" if len(down) == 4 else "bk-sdm-tiny"
    return None


def _said_prediction(header: Header) -> tuple[str | None, bool]:
    """What the file says that the U-Net predicts, and whether its noise ends in pure noise."""
    if V_PREDICTION in header.tensors:
        return "v", ZERO_SNR in header.tensors
    word = header.metadata.get("modelspec.prediction_type") or header.metadata.get("modelspec.predict_key") or ""
    return {"epsilon": "eps", "v": "v", "v_prediction": "v"}.get(word.lower()), False
