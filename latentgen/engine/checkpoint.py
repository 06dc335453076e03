"""Checkpoints: complete or absent, checked before use, the old one removed only when the new one is safe.

A checkpoint is a folder named by its step: safetensors files, `state.json`, and `manifest.json` with the SHA-256 of
each. Nothing is pickled. Where networks are cut over processes, each process writes its rows into files of its own
(`weights-unet.part-0-of-2.safetensors`); any number of processes puts together what it needs of them.

torch.distributed.checkpoint was considered for that. Its own writer leaves pickled metadata; its safetensors writer
none at all, and its reader opens the files again, so that what is used need not be what was hashed. Rows of tensors
need no planner.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentgen.core.files import (
    ASIDE,
    OLD,
    begin_folder,
    finish_folder,
    read_file,
    recover_folder,
    remove_folder,
    require_free_space,
    write_file,
)
from latentgen.core.tensors import decoded, encoded
from latentgen.engine import sharding
from latentgen.engine.staging import Staging

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST, STATE, TENSORS, PART = "manifest.json", "state.json", ".safetensors", ".part-"

Tensors = dict[str, Tensor]
Listing = dict[str, dict[str, Any]]
"""File name -> its SHA-256 and its size in bytes."""
Wanted = Callable[[str, str, torch.Size], range | None]
"""(group, tensor, shape of the whole) -> the rows that this process needs; None means all."""


@dataclass(frozen=True)
class Checkpoint:
    """What survives a restart: named groups of tensors, and plain data.

    In one to be saved, tensors that are cut are DTensors. One that was read has whole tensors, or the rows asked for.

    Args:
        kept: to be saved beside them: group -> copies in main memory, of this process's rows where tensors are cut.
    """

    step: int
    tensors: dict[str, Tensors]
    data: dict[str, Any]
    kept: Mapping[str, Contents] = field(default_factory=dict)


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the `last` newest, those whose step `every` divides, and the `best` of lowest score."""

    last: int = 2
    every: int | None = None
    best: int = 0

    def of(self, scores: Mapping[int, float | None]) -> set[int]:
        """Steps to keep of these steps; a score is None where nothing was measured."""
        newest = sorted(scores)[-self.last :]
        spaced = [step for step in scores if self.every is not None and step % self.every == 0]
        measured = sorted((score, -step) for step, score in scores.items() if score is not None)
        return {*newest, *spaced, *(-step for _, step in measured[: self.best])}


class Damaged(ValueError):
    """A checkpoint is not what was written; says which file and why."""


@dataclass(frozen=True)
class Contents:
    """One file of a checkpoint: tensors, and (first row, rows of the whole) of those that are parts."""

    tensors: Tensors = field(default_factory=dict)
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)


def contents(checkpoint: Checkpoint, rank: int, world: int) -> dict[str, Contents]:
    """File name -> what this process writes: its rows of what is cut; and all that is whole, if it is the first."""
    files: dict[str, Contents] = {}
    for group in (*checkpoint.tensors, *checkpoint.kept):
        if rank == 0:
            files[group + TENSORS] = Contents()
        for name, value, rows in _here(checkpoint, group):
            if rows is None and rank == 0:
                files[group + TENSORS].tensors[name] = value
            elif rows is not None and len(value):  # a process may have no rows of a small tensor
                part = files.setdefault(f"{group}{PART}{rank}-of-{world}{TENSORS}", Contents())
                part.tensors[name], part.rows[name] = value, rows
    return files


def _here(checkpoint: Checkpoint, group: str) -> Iterator[tuple[str, Tensor, tuple[int, int] | None]]:
    """Name, this process's part, and (first row, rows of the whole) if it is one, of each tensor of a group."""
    if group in checkpoint.kept:
        for name, value in checkpoint.kept[group].tensors.items():
            yield name, value, checkpoint.kept[group].rows.get(name)
        return
    for name, value in checkpoint.tensors[group].items():
        own = sharding.rows(value)
        yield name, sharding.here(value), None if own is None else (own.start, value.shape[0])


def size_of(files: Mapping[str, Contents]) -> int:
    """Bytes of the tensors in these files."""
    return sum(value.numel() * value.itemsize for file in files.values() for value in file.tensors.values())


def staged(files: Mapping[str, Contents], staging: Staging) -> dict[str, Contents]:
    """The same files, of copies that training does not change."""
    copies = staging.copies({name: file.tensors for name, file in files.items()})
    return {name: Contents(copies[name], file.rows) for name, file in files.items()}


def write_contents(aside: Path, files: Mapping[str, Contents]) -> Listing:
    """Write staged files into the folder of a checkpoint to come, and flush them."""
    listing: Listing = {}
    for name, file in files.items():
        metadata = {"rows": json.dumps(file.rows)} if file.rows else None
        digest = write_file(aside / name, encoded(file.tensors, metadata))
        listing[name] = {"sha256": digest, "bytes": (aside / name).stat().st_size}
    return listing


def commit(folder: Path, step: int, data: dict[str, Any], listing: Listing, score: float | None) -> None:
    """Complete a checkpoint whose tensors are written, and give it its name."""
    aside = folder / f"{name_of(step)}{ASIDE}"
    text = _json({"step": step, **data})
    files = {STATE: {"sha256": write_file(aside / STATE, [text]), "bytes": len(text)}, **listing}
    manifest = {"format": FORMAT, "step": step, "score": score, "files": dict(sorted(files.items()))}
    write_file(aside / MANIFEST, [_json(_sealed(manifest))])
    finish_folder(folder / name_of(step))


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: Keep, score: float | None = None) -> Path:
    """Write `folder/STEP` from one process, at once; then remove what `keep` does not keep. See `saver.Saver`.

    Args:
        score: of a validation, the lower the better.

    Raises:
        UserError: the disk has too little room; what was there before is untouched.
    """
    files = contents(checkpoint, 0, 1)
    require_room(folder, checkpoint.step, size_of(files))
    aside = begin_folder(folder / name_of(checkpoint.step))
    listing = write_contents(aside, staged(files, Staging()))
    commit(folder, checkpoint.step, checkpoint.data, listing, score)
    prune(folder, checkpoint.step, keep)
    return folder / name_of(checkpoint.step)


def require_room(folder: Path, step: int, size: int) -> None:
    """Raise `UserError` unless the disk has room for a checkpoint of `size` bytes."""
    require_free_space(folder, size, f"the checkpoint of step {step}")


def prune(folder: Path, newest: int, keep: Keep, damaged: frozenset[int] = frozenset()) -> None:
    """Remove what is not to be kept, now that the checkpoint of step `newest` is safe.

    Args:
        damaged: steps that do not count. Later ones than `newest` do not either: a run only comes by here again when
            those were passed over.
    """
    steps = steps_in(folder)
    good = {step: score_of(folder / name_of(step)) for step in steps if step <= newest and step not in damaged}
    kept = keep.of(good) | {newest}
    for step in steps:
        if step not in kept:
            remove_folder(folder / name_of(step))


def name_of(step: int) -> str:
    """Name of a checkpoint's folder."""
    return f"{step:08d}"


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, ascending; half-written ones (never renamed) do not count."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir() if path.is_dir() and not path.name.endswith(ASIDE)]
    return sorted(int(name) for name in names if name.isdigit() and name == name_of(int(name)))


def tidy(folder: Path) -> None:
    """Clear away what a crash left in `folder`: half-written and half-removed checkpoints."""
    if not folder.is_dir():
        return
    for path in sorted(folder.glob(f"*{OLD}")):
        recover_folder(path.with_name(path.name.removesuffix(OLD)))
    for path in sorted(folder.glob(f"*{ASIDE}")):
        shutil.rmtree(path)


def score_of(path: Path) -> float | None:
    """The score that a checkpoint was saved with; None without one, or when it cannot be read."""
    try:
        return json.loads((path / MANIFEST).read_text())["score"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint in `folder`, whole; damaged ones are named in a warning and passed over."""
    for step in reversed(steps_in(folder)):
        try:
            return read_checkpoint(folder / name_of(step))
        except Damaged as wrong:
            logger.warning("checkpoint %s: %s; taking an older one", folder / name_of(step), wrong)
    return None


def read_checkpoint(path: Path, wanted: Wanted = lambda group, name, shape: None) -> Checkpoint:
    """Read a checkpoint: every file once, and none of it is used that does not have the SHA-256 of the manifest.

    Args:
        wanted: the rows to keep of each tensor, so that a process need not hold what others use.

    Raises:
        Damaged: a file is missing or is not what was written.
    """
    listing = _listing(path)
    data = json.loads(_checked(path, STATE, listing).numpy().tobytes())
    if data.pop("step") != int(path.name):
        raise Damaged("it was saved under another step")
    groups: dict[str, Tensors] = {}
    rows_found: dict[tuple[str, str], int] = {}
    for file in sorted(name for name in listing if name.endswith(TENSORS)):
        group = file.removesuffix(TENSORS).partition(PART)[0]
        content = _checked(path, file, listing)
        try:
            tensors, metadata = decoded(content)
        except ValueError as error:
            raise Damaged(f"{file}: {error}") from error
        places = json.loads(metadata.get("rows", "{}"))
        own = groups.setdefault(group, {})
        for name, value in tensors.items():
            if name not in places:
                own[name] = _only(value, wanted(group, name, value.shape))
                continue
            start, total = places[name]
            shape = torch.Size((total, *value.shape[1:]))
            asked = wanted(group, name, shape)
            span = range(total) if asked is None else asked
            if name not in own:
                own[name] = value.new_empty((len(span), *shape[1:]))
                rows_found[group, name] = -total
            rows_found[group, name] += len(value)
            _copy_rows(own[name], span, value, start)
    for (group, name), missing in rows_found.items():
        if missing:
            raise Damaged(f"{-missing} rows of {group}/{name} are missing")
    return Checkpoint(int(path.name), groups, data)


def verify(path: Path) -> dict[str, Any]:
    """Compare every file of a checkpoint with its manifest; return the plain data.

    Raises:
        Damaged: a file is missing or is not what was written.
    """
    listing = _listing(path)
    for name in listing:
        _checked(path, name, listing)
    return json.loads(_checked(path, STATE, listing).numpy().tobytes())


def _only(value: Tensor, span: range | None) -> Tensor:
    """The rows `span`, in memory of their own, so that the rest can go; or all, as they are."""
    return value if span is None or len(span) == len(value) else value[span.start : span.stop].clone()


def _copy_rows(target: Tensor, span: range, part: Tensor, start: int) -> None:
    """Put rows start, start + 1, ... of the whole where `target`, the rows `span` of it, has them."""
    first, last = max(span.start, start), min(span.stop, start + len(part))
    if first < last:
        target[first - span.start : last - span.start] = part[first - start : last - start]


def _listing(path: Path) -> Listing:
    text = _bytes(path, MANIFEST).numpy().tobytes()
    try:
        found = json.loads(text)
        # Nothing vouches for the manifest but itself: it must be, to the byte, what is written for its values.
        seal = found.pop("sha256")
        sealed = _sealed(found)
        whole = seal == sealed["sha256"] and text == _json(sealed) and found["format"] == FORMAT
        whole = whole and found["step"] == int(path.name) and STATE in found["files"]
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise Damaged(f"{MANIFEST} is damaged")
    return found["files"]


def _checked(path: Path, name: str, listing: Listing) -> Tensor:
    """The bytes `[n]` uint8 of a file, which are those that were written."""
    content = _bytes(path, name)
    if listing[name] != {"sha256": sha256(content.numpy().data).hexdigest(), "bytes": content.numel()}:
        raise Damaged(f"{name} is damaged")
    return content


def _bytes(path: Path, name: str) -> Tensor:
    try:
        return read_file(path / name)
    except FileNotFoundError:
        raise Damaged(f"{name} is missing") from None
    except OSError as error:
        raise Damaged(f"{name} cannot be read: {error.strerror}") from error


def _sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    return {**manifest, "sha256": sha256(_json(manifest)).hexdigest()}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
