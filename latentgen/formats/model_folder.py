"""The model folder: the diffusers layout, written complete or not at all, and read with plain words for what is wrong.

* model_index.json: which class each part is; StableDiffusionPipeline opens the folder
* unet/, vae/, text_encoder/: config.json and safetensors
* tokenizer/: tokenizer.json, tokenizer_config.json
* scheduler/: scheduler_config.json, the process the U-Net was trained on (`formats.scheduler`)
* latentgen.json: what trained it (ours; other tools ignore it)
* clip/: both contrastive towers, where they were trained here (ours)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from latentgen import __version__
from latentgen.core.errors import UserError
from latentgen.core.files import write_folder, write_json
from latentgen.core.tensors import require_finite
from latentgen.diffusion.parameterization import Parameterization
from latentgen.formats.folder_check import check_folder, read_json
from latentgen.formats.scheduler import library_of, parameterization, read_schedule, scheduler_config

if TYPE_CHECKING:
    from latentgen.models.clip import Clip

INDEX, METADATA, SCHEDULER = "model_index.json", "latentgen.json", "scheduler/scheduler_config.json"


@dataclass(frozen=True, kw_only=True)
class Model:
    """Everything that turns text into pictures.

    Attributes:
        vae: between pictures and latents.
        text_encoder: token ids to context.
        tokenizer: text to token ids.
        unet: the denoising network.
        prediction: what the U-Net predicts: "eps", "v", "x0", "flow", "edm" or "ve".
        schedule: the numbers of the process, plain data, as `formats.scheduler` describes them.
        metadata: JSON values; kept in latentgen.json.
    """

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel
    prediction: str
    schedule: Mapping[str, Any]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def parameterization(self) -> Parameterization:
        """What `prediction` and `schedule` mean.

        Raises:
            UserError: an unknown prediction or noise table.
        """
        return parameterization(self.prediction, self.schedule)

    @property
    def learned_variance(self) -> bool:
        """Whether the second half of the U-Net's channels speaks of the variance (arXiv 2102.09672, eq. 15)."""
        return self.unet.config["out_channels"] == 2 * self.vae.config["latent_channels"]


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
    networks = {"unet": model.unet, "vae": model.vae, "text_encoder": model.text_encoder}
    for name, network in (networks | ({"clip": clip} if clip is not None else {})).items():
        stored = network.state_dict() if name == "clip" else _stored(network, dtype)
        require_finite({f"{name}/{key}": value for key, value in stored.items()}, f"the model folder {folder}")

    def fill(target: Path) -> None:
        with quiet_libraries():
            for name, network in networks.items():
                _cast(network, dtype).save_pretrained(target / name, safe_serialization=True)
            _open_in_float32(target / "text_encoder" / "config.json")
            model.tokenizer.save_pretrained(target / "tokenizer")
        write_json(target / SCHEDULER, scheduler)
        write_json(target / METADATA, {"latentgen": __version__, "metadata": dict(model.metadata)})
        if clip is not None:
            from latentgen.models.clip import save_clip

            save_clip(clip, target / "clip")
        write_json(target / INDEX, _index(scheduler["_class_name"]))

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


def _index(scheduler: str) -> dict[str, Any]:
    from diffusers import __version__ as diffusers_version

    absent = [None, None]
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers_version,
        "feature_extractor": absent,
        "image_encoder": absent,
        "requires_safety_checker": False,
        "safety_checker": absent,
        "scheduler": [library_of(scheduler), scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


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
    variants = check_folder(folder)
    where = str(folder / SCHEDULER)
    prediction, schedule = read_schedule(read_json(folder / SCHEDULER), where)
    with quiet_libraries():
        model = Model(
            unet=_load(UNet2DConditionModel, folder / "unet", variants["unet"], torch_dtype=dtype).to(device),
            vae=_load(AutoencoderKL, folder / "vae", variants["vae"], torch_dtype=dtype).to(device),
            text_encoder=_load(CLIPTextModel, folder / "text_encoder", variants["text_encoder"], dtype=dtype).to(
                device
            ),
            tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
            prediction=prediction,
            schedule=schedule,
            metadata=load_metadata(folder),
        )
    _require_fit(model, folder)
    return model


def _load(kind: Any, folder: Path, variant: str | None, **dtype: torch.dtype) -> Any:
    try:
        network, report = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, variant=variant, output_loading_info=True, **dtype
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


def _require_fit(model: Model, folder: Path) -> None:
    """Raise UserError where parts of different models were put together."""
    unet, text, vae = model.unet.config, model.text_encoder.config, model.vae.config
    context = unet["cross_attention_dim"]
    if isinstance(context, int) and context != text.hidden_size:
        raise UserError(
            f"{folder}: the U-Net reads text states of width {context}, the text encoder makes {text.hidden_size}"
        )
    if unet["out_channels"] not in (vae["latent_channels"], 2 * vae["latent_channels"]):
        raise UserError(
            f"{folder}: the U-Net has {unet['out_channels']} latent channels, the autoencoder {vae['latent_channels']}"
        )
    if len(model.tokenizer) > text.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {len(model.tokenizer)} tokens, the text encoder knows {text.vocab_size}"
        )
    if model.tokenizer.model_max_length > text.max_position_embeddings:
        raise UserError(
            f"{folder}: captions of {model.tokenizer.model_max_length} tokens, the text encoder takes "
            f"{text.max_position_embeddings}; set model_max_length in tokenizer/tokenizer_config.json"
        )


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
