"""The model folder: the diffusers layout, written complete or not at all, and read with plain words for what is wrong.

* model_index.json: which class each part is, and which pipeline of diffusers opens the folder
* unet/, vae/, text_encoder/, in SDXL's family text_encoder_2/: config.json and safetensors
* tokenizer/, tokenizer_2/: tokenizer.json, tokenizer_config.json
* scheduler/: scheduler_config.json, the process the U-Net was trained on (`formats.scheduler`)
* latentgen.json: what trained it (ours; other tools ignore it)
* clip/: both contrastive towers, where they were trained here (ours)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from latentgen import __version__
from latentgen.core.errors import UserError
from latentgen.core.files import write_folder, write_json
from latentgen.core.tensors import require_finite
from latentgen.formats.folder_check import INDEX, check_folder, read_json
from latentgen.formats.model import Model, stated_chunks
from latentgen.formats.model_index import model_index
from latentgen.formats.parts import NETWORKS
from latentgen.formats.scheduler import read_schedule, scheduler_config
from latentgen.models.text import Tower, projects

if TYPE_CHECKING:
    from latentgen.models.clip import Clip

METADATA, SCHEDULER, CONTRASTIVE = "latentgen.json", "scheduler/scheduler_config.json", "clip"
CLASSES: dict[str, Any] = {
    kind.__name__: kind
    for kind in (UNet2DConditionModel, AutoencoderKL, AutoencoderTiny, CLIPTextModel, CLIPTextModelWithProjection)
}


def save_model(model: Model, folder: Path, dtype: torch.dtype | None = None, *, clip: Clip | None = None) -> None:
    """Write a model folder, complete or not at all; an older model folder of that name is replaced.

    Args:
        model: left unchanged.
        folder: where; parents are made.
        dtype: of the stored weights; None stores each network as it is.
        clip: both contrastive towers, stored in `clip/`.

    Raises:
        UserError: `folder` exists and holds something else, or other tools know no such prediction.
        FloatingPointError: a weight is not finite, or would not be in `dtype`; nothing is written.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / INDEX).is_file()):
        raise UserError(f"{folder} exists and is not a model folder: it is left as it is; choose another name")
    scheduler = scheduler_config(model.prediction, model.schedule, model.learned_variance)
    networks = {name: network for name, network in model.networks().items() if name not in ("control", "tokens")}
    for name, network in (networks | ({"clip": clip} if clip is not None else {})).items():
        stored = network.state_dict() if name == "clip" else _stored(network, dtype)
        require_finite({f"{name}/{key}": value for key, value in stored.items()}, f"the model folder {folder}")

    def fill(target: Path) -> None:
        with quiet_libraries():
            for name, network in networks.items():
                _cast(network, dtype).save_pretrained(target / name, safe_serialization=True)
            for tower in model.towers:
                _open_in_float32(target / tower.name / "config.json")
                tower.tokenizer.save_pretrained(target / tower.tokenizer_name)
        write_json(target / SCHEDULER, scheduler)
        about = {"latentgen": __version__, "chunks": model.chunks, "metadata": dict(model.metadata)}
        write_json(target / METADATA, about)
        if clip is not None:
            from latentgen.models.clip import save_clip

            save_clip(clip, target / CONTRASTIVE)
        write_json(target / INDEX, _index(model, scheduler["_class_name"]))

    write_folder(folder, fill)


def _open_in_float32(config: Path) -> None:
    """Name float32 as the type to open a network in, whatever type it is stored in.

    transformers opens a network in the type that its configuration names, diffusers in float32: a pipeline of networks
    stored in half precision would come up with two types, and fail at the first attention to the text.
    """
    write_json(config, {**read_json(config), "dtype": "float32"})


def _stored(network: nn.Module, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The weights as they will be in the file: those that are too large for `dtype` are infinite there."""
    state = network.state_dict()
    if dtype is None:
        return state
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}


def _cast(network: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None or all(p.dtype == dtype for p in network.parameters()):
        return network
    return copy.deepcopy(network).to(dtype)


def _index(model: Model, scheduler: str) -> dict[str, Any]:
    classes = {name: type(network).__name__ for name, network in model.networks().items() if name in NETWORKS}
    pipeline: dict[str, Any] = {"_class_name": _pipeline(model)}
    if projects(model.towers):
        pipeline["force_zeros_for_empty_prompt"] = model.zero_empty
        if model.sizes == 5 or model.inpaints:  # the pipelines that know this word
            pipeline["requires_aesthetics_score"] = model.sizes == 5
    else:
        pipeline["requires_safety_checker"] = False
    return model_index(classes, scheduler, pipeline)


def _pipeline(model: Model) -> str:
    """The pipeline of diffusers that draws with the model."""
    large = "XL" if projects(model.towers) else ""
    kind = "Inpaint" if model.inpaints else "Img2Img" if model.sizes == 5 else ""
    return f"StableDiffusion{large}{kind}Pipeline"


def load_model(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """Read a model folder, ours or one that diffusers wrote; nothing is downloaded and nothing is unpickled.

    Networks come in evaluation mode.

    Args:
        folder: holds model_index.json.
        device: where the networks go.
        dtype: of their weights.

    Raises:
        UserError: the folder is missing, is something else, is half-copied, or its parts do not fit together.
    """
    folder = Path(folder)
    parts = check_folder(folder)
    prediction, schedule = read_schedule(read_json(folder / SCHEDULER), str(folder / SCHEDULER))
    with quiet_libraries():
        opened = {
            name: load_network(CLASSES[part.kind], folder / name, part.variant, dtype) for name, part in parts.items()
        }
        towers = tuple(
            Tower(name, network.to(device), _tokenizer(folder / name.replace("text_encoder", "tokenizer")))
            for name, network in opened.items()
            if name.startswith("text_encoder")
        )
    vae = opened["vae"]
    if dtype == torch.float16 and vae.config["force_upcast"]:
        vae = vae.float()  # this one's activations do not fit float16
    model = Model(
        unet=opened["unet"].to(device),
        vae=vae.to(device),
        towers=towers,
        prediction=prediction,
        schedule=schedule,
        zero_empty=bool(read_json(folder / INDEX).get("force_zeros_for_empty_prompt", False)),
        metadata=load_metadata(folder),
        chunks=stated_chunks(read_json(folder / METADATA), str(folder)) if (folder / METADATA).is_file() else 1,
    )
    model.require_fit(str(folder))
    return model


def _tokenizer(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def load_network(kind: Any, folder: Path, variant: str | None, dtype: torch.dtype) -> Any:
    """A network of class `kind` from its own folder, in evaluation mode; `UserError` where the two do not fit."""
    named = {"dtype" if kind.__module__.startswith("transformers") else "torch_dtype": dtype}
    try:
        network, report = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, variant=variant, output_loading_info=True, **named
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        first = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: weights and config.json do not make a {kind.__name__}: {first}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"{folder}: {len(missing)} weights are missing, the first is {missing[0]}")
    assert isinstance(network, nn.Module)
    return network.eval()


def load_metadata(folder: Path) -> dict[str, Any]:
    """What latentgen wrote beside a model: its recipe, data and compute; empty where another tool made the folder."""
    if not (folder / METADATA).is_file():
        return {}
    content = read_json(folder / METADATA).get("metadata", {})
    return content if isinstance(content, dict) else {}


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars and no advice from diffusers and transformers inside the block; errors still show."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bar) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()
