"""Schedules fitted to a model, kept with its metadata in latentgen.json.

{"metadata": {"fitted_schedules": [{"sampler", "steps", "guidance_scale", "sigmas", "error", "start_error"}, ...]}}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentgen import __version__
from latentgen.core.errors import UserError
from latentgen.core.files import write_json
from latentgen.formats.folder_check import check_folder, read_json
from latentgen.formats.model_folder import METADATA

KEY = "fitted_schedules"


def find_fitted(metadata: Mapping[str, Any], sampler: str, steps: int) -> Tensor:
    """The levels [steps + 1] that were fitted for this sampler (its registered name) and number of steps.

    Raises UserError, saying what there is, where none was fitted for these, or where the file was tampered with.
    """
    entries = [entry for entry in metadata.get(KEY, []) if isinstance(entry, Mapping)]
    for entry in entries:
        if (entry.get("sampler"), entry.get("steps")) == (sampler, steps):
            sigmas = torch.tensor(entry.get("sigmas", []), dtype=torch.float32)
            if len(sigmas) != steps + 1 or sigmas[-1] != 0 or not (sigmas[:-1] > sigmas[1:]).all():
                raise UserError(f"--schedule fitted: the levels in {METADATA} for {sampler}, {steps} steps are broken")
            return sigmas
    fitted = ", ".join(f"{entry.get('sampler')} with {entry.get('steps')} steps" for entry in entries) or "none"
    raise UserError(
        f"--schedule fitted: no schedule was fitted for {sampler} with {steps} steps (fitted: {fitted}); "
        f"run `latentgen fit-schedule --model FOLDER --sampler {sampler} --steps {steps}` first"
    )


def write_fitted(folder: Path, entry: Mapping[str, Any]) -> None:
    """Add a fitted schedule to a model folder, in place of the one for the same sampler and steps.

    Raises UserError where `folder` is no model folder.
    """
    check_folder(folder)
    path = Path(folder) / METADATA
    content = read_json(path) if path.is_file() else {"latentgen": __version__}
    metadata = content.get("metadata")
    metadata = dict(metadata) if isinstance(metadata, Mapping) else {}
    same = (entry["sampler"], entry["steps"])
    others = [e for e in metadata.get(KEY, []) if (e.get("sampler"), e.get("steps")) != same]
    metadata[KEY] = sorted([*others, dict(entry)], key=lambda e: (e["sampler"], e["steps"]))
    write_json(path, {**content, "metadata": metadata})
