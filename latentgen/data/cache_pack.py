"""Complete caches as files of bounded size, for object stores and other machines, and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from latentgen.core.errors import UserError
from latentgen.core.files import write_file, write_folder
from latentgen.core.log import progress
from latentgen.data.cache_entries import DONE

FORMAT, VERSION = "latentgen cache", 1
MANIFEST = "manifest.json"
FILES = ("values.npy", "keys.npy", "contents.npy", DONE)
PART = 256 << 20
"""Bytes of a part, at most."""
BLOCK = 1 << 23


def pack(folders: Sequence[Path], target: str, part: int = PART) -> int:
    """Write caches below `target`, a folder or an address that fsspec knows; returns the bytes written.

    The manifest, with the size and the SHA-256 of every part, comes last: without it nothing is there.
    """
    system, root = _system(target)
    system.makedirs(root, exist_ok=True)
    manifest: dict[str, Any] = {"format": FORMAT, "version": VERSION, "caches": {}}
    total = 0
    for folder in progress("packing", "cache", over=list(folders), leave=False):
        name = f"{folder.parent.name}/{folder.name}"
        files = manifest["caches"][name] = {}
        for file in FILES:
            files[file] = []
            for number, content in enumerate(_parts(folder / file, part)):
                called = f"{folder.parent.name}-{folder.name}-{file}-{number:05d}"
                with system.open(f"{root}/{called}", "wb") as out:
                    out.write(content)
                digest = hashlib.sha256(content).hexdigest()
                files[file].append({"part": called, "bytes": len(content), "sha256": digest})
                total += len(content)
    with system.open(f"{root}/{MANIFEST}", "wb") as out:
        out.write(json.dumps(manifest, indent=1).encode())
    return total


def unpack(source: str, folder: Path) -> list[Path]:
    """Bring packed caches into `folder`; those that are there already stay. Each comes whole or not at all.

    Returns:
        The folders of the caches that came.

    Raises:
        UserError: nothing is packed there, or a part is not what was written.
    """
    system, root = _system(source)
    came = []
    for name, files in _manifest(system, root, source).items():
        target = folder / name
        if (target / DONE).is_file():
            continue

        def fill(aside: Path, files: dict[str, Any] = files) -> None:
            for file in FILES:
                write_file(aside / file, _checked(system, root, files[file]))

        write_folder(target, fill)
        came.append(target)
    return came


def _system(address: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise UserError(f"{address}: not a place that can be written to or read ({error})") from error


def _parts(path: Path, size: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while content := file.read(size):
            yield content


def _manifest(system: Any, root: str, source: str) -> dict[str, dict[str, Any]]:
    """Cache -> file -> its parts; names that lead elsewhere are refused."""
    try:
        with system.open(f"{root}/{MANIFEST}", "rb") as file:
            found = json.loads(file.read())
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: no packed caches there ({MANIFEST}: {error})") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT or found.get("version") != VERSION:
        raise UserError(f"{source}: {MANIFEST} is not of packed caches of this version")
    caches = found["caches"]
    for name, files in caches.items():
        kind, _, key = name.partition("/")
        parts = [part["part"] for file in FILES for part in files.get(file, ())]
        if kind not in ("latents", "text") or not key.isalnum() or set(files) != set(FILES):
            raise UserError(f"{source}: {MANIFEST} names {name!r}, which is no cache")
        if any("/" in part or "\\" in part or part.startswith(".") for part in parts):
            raise UserError(f"{source}: {MANIFEST} names parts outside of {source}")
    return caches


def _checked(system: Any, root: str, parts: Sequence[dict[str, Any]]) -> Iterator[bytes]:
    for part in parts:
        with system.open(f"{root}/{part['part']}", "rb") as file:
            content = file.read()
        if len(content) != part["bytes"] or hashlib.sha256(content).hexdigest() != part["sha256"]:
            raise UserError(f"{root}/{part['part']}: not what was packed; copy it again")
        for at in range(0, len(content), BLOCK):
            yield content[at : at + BLOCK]
