"""What is wrong with a model folder, found before any library opens it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from latentgen.core.errors import UserError
from latentgen.formats.parts import CLASSES, NETWORKS, TOKENIZERS

INDEX = "model_index.json"
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
"""Beginnings of the names of weight files."""


class Weights(NamedTuple):
    """The files with a network's weights, and the variant that they are ("fp16" where only those exist)."""

    variant: str | None
    files: list[Path]


class Part(NamedTuple):
    """A network in a folder: the name of its class, and the variant of its weights."""

    kind: str
    variant: str | None


def check_folder(folder: Path) -> dict[str, Part]:
    """Look at every file of a model folder without loading it.

    Returns:
        The networks that are there: unet, vae, and text_encoder or text_encoder_2 or both.

    Raises:
        UserError: one line that names the file and what is wrong with it.
    """
    kinds = networks_of_folder(folder)
    for needed in ("scheduler/scheduler_config.json", *(f"{part}/config.json" for part in kinds)):
        _require_file(folder, needed)
        read_json(folder / needed)
    for tokenizer in (TOKENIZERS[part] for part in kinds if part in TOKENIZERS):
        whole, former = f"{tokenizer}/tokenizer.json", (f"{tokenizer}/vocab.json", f"{tokenizer}/merges.txt")
        if not any((folder / name).is_file() for name in former):
            _require_file(folder, whole)
        elif not (folder / whole).is_file():
            for needed in former:
                _require_file(folder, needed)
    return {part: Part(kind, weight_files(folder / part, stem_of(part)).variant) for part, kind in kinds.items()}


def networks_of_folder(folder: Path) -> dict[str, str]:
    """The networks that a model folder's index names, and the class of each.

    Raises:
        UserError: it is no model folder, lacks a network, or has one of a class that is not supported.
    """
    _require_index(folder)
    index = read_json(folder / INDEX)
    named = {part: index[part] for part in NETWORKS if index.get(part) not in (None, [None, None])}
    lacking = [part for part in ("unet", "vae") if part not in named]
    if not TOKENIZERS.keys() & named.keys():
        lacking.append("text_encoder")
    if lacking:
        raise UserError(f"{folder} is a {index.get('_class_name')} without {lacking[0]}; that is not supported")
    kinds: dict[str, Any] = {
        part: found[-1] if isinstance(found, list) and found else found for part, found in named.items()
    }
    for part, kind in kinds.items():
        if kind not in CLASSES[part]:
            only = f"only {' and '.join(CLASSES[part])} {'is' if len(CLASSES[part]) == 1 else 'are'} supported"
            raise UserError(f"{folder} is a {index.get('_class_name')} whose {part} is a {kind}; {only}")
    return kinds


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


def _require_file(folder: Path, name: str, more: str = "") -> None:
    if not (folder / name).is_file():
        raise UserError(f"{folder} is not complete: {name} is missing{more}; copy or download it again")


def stem_of(part: str) -> str:
    """How the weight files of a part begin."""
    return TRANSFORMERS if part in TOKENIZERS else DIFFUSERS


def weight_files(place: Path, stem: str = DIFFUSERS, *, allow_pickle: bool = False) -> Weights:
    """The files with a network's weights: one, or several shards; full precision is preferred.

    Args:
        place: the network's own folder.
        stem: how the files begin.
        allow_pickle: take a .bin file where there is nothing else.

    Raises:
        UserError: there are none, one is missing or not whole, or there are only pickles.
    """
    folder, part = place.parent, place.name
    for variant, end in ((None, ""), ("fp16", ".fp16")):
        index, files = place / f"{stem}.safetensors.index{end}.json", [place / f"{stem}{end}.safetensors"]
        if index.is_file():
            files = [place / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
        elif not files[0].is_file():
            continue
        for file in files:
            _require_file(folder, f"{part}/{file.name}", f", one of {len(files)} shards")
            check_safetensors(file)
        return Weights(variant, files)
    pickled = [place / name for name in ("pytorch_model.bin", f"{stem}.bin") if (place / name).is_file()]
    if pickled and allow_pickle:
        return Weights(None, pickled[:1])
    if pickled:
        whole = (folder / INDEX).is_file()
        names = f"{folder} NEW_FOLDER" if whole else f"{pickled[0]} {place / f'{stem}.safetensors'}"
        raise UserError(
            f"{folder}: {part} has only pickled weights ({pickled[0].name}); convert them once, safely, with: "
            f"latentgen import {names} --allow-pickle"
        )
    raise UserError(f"{folder} is not complete: {part}/{stem}.safetensors is missing; copy or download it again")


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
