"""Tensors from a file of any kind that people have: safetensors, or a pickle where that was allowed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises; nothing here unpickles
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.core.files import write_blocks
from latentgen.core.tensors import TYPES, encoded
from latentgen.formats.headers import PICKLED, SUFFIX, Entry, Header, read_header

WRAPPERS = ("state_dict", "model", "module", "params_ema", "params")
"""Keys under which training programs put the weights; in order."""


def read_tensors(path: Path, *, allow_pickle: bool = False) -> tuple[Header, dict[str, Tensor]]:
    """All tensors of a file, on the CPU; those of safetensors are read from the disk when they are used.

    Args:
        path: a file.
        allow_pickle: open .ckpt, .pt and .bin files too, by torch.load with weights_only, which runs no code of theirs.

    Raises:
        UserError: the file is missing, cut off, of an unknown kind, or a pickle that may not or cannot be opened.
    """
    path = Path(path)
    if allow_pickle and path.suffix in PICKLED and path.is_file():
        tensors = _unpickled(path)
        return header_of(tensors), tensors
    header = read_header(path)
    with safe_open(path, framework="pt", device="cpu") as file:
        return header, {name: file.get_tensor(name) for name in header.tensors}


def header_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Header:
    """What `read_header` says of a file with these tensors."""
    names = {dtype: name for name, dtype in TYPES.items()}
    entries = {name: Entry(tuple(value.shape), names[value.dtype]) for name, value in tensors.items()}
    return Header(entries, dict(metadata or {}))


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, and opening it could run code: refused. Ask its author for safetensors, "
            "or convert it in a program that you trust, on a machine that you can lose"
        ) from error
    except (OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise UserError(f"{path} is cut off or no file of torch.save: {' '.join(str(error).split())[:200]}") from error
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if isinstance(content, Mapping) and isinstance(content.get("string_to_param"), Mapping):
        content = dict.fromkeys(["emb_params"], next(iter(content["string_to_param"].values()), None))  # learned words
    named = content if isinstance(content, Mapping) else {}
    tensors = {str(name): value for name, value in named.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors by name: it is no file of weights")
    strange = next((value.dtype for value in tensors.values() if value.dtype not in TYPES.values()), None)
    if strange is not None:
        raise UserError(f"{path} holds tensors of {strange}, which safetensors does not have")
    return {name: value.detach().contiguous() for name, value in tensors.items()}


def convert_pickle(path: Path, target: Path, *, allow_pickle: bool) -> int:
    """Write the tensors of a pickle, under the names that they have there, as safetensors; return their number.

    Raises:
        UserError: as `read_tensors`; or `path` is no pickle, so that there is nothing to convert.
    """
    if path.suffix == SUFFIX:
        raise UserError(f"{path} is safetensors already; to import a model from it, name a folder to write")
    _, tensors = read_tensors(path, allow_pickle=allow_pickle)
    # Tensors that share memory become tensors of their own: the format has no other.
    write_blocks(target, encoded({name: value.clone() for name, value in tensors.items()}, {"format": "pt"}))
    return len(tensors)
