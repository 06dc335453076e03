"""What a file or a folder is, as plain values for people and programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentgen.core.files import file_sha256
from latentgen.formats.families import recognise, variant_of
from latentgen.formats.folder_check import INDEX, networks_of_folder, read_json, stem_of, weight_files
from latentgen.formats.found import Found, dtypes_of, parameters_of
from latentgen.formats.headers import Entry, file_hashes, read_header
from latentgen.formats.model_folder import METADATA, SCHEDULER
from latentgen.formats.original.unet_names import structure_of_diffusers
from latentgen.formats.parts import TOKENIZERS, family_of
from latentgen.formats.scheduler import read_schedule
from latentgen.formats.single_file.read import METADATA_ENTRY

KOHYA: Mapping[str, str] = {
    "ss_output_name": "name",
    "ss_sd_model_name": "base model",
    "ss_base_model_version": "base version",
    "ss_network_module": "method",
    "ss_network_dim": "rank",
    "ss_network_alpha": "alpha",
    "ss_num_train_images": "pictures",
    "ss_steps": "steps",
    "ss_num_epochs": "epochs",
    "ss_learning_rate": "learning rate",
    "ss_optimizer": "optimizer",
    "ss_resolution": "resolution",
}
"""What kohya's scripts write of a training, and how it is shown."""


def describe(path: Path, *, hashes: bool = True) -> dict[str, Any]:
    """Everything that a safetensors file or a model folder says of itself, as JSON values.

    Args:
        path: the file or the folder.
        hashes: compute them too, which reads every byte.

    Raises:
        UserError: as `read_header` and `parts_of_folder` do.
    """
    path = Path(path)
    if path.is_dir():
        inner = path / "model"
        return _describe_folder(inner if not (path / INDEX).is_file() and inner.is_dir() else path, hashes)
    header = read_header(path)
    found = recognise(header)
    spec = {key.removeprefix("modelspec."): v for key, v in header.metadata.items() if key.startswith("modelspec.")}
    return {
        **_plain(found, path),
        "bytes": path.stat().st_size,
        **({"hashes": file_hashes(path)._asdict()} if hashes else {}),
        **({"modelspec": spec} if spec else {}),
        "trained": _trained(header.metadata),
    }


def _plain(found: Found, path: Path) -> dict[str, Any]:
    values = {
        "path": str(path),
        "kind": found.kind,
        "title": found.title,
        "family": found.family,
        "variant": found.variant,
        "prediction": found.prediction,
        "zero_terminal_snr": found.zero_terminal_snr or None,
        "in_channels": found.in_channels,
        "layout": found.layout,
        "details": dict(found.details) or None,
    }
    parts = {
        part: {"parameters": found.parameters[part], "precision": list(found.dtypes[part])} for part in found.parameters
    }
    return {**{key: value for key, value in values.items() if value is not None}, "parts": parts}


def _describe_folder(folder: Path, hashes: bool) -> dict[str, Any]:
    parts = networks_of_folder(folder)
    files = {part: weight_files(folder / part, stem_of(part)).files for part in parts}
    entries: dict[str, dict[str, Entry]] = {
        part: {name: entry for file in own for name, entry in read_header(file).tensors.items()}
        for part, own in files.items()
    }
    unet = read_json(folder / "unet" / "config.json")
    family = family_of(tuple(part for part in parts if part in TOKENIZERS), unet)
    prediction, schedule = read_schedule(read_json(folder / SCHEDULER), str(folder / SCHEDULER))
    found = Found(
        kind="model",
        family=family,
        variant=variant_of(structure_of_diffusers(entries["unet"]), family),
        prediction=prediction,
        zero_terminal_snr=bool(schedule.get("zero_terminal_snr")),
        in_channels=unet.get("in_channels"),
        dtypes={part: dtypes_of(own) for part, own in entries.items()},
        parameters={part: parameters_of(own) for part, own in entries.items()},
    )
    every = [file for own in files.values() for file in own]
    metadata = {METADATA_ENTRY: (folder / METADATA).read_text("utf-8")} if (folder / METADATA).is_file() else {}
    return {
        **_plain(found, folder),
        "bytes": sum(file.stat().st_size for file in every),
        **({"hashes": {str(file.relative_to(folder)): file_sha256(file) for file in every}} if hashes else {}),
        "trained": _trained(metadata),
    }


def _trained(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What it was trained with, by latentgen or by kohya's scripts; empty where nobody says."""
    if METADATA_ENTRY in metadata:
        content: Any = _json(metadata[METADATA_ENTRY])
        told = content.get("metadata", {})
        recipe = told.get("recipe", {})
        data, train = recipe.get("data", {}), recipe.get("train", {})
        values = {
            "by": f"latentgen {content.get('latentgen')}",
            "recipe": recipe.get("name"),
            "data": data.get("path") or data.get("source"),
            "resolution": data.get("resolution"),
            "steps": train.get("steps"),
            "batch": train.get("global_batch"),
            "learning rate": train.get("learning_rate"),
            "optimizer": train.get("optimizer"),
            "target": recipe.get("diffusion", {}).get("target"),
            "from": told.get("from") or None,
        }
        return {key: value for key, value in values.items() if value is not None}
    return {shown: metadata[key] for key, shown in KOHYA.items() if metadata.get(key) not in (None, "None", "")}


def _json(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        return {}  # of a program that uses the name for something else
    return content if isinstance(content, dict) else {}


def shown(described: Mapping[str, Any]) -> str:
    """`describe`'s values as lines of text."""
    lines = [f"{described['path']}: {described['title'] or described['kind']}"]
    for part, own in described["parts"].items():
        lines.append(f"  {part or 'tensors'}: {own['parameters']:,} parameters, {' and '.join(own['precision'])}")
    for key in ("prediction", "layout", "in_channels"):
        if key in described:
            lines.append(f"  {key}: {described[key]}")
    for key in ("details", "trained", "modelspec", "hashes"):
        for name, value in (described.get(key) or {}).items():
            lines.append(f"  {key}: {name} {value}")
    lines.append(f"  size: {described['bytes'] / 2**20:.1f} MiB")
    return "\n".join(lines)
