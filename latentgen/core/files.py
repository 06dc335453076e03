"""Files that are complete or absent: written aside, flushed to the disk, renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentgen.core.errors import UserError

ASIDE = ".partial"


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut (Windows offers no way to, and needs none)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Flush every file below `folder`, and the folders themselves, to the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(Path(parent, name), "rb") as file:
                os.fsync(file.fileno())
        fsync_folder(Path(parent))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file atomically: a reader sees the old content or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}{ASIDE}")
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    fsync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for text, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_text` for a JSON document, indented, keys in their given order."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Create `folder` atomically: `fill` writes into a folder beside it, which is flushed and renamed.

    An existing `folder` is moved away only after the new one is safe on the disk, and then removed.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f"{folder.name}{ASIDE}")
    old = folder.with_name(f"{folder.name}.old{ASIDE}")
    if old.exists() and not folder.exists():  # a power cut came between the two renames below
        old.rename(folder)
    for leftover in (aside, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    aside.mkdir()
    fill(aside)
    fsync_tree(aside)
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    fsync_folder(folder.parent)
    if old.exists():
        shutil.rmtree(old)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal text."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def content_key(*parts: Any) -> str:
    """A short name (32 hexadecimal digits) for whatever determines a cached result; `parts` must be JSON values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def require_free_space(folder: Path, needed: int, what: str) -> None:
    """Raise `UserError` unless the disk that holds `folder` has `needed` bytes (and a reserve of 16 MiB) free."""
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed + (16 << 20):
        raise UserError(
            f"disk nearly full: {what} needs {needed / 2**20:.0f} MiB at {folder}, "
            f"only {free / 2**20:.0f} MiB are free; make room, then run the same command again"
        )
