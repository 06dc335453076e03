"""What is wrong with a model folder, found before any library opens it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from latentgen.core.errors import UserError

INDEX = "model_index.json"
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
"""Beginnings of the names of weight files."""
PARTS: dict[str, dict[str, str]] = {
    "unet": {"UNet2DConditionModel": DIFFUSERS},
    "vae": {"AutoencoderKL": DIFFUSERS, "AutoencoderTiny": DIFFUSERS},
    "text_encoder": {"CLIPTextModel": TRANSFORMERS},
    "text_encoder_2": {"CLIPTextModelWithProjection": TRANSFORMERS},
}
"""The networks of a model, the classes each may be, and how their weights are called."""


class Part(NamedTuple):
    """A network in a folder: the name of its class, and the variant of its weights ("fp16" where only those exist)."""

    kind: str
    variant: str | None


def check_folder(folder: Path) -> dict[str, Part]:
    """Look at every file of a model folder without loading it.

    Returns:
        The networks that are there: unet, vae, and text_encoder or text_encoder_2 or both.

    Raises:
        UserError: one line that names the file and what is wrong with it.
    """
    _require_index(folder)
    index = read_json(folder / INDEX)
    kinds: dict[str, str] = {}
    for part, known in PARTS.items():
        found = index.get(part)
        if part in ("text_encoder", "text_encoder_2") and (not found or found == [None, None]):
            continue
        if not (isinstance(found, list) and found and found[-1] in known):
            kind = index.get("_class_name")
            raise UserError(f"{folder} is a {kind} with {part} {found}; only {' and '.join(known)} is supported")
        kinds[part] = found[-1]
    towers = [part for part in kinds if part.startswith("text_encoder")]
    if not towers:
        raise UserError(f"{folder} is a {index.get('_class_name')} without text_encoder; copy the folder again")
    for needed in ("scheduler/scheduler_config.json", *(f"{part}/config.json" for part in kinds)):
        _require_file(folder, needed)
        read_json(folder / needed)
    for tokenizer in (part.replace("text_encoder", "tokenizer") for part in towers):
        if not (folder / tokenizer / "tokenizer.json").is_file():
            for needed in (f"{tokenizer}/vocab.json", f"{tokenizer}/merges.txt"):
                _require_file(folder, needed)
    return {part: Part(kind, check_weights(folder, part, PARTS[part][kind])) for part, kind in kinds.items()}


def _require_index(folder: Path) -> None:
    if folder.is_file():
        raise UserError(f"{folder} is a file, not a model folder; `latentgen import {folder} FOLDER` makes one of it")
    if not folder.is_dir():
        raise UserError(f"there is no model folder at {folder}")
    if (folder / INDEX).is_file():
        return
    if (folder / "model" / INDEX).is_file():
        raise UserError(f"{folder} is a run folder; its model is {folder / 'model'}")
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    raise UserError(f"{folder} is not a model folder: it has no {INDEX}, it holds {shown or 'nothing'}")


def _require_file(folder: Path, name: str) -> None:
    if not (folder / name).is_file():
        raise UserError(f"{folder} is not complete: {name} is missing; copy the folder again")


def check_weights(folder: Path, part: str, stem: str) -> str | None:
    for variant, end in ((None, ""), ("fp16", ".fp16")):
        index = folder / part / f"{stem}.safetensors.index{end}.json"
        if index.is_file():
            shards = read_json(index).get("weight_map", {})
            for name in sorted(set(shards.values())):
                _require_file(folder, f"{part}/{name}")
                check_safetensors(folder / part / name)
            return variant
        whole = folder / part / f"{stem}{end}.safetensors"
        if whole.is_file():
            check_safetensors(whole)
            return variant
    pickled = sorted(path.name for path in (folder / part).glob("*.bin"))
    if pickled:
        raise UserError(f"{folder}: {part} has only pickled weights ({pickled[0]}); convert them to safetensors first")
    raise UserError(f"{folder} is not complete: {part}/{stem}.safetensors is missing; copy the folder again")


def check_safetensors(path: Path) -> None:
    """Raise UserError unless the file is as long as its own header says; the tensors are not read."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if 0 < length <= size - 8 else b""
    if not header:
        raise UserError(f"{path} is cut off or not safetensors: {size} bytes hold no whole header; copy it again")
    try:
        tensors: Mapping[str, Any] = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{path} is not safetensors: its header cannot be read; copy it again") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        word = "cut off" if size < expected else "too long"
        raise UserError(f"{path} is {word}: {size} bytes where its header says {expected}; copy it again")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: missing, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is cut off or not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} where a JSON object belongs")
    return content
