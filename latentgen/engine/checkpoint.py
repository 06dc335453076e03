"""Checkpoints: complete or absent, checked before use, the old one removed only when the new one is safe.

A checkpoint is a folder named by its step: safetensors files, `state.json`, and `manifest.json` with the SHA-256 of
each. Nothing is pickled.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from latentgen.core.files import ASIDE, file_sha256, require_free_space, write_folder, write_json

logger = logging.getLogger(__name__)

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """What survives a restart: named groups of tensors, and plain data."""

    step: int
    tensors: dict[str, Tensors]
    data: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep_last: int) -> Path:
    """Write `folder/STEP`, then remove all but the newest `keep_last` up to it.

    Checkpoints of later steps go too: a run only comes here again when those were damaged and passed over.

    Raises:
        UserError: the disk has too little room; what was there before is untouched.
    """
    size = sum(t.numel() * t.element_size() for group in checkpoint.tensors.values() for t in group.values())
    require_free_space(folder, size, f"the checkpoint of step {checkpoint.step}")
    target = folder / f"{checkpoint.step:08d}"

    def fill(aside: Path) -> None:
        for name, group in checkpoint.tensors.items():
            save_file(
                {key: value.detach().cpu().contiguous() for key, value in group.items()}, aside / f"{name}.safetensors"
            )
        write_json(aside / "state.json", {"step": checkpoint.step, **checkpoint.data})
        files = sorted(path.name for path in aside.iterdir())
        write_json(aside / "manifest.json", {name: file_sha256(aside / name) for name in files})

    write_folder(target, fill)
    steps = steps_in(folder)
    kept = [step for step in steps if step <= checkpoint.step][-keep_last:]
    for step in steps:
        if step not in kept:
            shutil.rmtree(folder / f"{step:08d}")
    return target


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, ascending; half-written ones (never renamed) do not count."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir() if path.is_dir() and not path.name.endswith(ASIDE)]
    return sorted(int(name) for name in names if name.isdigit())


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None: every file must be there with the SHA-256 of its manifest."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return "manifest.json is missing"
    try:
        expected = json.loads(manifest.read_text())
    except ValueError:
        return "manifest.json is damaged"
    for name, digest in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if file_sha256(path) != digest:
            return f"{name} is damaged"
    return None


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint in `folder`; damaged ones are named in a warning and passed over."""
    for step in reversed(steps_in(folder)):
        path = folder / f"{step:08d}"
        wrong = damage(path)
        if wrong is not None:
            logger.warning("checkpoint %s: %s; taking an older one", path, wrong)
            continue
        data = json.loads((path / "state.json").read_text())
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
        return Checkpoint(data.pop("step"), tensors, data)
    return None
