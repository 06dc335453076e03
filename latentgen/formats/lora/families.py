"""The families of models that LoRA files are made for, known by the names and shapes of their modules.

Networks of full size are built without memory (on the meta device), so that a file can be understood with no model at
hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from latentgen.formats.lora.keys import Shapes, assembled, flaw, grouped, recognised, spelled
from latentgen.formats.original.layouts import TITLES
from latentgen.models.adapters import adaptable
from latentgen.models.deltas import Factors, fits

_LEVELS = ("DownBlock2D", "CrossAttnDownBlock2D")
_XL: Mapping[str, Any] = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
}
UNETS: Mapping[str, Mapping[str, Any]] = {
    "sd1": {"cross_attention_dim": 768},
    "sd2": {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        **_XL,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": (_LEVELS[0], _LEVELS[1], _LEVELS[1]),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "projection_class_embeddings_input_dim": 2816,
    },
    "sdxl-refiner": {
        **_XL,
        "block_out_channels": (384, 768, 1536, 1536),
        "down_block_types": (_LEVELS[0], _LEVELS[1], _LEVELS[1], _LEVELS[0]),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": 4,
        "attention_head_dim": (6, 12, 24, 24),
        "cross_attention_dim": 1280,
        "projection_class_embeddings_input_dim": 2560,
    },
}
"""What differs from the defaults of UNet2DConditionModel, which has Stable Diffusion 1's widths (config.json)."""

_CLIP_L: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
_CLIP_H: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
}
_CLIP_G: Mapping[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
TEXTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "sd1": {"text_encoder": _CLIP_L},
    "sd2": {"text_encoder": _CLIP_H},
    "sdxl": {"text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G},
    "sdxl-refiner": {"text_encoder_2": _CLIP_G},
}


@lru_cache
def family_shapes(family: str) -> Shapes:
    """Modules and shapes of a family's networks; `family` is a key of UNETS."""
    with torch.device("meta"):
        networks: dict[str, nn.Module] = {"unet": UNet2DConditionModel(**UNETS[family])}
        for name, shape in TEXTS[family].items():
            kind = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
            networks[name] = kind(CLIPTextConfig(**shape))
    return shapes_of(networks)


def shapes_of(networks: Mapping[str, nn.Module]) -> Shapes:
    """What can be adapted in `networks`, which are called "unet", "text_encoder" and "text_encoder_2"."""
    return {
        name: {path: module.weight.shape for path, module in adaptable(network).items()}
        for name, network in networks.items()
    }


def family_of(modules: Mapping[str, Mapping[str, Factors]]) -> str | None:
    """The family whose networks have most of these modules, by name and shape; None where none has any."""
    return _best({family: _fitting(modules, family_shapes(family)) for family in UNETS})


def family_of_tensors(tensors: Mapping[str, Tensor]) -> str | None:
    """The family that the tensors of a LoRA file fit best, in whatever layout; None where they fit none."""
    return _best({family: _fitting(_modules(tensors, family), family_shapes(family)) for family in UNETS})


def _best(scores: Mapping[str, int]) -> str | None:
    best = max(scores, key=lambda family: scores[family])
    return best if scores[best] else None


def _fitting(modules: Mapping[str, Mapping[str, Factors]], shapes: Shapes) -> int:
    return sum(
        path in shapes.get(network, {}) and fits(factors, shapes[network][path])
        for network, own in modules.items()
        for path, factors in own.items()
    )


def _modules(tensors: Mapping[str, Tensor], family: str) -> dict[str, dict[str, Factors]]:
    """What of a file can be understood as a LoRA of `family`, whether or not its shapes are the family's."""
    layout, slots = recognised(tensors, family_shapes(family))
    modules: dict[str, dict[str, Factors]] = {}
    for (network, module), keys in grouped(slots).items():
        if flaw(keys) is None:
            named = {name: tensors[key] for name, key in keys.items()}
            modules.setdefault(network, {})[module] = assembled(named, layout)
    return modules


def described(tensors: Mapping[str, Tensor]) -> str:
    """A LoRA file in words, for messages: its layout, family and size."""
    family, layout = family_of_tensors(tensors), spelled(tensors)
    kind = f"a LoRA in the {layout} layout" if layout else "no LoRA in a layout that is known"
    of = f" of {TITLES[family]}" if family is not None else ""
    example = f", such as {next(iter(tensors))}" if tensors else ""
    return f"it looks like {kind}{of} ({len(tensors)} keys{example})"
