"""`Parts` as a single file in the layout of the original programs, which ComfyUI, A1111 and kohya's scripts open."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.core.files import write_blocks
from latentgen.core.tensors import encoded
from latentgen.diffusion.noise_tables import NoiseTable
from latentgen.formats.credits import Credits
from latentgen.formats.families import CONFIGS
from latentgen.formats.headers import SUFFIX
from latentgen.formats.modelspec import model_spec
from latentgen.formats.original.layouts import LAYOUTS, TITLES, V_PREDICTION, ZERO_SNR
from latentgen.formats.original.renaming import POSITION_IDS, PROJECTION, to_original
from latentgen.formats.original.unet_names import OURS
from latentgen.formats.part_check import check_part
from latentgen.formats.parts import TOKENIZERS, Parts, State, cast
from latentgen.formats.scheduler import read_schedule
from latentgen.formats.single_file.read import METADATA_ENTRY
from latentgen.formats.single_file.vocabulary import is_usual

logger = logging.getLogger("latentgen.formats")


def write_single_file(
    parts: Parts, path: Path, dtype: torch.dtype | None = None, credits: Credits | None = None
) -> None:
    """Write a model as one file, complete or not at all.

    Its metadata say what no tensor tells (configurations, the process, an unusual tokenizer, what trained it), so that
    `read_single_file` gives back the same model; other programs read the tensors and ModelSpec.

    Args:
        parts: a whole model.
        path: ends in .safetensors; an older file of that name is replaced.
        dtype: of the stored weights; None stores each tensor as it is.
        credits: what a person says of the model.

    Raises:
        UserError: `parts` are no whole model, a network has tensors that the layout has no name for, or `dtype` cannot
            hold a number.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise UserError(f"{path}: a single file is a {SUFFIX} file; name it so")
    if not parts.whole or parts.family is None:
        raise UserError(f"a single file holds a whole model; there is only {' and '.join(parts.states)}")
    for part, state in parts.states.items():
        left = check_part(part, parts.configs[part], state, f"the model for {path}")
        if left:
            raise UserError(f"{part} has {len(left)} tensors that its configuration lacks, the first is {left[0]}")
    parts = cast(parts, dtype)
    tensors = _tensors(parts)
    _say_what_others_miss(parts)
    metadata = {
        "format": "pt",
        **model_spec(parts, tensors, path.stem, credits),
        CONFIGS: json.dumps(_told(parts), ensure_ascii=False),
        **({METADATA_ENTRY: json.dumps(parts.metadata, ensure_ascii=False)} if parts.metadata else {}),
    }
    write_blocks(path, encoded(tensors, metadata))


def _tensors(parts: Parts) -> dict[str, Tensor]:
    assert parts.family is not None
    tensors: dict[str, Tensor] = {}
    for part, state in parts.states.items():
        place = LAYOUTS[parts.family].get(part)
        if place is None:
            raise UserError(f"{TITLES[parts.family]} has no {part}: it cannot be written as a single file")
        kind = "tiny_vae" if parts.configs[part].get("_class_name") == "AutoencoderTiny" else place.kind
        if kind == "tiny_vae":
            raise UserError("the original layout has no place for an AutoencoderTiny: export a folder, or another vae")
        if parts.family == "sd2" and part == "text_encoder":
            state = _with_last_layer(state)
        renamed, unknown = to_original(kind, state)
        if unknown:
            raise UserError(f"{part}: the original layout has no name for {unknown[0]}; export a folder instead")
        if place.kind == "clip":
            length = len(state["text_model.embeddings.position_embedding.weight"])
            renamed[POSITION_IDS] = torch.arange(length)[None]
        tensors |= {place.prefix + name: value.contiguous() for name, value in renamed.items()}
    prediction, schedule = read_schedule(parts.scheduler, "the scheduler")
    if prediction == "v":
        tensors[V_PREDICTION] = torch.tensor([])
        if schedule.get("zero_terminal_snr"):
            tensors[ZERO_SNR] = torch.tensor([])
    return tensors


def _with_last_layer(state: State) -> State:
    """The whole tower, as Stable Diffusion 2's programs expect it: the layer that they do not read, and a projection.

    They take the state before the last layer, so its weights do not matter: they are those of the layer before.
    """
    layers = "text_model.encoder.layers."
    last = max(int(name.split(".")[3]) for name in state if name.startswith(layers))
    copied = {
        name.replace(f"{layers}{last}.", f"{layers}{last + 1}."): value
        for name, value in state.items()
        if name.startswith(f"{layers}{last}.")
    }
    scale = state["text_model.final_layer_norm.weight"]
    return {**state, **copied, PROJECTION: torch.eye(len(scale), dtype=scale.dtype)}


def _told(parts: Parts) -> dict[str, Any]:
    """What `read_single_file` takes from the file itself."""
    unusual = {
        name: dict(files)
        for name, files in parts.tokenizers.items()
        if not is_usual(files, parts.family or "sd1", name)
    }
    return {
        "family": parts.family,
        "configs": {part: dict(config) for part, config in parts.configs.items()},
        "scheduler": dict(parts.scheduler),
        "pipeline": dict(parts.pipeline),
        **({"tokenizers": unusual} if unusual else {}),
    }


def _say_what_others_miss(parts: Parts) -> None:
    """Warn of what makes the file open in latentgen only: other programs know Stable Diffusion's own shapes."""
    prediction, schedule = read_schedule(parts.scheduler, "the scheduler")
    usual = asdict(NoiseTable(zero_terminal_snr=bool(schedule.get("zero_terminal_snr"))))
    reasons = []
    if prediction not in ("eps", "v") or schedule != usual:
        reasons.append(f"its process ({prediction}) is not Stable Diffusion's")
    if any(name.startswith(OURS) for name in parts.states["unet"]):
        reasons.append("its U-Net pools the text, which their layout has no name for")
    if any(config.get("vocab_size", 49408) < 49408 for part, config in parts.configs.items() if part in TOKENIZERS):
        reasons.append("its vocabulary is not CLIP's")
    if reasons:
        logger.warning("other programs will not draw with this file as latentgen does: %s", "; ".join(reasons))
