"""Keys of what a cache holds, row by row, and which rows another cache has already."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentgen.core.errors import UserError

DONE = "cache.json"
"""The file of a cache that is there when all else is."""
WIDTH = 16
"""Bytes of a key."""


@dataclass(frozen=True)
class Entries:
    """What determines each row.

    Args:
        keys: `[rows]` of `WIDTH` bytes: equal keys mean equal values.
        contents: `[rows]` of the same: equal ones mean the same picture or caption, however it is cut or encoded.
        maker: what computed it, such as the hash of a network's weights.
    """

    keys: NDArray[np.void]
    contents: NDArray[np.void]
    maker: str

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, row: int) -> bytes:
        return self.keys[row].tobytes()

    def save(self, folder: Path) -> None:
        """Write the keys beside the values."""
        for name, keys in (("keys", self.keys), ("contents", self.contents)):
            with open(folder / f"{name}.npy", "wb") as file:
                np.lib.format.write_array(file, keys.view(np.uint8).reshape(-1, WIDTH), allow_pickle=False)


class Donor(NamedTuple):
    """Another complete cache: `mine`, row here -> row there, of rows that it has; `values` of all its rows."""

    mine: dict[int, int]
    values: NDArray[np.float16]


def entries(maker: str, rows: Iterable[tuple[str, str]]) -> Entries:
    """Of each row a name of its content and a name of how it is made from it.

    Args:
        maker: of all rows.
        rows: (content, what besides the maker and the content determines the values).
    """
    keys, contents = bytearray(), bytearray()
    for content, how in rows:
        contents += _digest(content)
        keys += _digest(f"{maker}\0{how}")
    return Entries(_array(keys), _array(contents), maker)


def donors_of(folder: Path, wanted: Entries, shape: tuple[int, ...]) -> list[Donor]:
    """Rows that complete caches beside `folder` have, each row in one of them."""
    found: list[Donor] = []
    missing = {wanted.key(row): row for row in reversed(range(len(wanted)))}
    rows_of: dict[bytes, list[int]] = {}
    for row in range(len(wanted)):
        rows_of.setdefault(wanted.key(row), []).append(row)
    for other, about in _others(folder):
        if about.get("shape") != list(shape) or not missing:
            continue
        keys = _loaded(other, "keys")
        mine = {}
        for there, key in enumerate(key.tobytes() for key in keys):
            if missing.pop(key, None) is not None:
                mine |= dict.fromkeys(rows_of[key], there)
        if mine:
            found.append(Donor(mine, opened(other, (len(keys), *shape))))
    return found


def why_new(folder: Path, wanted: Entries) -> str | None:
    """Why nothing of the caches beside `folder` can be used; None where there is none, or none of the same content."""
    contents = {wanted.contents[row].tobytes() for row in range(len(wanted))}
    makers = set()
    for other, about in _others(folder):
        if not contents.isdisjoint(key.tobytes() for key in _loaded(other, "contents")):
            makers.add(about.get("maker"))
    if not makers:
        return None
    same = wanted.maker in makers
    return "they are cut or scaled in another way than before" if same else "another network computes them than before"


def _others(folder: Path) -> list[tuple[Path, dict]]:
    """Complete caches beside `folder`, and what is known of each."""
    found = []
    for path in sorted(folder.parent.glob(f"*/{DONE}")):
        if path.parent != folder and (path.parent / "keys.npy").is_file():
            found.append((path.parent, json.loads(path.read_text(encoding="utf-8"))))
    return found


def _loaded(folder: Path, name: str) -> NDArray[np.void]:
    return _array(np.load(folder / f"{name}.npy", allow_pickle=False).tobytes())


def _array(keys: bytes | bytearray) -> NDArray[np.void]:
    return np.frombuffer(bytes(keys), dtype=f"V{WIDTH}")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:WIDTH]


def opened(folder: Path, shape: tuple[int, ...]) -> NDArray[np.float16]:
    """The values of a complete cache, memory-mapped and read-only.

    Raises:
        UserError: the file is damaged or of another size.
    """
    path = folder / "values.npy"
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); remove {folder}, and it is made again") from error
    if values.shape != shape or values.dtype != np.float16:
        raise UserError(f"{path}: holds {values.shape}, not {shape}; remove {folder}, and it is made again")
    return values
