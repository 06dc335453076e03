"""Whether a network's tensors are those that its configuration describes; told without memory for a single weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from latentgen.core.errors import UserError
from latentgen.formats.model_folder import quiet_libraries
from latentgen.formats.original.renaming import text_name
from latentgen.formats.parts import TOKENIZERS


def expected_shapes(part: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a network with this configuration, under the names that `Parts` has them by."""
    with torch.device("meta"), quiet_libraries():
        state = build_part(part, config).state_dict()
    rename = text_name if part in TOKENIZERS else str
    return {rename(name): tuple(value.shape) for name, value in state.items()}


def build_part(part: str, config: Mapping[str, Any]) -> nn.Module:
    """A network with this configuration and random weights, on the default device."""
    built: Any
    if part in TOKENIZERS:
        kind = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
        built = kind(CLIPTextConfig(**config))  # type: ignore[operator]  # the library's decorators hide the class
    elif part == "vae":
        kind = AutoencoderTiny if config.get("_class_name") == "AutoencoderTiny" else AutoencoderKL
        built = kind.from_config(dict(config))
    else:
        built = UNet2DConditionModel.from_config(dict(config))
    assert isinstance(built, nn.Module)
    return built


def check_part(part: str, config: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> list[str]:
    """Names of tensors that the network does not have.

    Args:
        part: diffusers' name of it.
        config, state: of it.
        where: the file or folder, for messages.

    Raises:
        UserError: a tensor is missing or has another shape, or the configuration makes no network.
    """
    try:  # on the meta device, where what these say of a network can only be the configuration's fault
        expected = expected_shapes(part, config)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{where}: the configuration of {part} makes no network: {_line(error)}") from error
    missing = [name for name in expected if name not in state]
    if missing:
        raise UserError(
            f"{where} is not whole: {len(missing)} tensors of {part} are missing, the first is {missing[0]}; "
            "get the file again, or one that has all of the model"
        )
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise UserError(
                f"{where}: {part}/{name} is {list(state[name].shape)}, the configuration says {list(shape)}; "
                "name the right one with --base FOLDER"
            )
    return [name for name in state if name not in expected]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
