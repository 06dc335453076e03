"""The folder of a ControlNet: config.json and safetensors, as diffusers' ControlNetModel reads and writes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel

from latentgen import __version__
from latentgen.core.errors import UserError
from latentgen.core.files import write_folder, write_json
from latentgen.core.tensors import require_finite
from latentgen.formats.folder_check import DIFFUSERS, INDEX, read_json, weight_files
from latentgen.formats.model import Model
from latentgen.formats.model_folder import METADATA, load_network, quiet_libraries
from latentgen.models.autoencoder import factor
from latentgen.models.control import require_control

CONFIG, KIND = "config.json", "ControlNetModel"


def save_control(control: ControlNetModel, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write a ControlNet's folder, complete or not at all; an older one of that name is replaced.

    Args:
        metadata: JSON values; kept in latentgen.json.

    Raises:
        UserError: `folder` exists and holds something else.
        FloatingPointError: a weight is not finite; nothing is written.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG).is_file()):
        raise UserError(f"{folder} exists and is not a ControlNet: it is left as it is; choose another name")
    require_finite(control.state_dict(), f"the ControlNet {folder}")

    def fill(target: Path) -> None:
        with quiet_libraries():
            control.save_pretrained(target, safe_serialization=True)
        write_json(target / METADATA, {"latentgen": __version__, "metadata": dict(metadata)})

    write_folder(folder, fill)


def load_control(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Read a ControlNet's folder, ours or one that diffusers wrote; nothing is downloaded and nothing is unpickled.

    Returns:
        A ControlNetModel in evaluation mode.

    Raises:
        UserError: the folder is missing, is something else, or is half-copied.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no ControlNet at {folder}; name a folder with {CONFIG} and {DIFFUSERS}.safetensors")
    if not (folder / CONFIG).is_file():
        if (folder / "control" / CONFIG).is_file():
            raise UserError(f"{folder} is a run folder; its ControlNet is {folder / 'control'}")
        what = "a model folder, not a ControlNet's" if (folder / INDEX).is_file() else f"no ControlNet: no {CONFIG}"
        raise UserError(f"{folder} is {what}; name a folder with {CONFIG} and {DIFFUSERS}.safetensors")
    kind = read_json(folder / CONFIG).get("_class_name")
    if kind != KIND:
        raise UserError(f"{folder} holds a {kind}, not a {KIND}; name another folder")
    variant = weight_files(folder).variant
    with quiet_libraries():
        return load_network(ControlNetModel, folder, variant, dtype).to(device)


def with_control(model: Model, folder: Path) -> Model:
    """The model with the ControlNet of `folder` beside it, on the same device and of the same type.

    Raises:
        UserError: it cannot be read, or was made for models of another family.
    """
    control = load_control(folder, model.unet.device, model.unet.dtype)
    require_control(control, model.unet, model.latent_channels, factor(model.vae), str(folder))
    return dataclasses.replace(model, control=control)
