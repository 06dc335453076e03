"""A model in memory from plain data: what a single file or a repository of the hub holds, without a folder between."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from latentgen.core.errors import UserError
from latentgen.formats.model import Model, stated_chunks
from latentgen.formats.model_folder import quiet_libraries
from latentgen.formats.part_check import build_part, check_part
from latentgen.formats.parts import TOKENIZERS, Parts
from latentgen.formats.scheduler import read_schedule
from latentgen.models.text import Tower


def model_of(parts: Parts, where: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """The model that `parts` describe, in evaluation mode.

    Args:
        where: it came from, for messages.
        device, dtype: of its networks; an autoencoder that float16 is too small for stays float32.

    Raises:
        UserError: it is no whole model, or its parts do not fit together.
    """
    if not parts.whole:
        raise UserError(f"{where} holds only {', '.join(parts.states)}: a model to draw with has U-Net, VAE and text")
    for name, state in parts.states.items():
        check_part(name, parts.configs[name], state, where)
    prediction, schedule = read_schedule(parts.scheduler, where)
    networks: dict[str, Any] = {}
    with quiet_libraries():
        for name, state in parts.states.items():
            config, floating = parts.configs[name], dtype
            if name == "vae" and dtype == torch.float16 and config.get("force_upcast", True):
                floating = torch.float32
            make: Any = _encoder if name in TOKENIZERS else _network
            networks[name] = make(name, config, state, floating).eval().to(device)
        towers = tuple(
            Tower(name, network, _tokenizer(parts.tokenizers[TOKENIZERS[name]]))
            for name, network in networks.items()
            if name in TOKENIZERS
        )
    model = Model(
        unet=networks["unet"],
        vae=networks["vae"],
        towers=tuple(sorted(towers, key=lambda tower: tower.name)),
        prediction=prediction,
        schedule=schedule,
        zero_empty=bool(parts.pipeline.get("force_zeros_for_empty_prompt", False)),
        metadata=parts.metadata,
        chunks=stated_chunks(parts.metadata, where),
    )
    model.require_fit(where)
    return model


def _network(name: str, config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype) -> ModelMixin:
    with torch.device("meta"):
        network = build_part(name, config)
    assert isinstance(network, ModelMixin)
    wanted = network.state_dict()
    network.load_state_dict({key: state[key].to(dtype) for key in wanted}, assign=True)
    return network


def _encoder(name: str, config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """By the library's own loading, which fills buffers that no file holds."""
    kind: Any = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
    return kind.from_pretrained(None, config=CLIPTextConfig(**config), state_dict=dict(state), dtype=dtype)  # type: ignore[operator]


def _tokenizer(files: Mapping[str, str]) -> CLIPTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        for file, text in files.items():
            (Path(folder) / file).write_text(text, encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
