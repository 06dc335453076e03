"""What is wrong with a model folder, found before any library opens it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentgen.core.errors import UserError

INDEX = "model_index.json"
PARTS = {
    "unet": ("UNet2DConditionModel", "diffusion_pytorch_model"),
    "vae": ("AutoencoderKL", "diffusion_pytorch_model"),
    "text_encoder": ("CLIPTextModel", "model"),
}


def check_folder(folder: Path) -> dict[str, str | None]:
    """Look at every file of a model folder without loading it.

    Returns:
        For each of unet, vae and text_encoder the variant of its weights: None, or "fp16" where only files named so
        exist.

    Raises:
        UserError: one line that names the file and what is wrong with it.
    """
    _require_index(folder)
    index = read_json(folder / INDEX)
    if index.get("text_encoder_2"):
        raise UserError(f"{folder} is a {index.get('_class_name')}: models with two text encoders are not supported")
    for part, (kind, _) in PARTS.items():
        found = index.get(part)
        if not (isinstance(found, list) and found[-1:] == [kind]):
            raise UserError(f"{folder} is a {index.get('_class_name')} with {part} {found}; only {kind} is supported")
    for needed in ("scheduler/scheduler_config.json", *(f"{part}/config.json" for part in PARTS)):
        _require_file(folder, needed)
        read_json(folder / needed)
    tokenizer = folder / "tokenizer"
    if not (tokenizer / "tokenizer.json").is_file():
        for needed in ("tokenizer/vocab.json", "tokenizer/merges.txt"):
            _require_file(folder, needed)
    return {part: _check_weights(folder, part, stem) for part, (_, stem) in PARTS.items()}


def _require_index(folder: Path) -> None:
    if folder.is_file():
        raise UserError(f"{folder} is a file, not a model folder")
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


def _check_weights(folder: Path, part: str, stem: str) -> str | None:
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
