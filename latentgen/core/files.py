"""Files that are complete or absent: written aside, flushed to the disk, renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from latentgen.core.errors import UserError

ASIDE = ".partial"
OLD = f".old{ASIDE}"
BLOCK = 1 << 23
"""Bytes written, and read, at once."""


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


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within it an error of the disk says that it was about `path`; the system names no file that is open already."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def make_folder(folder: Path) -> None:
    """Make `folder` and what is missing above it, so that their names survive a power cut."""
    folder = Path(folder)
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)


def write_file(path: Path, blocks: Iterable[bytes | memoryview]) -> str:
    """Write `blocks` to a new file and flush it to the disk; return the SHA-256 of what was written, as hexadecimal."""
    digest = hashlib.sha256()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        with naming(path):
            for block in blocks:
                left = memoryview(block)
                while left:
                    piece = left[:BLOCK]
                    written = os.write(handle, piece)
                    digest.update(piece[:written])
                    left = left[written:]
            os.fsync(handle)
    finally:
        os.close(handle)
    return digest.hexdigest()


def read_file(path: Path) -> Tensor:
    """A file's content, `[n]` uint8, read once into memory of its own."""
    with open(path, "rb", buffering=0) as file:
        content = torch.empty(os.fstat(file.fileno()).st_size, dtype=torch.uint8)
        left = content.numpy().data
        while left:
            count = file.readinto(left[:BLOCK])
            if not count:
                raise OSError(errno.EIO, "the file became shorter while it was read", str(path))
            left = left[count:]
    return content


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file atomically: a reader sees the old content or the new, never a part."""
    write_blocks(path, [content])


def write_blocks(path: Path, blocks: Iterable[bytes | memoryview]) -> str:
    """`write_bytes` of a file too large to hold twice; return the SHA-256 of what was written, as hexadecimal."""
    path = Path(path)
    make_folder(path.parent)
    aside = path.with_name(f"{path.name}.{os.getpid()}{ASIDE}")
    digest = write_file(aside, blocks)
    aside.replace(path)
    fsync_folder(path.parent)
    return digest


def clear_leftovers(folder: Path) -> None:
    """Remove what `write_bytes` had begun anywhere below `folder` when its process was killed."""
    for aside in folder.rglob(f"*{ASIDE}"):
        writer = aside.suffixes[-2:-1]
        if aside.is_file() and writer and writer[0][1:].isdigit() and not psutil.pid_exists(int(writer[0][1:])):
            aside.unlink()


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
    fill(begin_folder(folder))
    finish_folder(folder)


def begin_folder(folder: Path) -> Path:
    """First half of `write_folder`: the new, empty folder to fill, beside the one to come."""
    folder = Path(folder)
    make_folder(folder.parent)
    recover_folder(folder)
    aside = folder.with_name(f"{folder.name}{ASIDE}")
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir()
    return aside


def finish_folder(folder: Path) -> None:
    """Second half of `write_folder`: flush what was filled, and put it in its place."""
    folder = Path(folder)
    aside, old = folder.with_name(f"{folder.name}{ASIDE}"), folder.with_name(f"{folder.name}{OLD}")
    fsync_tree(aside)
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    fsync_folder(folder.parent)
    if old.exists():
        shutil.rmtree(old)


def recover_folder(folder: Path) -> None:
    """After a crash: bring `folder` back if it was moved away and the new one had not yet come."""
    folder = Path(folder)
    old = folder.with_name(f"{folder.name}{OLD}")
    if old.exists() and not folder.exists():
        old.rename(folder)
        fsync_folder(folder.parent)
    elif old.exists():
        shutil.rmtree(old)


def remove_folder(folder: Path) -> None:
    """Remove `folder` so that a crash leaves it whole or gone, never a part under its name."""
    folder = Path(folder)
    aside = folder.with_name(f"{folder.name}{ASIDE}")
    if aside.exists():
        shutil.rmtree(aside)
    folder.rename(aside)
    fsync_folder(folder.parent)
    shutil.rmtree(aside)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal text."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
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
