"""What a safetensors file says of itself, without reading a tensor."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from latentgen.core.errors import UserError
from latentgen.core.files import BLOCK, file_sha256
from latentgen.formats.folder_check import check_safetensors

SUFFIX = ".safetensors"
PICKLED = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
HALF = (".incomplete", ".part", ".partial", ".crdownload", ".aria2")
"""What programs call a file that they are still downloading."""


class Entry(NamedTuple):
    """A tensor's shape and its type as the format names it: "F32", "F16", "BF16", ..."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """The tensors of a file by name, and its free text by name."""

    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_header(path: Path) -> Header:
    """The header of a safetensors file.

    Raises:
        UserError: there is no such file, it is a pickle, half a download, cut off, or not safetensors.
    """
    path = Path(path)
    require_safetensors(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        content = json.loads(file.read(length))
    metadata = content.pop("__metadata__", {})
    return Header({name: Entry(tuple(e["shape"]), e["dtype"]) for name, e in content.items()}, metadata)


def require_safetensors(path: Path) -> None:
    """Raise UserError, with the remedy, unless `path` is a whole safetensors file by name and by length."""
    if not path.is_file():
        halves = [path.with_name(path.name + end) for end in HALF]
        half = next((one for one in halves if one.exists()), None)
        if half is not None:
            raise UserError(f"{path} is not there, only the half download {half.name}; download it again")
        raise UserError(f"there is no file {path}")
    if path.suffix in HALF:
        raise UserError(f"{path} is half a download; download it again to the end")
    if path.suffix in PICKLED:
        raise UserError(
            f"{path} is a pickle, and opening one may run code that it brings; convert it once, safely, with: "
            f"latentgen import {path} {path.with_suffix(SUFFIX)} --allow-pickle"
        )
    if path.suffix != SUFFIX:
        raise UserError(f"{path} is no model file: give a {SUFFIX} file or a model folder")
    check_safetensors(path)


class Hashes(NamedTuple):
    """Names under which sites and programs know a file, hexadecimal.

    Attributes:
        sha256: of the whole file.
        tensors: SHA-256 of everything after the header: what kohya's scripts call sshs_model_hash and ModelSpec
            hash_sha256; it does not change with the metadata.
        autov1: 8 digits, of 64 KiB in the middle; the first pages' name for a model.
        autov2: 10 digits, the beginning of `sha256`.
        autov3: 12 digits, the beginning of `tensors`.
    """

    sha256: str
    tensors: str
    autov1: str
    autov2: str
    autov3: str


def file_hashes(path: Path) -> Hashes:
    """All of a safetensors file's hashes; reads it twice."""
    whole, body = file_sha256(path), hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while block := file.read(BLOCK):
            body.update(block)
        file.seek(0x100000)
        middle = hashlib.sha256(file.read(0x10000)).hexdigest()
    return Hashes(whole, body.hexdigest(), middle[:8], whole[:10], body.hexdigest()[:12])
