"""Schedules fitted to a model, kept with its metadata in latentgen.json.

{"metadata": {"fitted_schedules": [
    {"sampler", "steps", "guidance_scale", "guidance", "sigmas", "error", "start", "start_error"}, ...
]}}

`sampler` as `diffusion.samplers.canonical` writes it, `guidance` as `diffusion.guidance.canonical` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentgen import __version__
from latentgen.core.errors import UserError
from latentgen.core.files import write_json
from latentgen.formats.folder_check import check_folder, read_json
from latentgen.formats.model_folder import METADATA

KEY = "fitted_schedules"

PLAIN = ("cfg",)
"""The guidance of those that say nothing of it."""


class Fitted(NamedTuple):
    """Levels [steps + 1] and the guidance that they were fitted with."""

    sigmas: Tensor
    guidance_scale: float
    guidance: tuple[str, ...]


def find_fitted(
    metadata: Mapping[str, Any], sampler: str, steps: int, guidance_scale: float = 4.0, guidance: Sequence[str] = PLAIN
) -> Fitted:
    """What was fitted for this sampler and number of steps: with this guidance, else with the nearest scale.

    Raises UserError, saying what there is, where none was fitted for these, or where the file was tampered with.
    """
    entries = [entry for entry in metadata.get(KEY, []) if isinstance(entry, Mapping)]
    fitting = [entry for entry in entries if (entry.get("sampler"), entry.get("steps")) == (sampler, steps)]
    if not fitting:
        fitted = ", ".join(f"{entry.get('sampler')} with {entry.get('steps')} steps" for entry in entries) or "none"
        raise UserError(
            f"--schedule fitted: no schedule was fitted for {sampler} with {steps} steps (fitted: {fitted}); "
            f"run `latentgen fit-schedule --model FOLDER --sampler {sampler} --steps {steps}` first"
        )
    try:
        found = [_read(entry) for entry in fitting]
    except (TypeError, ValueError, RuntimeError):  # what torch says of words, of words in lists, and of nothing
        found = []
    if not found or not all(_sound(one.sigmas, steps) for one in found):
        raise UserError(f"--schedule fitted: the levels in {METADATA} for {sampler}, {steps} steps are broken")
    return min(found, key=lambda one: (one.guidance != tuple(guidance), abs(one.guidance_scale - guidance_scale)))


def _read(entry: Mapping[str, Any]) -> Fitted:
    sigmas = torch.tensor(entry.get("sigmas", []), dtype=torch.float32)
    return Fitted(sigmas, float(entry.get("guidance_scale", 4.0)), tuple(map(str, entry.get("guidance", PLAIN))))


def _sound(sigmas: Tensor, steps: int) -> bool:
    descending = sigmas.shape == (steps + 1,) and bool((sigmas[:-1] > sigmas[1:]).all())
    return descending and float(sigmas[-1]) == 0 and bool(sigmas.isfinite().all())


def write_fitted(folder: Path, entry: Mapping[str, Any]) -> None:
    """Add a fitted schedule to a model folder, in place of the one for the same sampler, steps and guidance.

    Raises UserError where `folder` is no model folder.
    """
    check_folder(folder)
    path = Path(folder) / METADATA
    content = read_json(path) if path.is_file() else {"latentgen": __version__}
    metadata = content.get("metadata")
    metadata = dict(metadata) if isinstance(metadata, Mapping) else {}
    others = [e for e in metadata.get(KEY, []) if isinstance(e, Mapping) and _place(e) != _place(entry)]
    metadata[KEY] = sorted([*others, dict(entry)], key=_place)
    write_json(path, {**content, "metadata": metadata})


def _place(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells entries apart, and their order."""
    own = (str(entry.get("sampler")), entry.get("steps", 0), entry.get("guidance_scale", 4.0))
    return *own, list(entry.get("guidance", PLAIN))
