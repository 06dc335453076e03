"""The configuration of a network from the shapes of its tensors, under diffusers' and transformers' names.

Three things no shape tells. The number of attention heads and the groups of normalisation follow the family's rule;
where that does not divide the widths, the file itself or a folder has to say it. The factor of the latents is the
family's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentgen.core.errors import UserError
from latentgen.formats.original.unet_names import structure_of_diffusers
from latentgen.formats.original.vae_names import vae_size_of_diffusers

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of tensors by name."""

GROUPS = 32
"""Of every group normalisation in all families."""
VAE_HALVINGS = 8
CLIP_TOKENS = 49408


@dataclass(frozen=True)
class Rule:
    """What a family has that no shape tells.

    Attributes:
        heads: attention heads at every level of the U-Net; None: as many as make them `head_width` wide.
        head_width: channels of one head.
        side: of the pictures that it was trained on, in pixels.
        scaling_factor: of the latents.
        time_ids: numbers about size and crop that the U-Net is told.
    """

    heads: int | None
    side: int
    scaling_factor: float
    head_width: int = 64
    time_ids: int = 0


# Scaling factors make latents of unit variance over the training set: arXiv 2112.10752 (appendix G) and its released
# models, and the autoencoder of arXiv 2307.01952.
RULES: Mapping[str, Rule] = {
    "sd1": Rule(heads=8, side=512, scaling_factor=0.18215),
    "sd2": Rule(heads=None, side=512, scaling_factor=0.18215),
    "sdxl": Rule(heads=None, side=1024, scaling_factor=0.13025, time_ids=6),
    "sdxl-refiner": Rule(heads=None, side=1024, scaling_factor=0.13025, time_ids=5),
}


def unet_config(
    shapes: Shapes, family: str, pooled_width: int | None = None, side: int | None = None
) -> dict[str, Any]:
    """The configuration of a UNet2DConditionModel.

    Args:
        shapes: all of its tensors.
        family: one of `RULES`.
        pooled_width: of the text state that SDXL adds to the time embedding; None where the text encoder is unknown.
        side: of the training pictures in pixels; None is the family's.

    Raises:
        UserError: the tensors are not a whole U-Net, or the family's rule does not fit them.
    """
    rule, structure = RULES[family], structure_of_diffusers(shapes)
    if structure.mid is not None and structure.mid and structure.down[-1][0] not in (0, structure.mid):
        raise UserError(
            f"the U-Net's middle has {structure.mid} transformer layers and the level before it "
            f"{structure.down[-1][0]}; diffusers has no configuration for that"
        )
    widths = [shapes[f"down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(len(structure.down))]
    _require_divisible("unet", widths, GROUPS, "groups of normalisation")
    levels = [len(level) for level in structure.down]
    depths, back = _depths(structure.down, structure.up, structure.mid)
    context = {shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")}
    if len(context) != 1:
        raise UserError(f"the U-Net reads texts of {len(context)} widths; only one is supported")
    projections = {len(shape) for name, shape in shapes.items() if name.endswith(".proj_in.weight")}
    time = [shape[0] for name, shape in shapes.items() if name.endswith("resnets.0.time_emb_proj.weight")]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": (side or rule.side) // VAE_HALVINGS,
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D" if level[0] else "DownBlock2D" for level in structure.down],
        "up_block_types": ["CrossAttnUpBlock2D" if level[0] else "UpBlock2D" for level in structure.up],
        "mid_block_type": {None: None, 0: "UNetMidBlock2D"}.get(structure.mid, "UNetMidBlock2DCrossAttn"),
        "layers_per_block": levels[0] if len(set(levels)) == 1 else levels,
        "transformer_layers_per_block": depths,
        "reverse_transformer_layers_per_block": back,
        "cross_attention_dim": context.pop(),
        # The name is historical: it holds the number of heads, not their width.
        "attention_head_dim": _heads(widths, rule),
        "use_linear_projection": projections == {2},
        "upcast_attention": family == "sd2",
        "norm_num_groups": GROUPS,
        "resnet_time_scale_shift": "scale_shift" if max(time) == 2 * max(widths) else "default",
        **_conditioning(shapes, rule, pooled_width),
    }


def _heads(widths: list[int], rule: Rule) -> int | list[int]:
    if rule.heads is not None:
        _require_divisible("unet", widths, rule.heads, "attention heads")
        return rule.heads
    _require_divisible("unet", widths, rule.head_width, "channels of a head")
    return [width // rule.head_width for width in widths]


def _depths(down: Any, up: Any, mid: int | None) -> tuple[Any, Any]:
    """transformer_layers_per_block and its reverse, in as few words as say it."""
    every = {depth for level in (*down, *up) for depth in level if depth} | ({mid} if mid else set())
    if len(every) == 1:
        return every.pop(), None
    free = [mid or 1 if level == len(down) - 1 else 1 for level in range(len(down))]
    there = [_entry(level) or free[i] for i, level in enumerate(down)]
    again = [_entry(level) or 1 for level in up]
    same = all(
        isinstance(one, int) and (not level[0] or level == (one,) * len(level))
        for one, level in zip(reversed(there), up, strict=True)
    )
    return there, None if same else again


def _entry(level: tuple[int, ...]) -> Any:
    if 0 in level and any(level):
        raise UserError(f"a level of the U-Net attends after some of its blocks only ({list(level)}): not supported")
    return level[0] if len(set(level)) == 1 else list(level)


def _conditioning(shapes: Shapes, rule: Rule, pooled_width: int | None) -> dict[str, Any]:
    config: dict[str, Any] = {}
    if "time_embedding.cond_proj.weight" in shapes:
        config["time_cond_proj_dim"] = shapes["time_embedding.cond_proj.weight"][1]
    if "add_embedding.linear_1.weight" in shapes:
        width = shapes["add_embedding.linear_1.weight"][1]
        # Of the published models 256 numbers speak of each of the ids.
        each = 256 if pooled_width is None else (width - pooled_width) // max(rule.time_ids, 1)
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": each,
            "projection_class_embeddings_input_dim": width,
        }
    if "add_embedding.pool.positional_embedding" in shapes:
        config["addition_embed_type"] = "text"
    return config


def vae_config(shapes: Shapes, family: str | None, side: int | None = None) -> dict[str, Any]:
    """The configuration of an AutoencoderKL; `family` None is taken for Stable Diffusion 1.

    Raises:
        UserError: the tensors are not a whole autoencoder, or the family's rule does not fit them.
    """
    rule = RULES[family or "sd1"]
    levels, layers = vae_size_of_diffusers(shapes)
    if not levels:
        raise UserError("the autoencoder is not whole: its decoder has no levels; get the file again")
    widths = [shapes[f"decoder.up_blocks.{levels - 1 - level}.resnets.0.conv1.weight"][0] for level in range(levels)]
    _require_divisible("vae", widths, GROUPS, "groups of normalisation")
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": side or rule.side,
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": layers - 1,
        "norm_num_groups": GROUPS,
        "scaling_factor": rule.scaling_factor,
        "mid_block_add_attention": "decoder.mid_block.attentions.0.to_q.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def tiny_vae_config(shapes: Shapes) -> dict[str, Any]:
    """The configuration of an AutoencoderTiny: an encoder of convolutions, each followed by some blocks; a decoder.

    Raises:
        UserError: the tensors are not a whole AutoencoderTiny.
    """
    sides: dict[str, tuple[list[int], list[int]]] = {}
    last: dict[str, int] = {}
    for side in ("encoder", "decoder"):
        numbers = sorted({int(found[1]) for name in shapes if (found := re.match(rf"{side}\.layers\.(\d+)\.", name))})
        if not numbers:
            raise UserError(f"the AutoencoderTiny is not whole: it has no {side}; give both halves in one file")
        widths, blocks = [], []
        for number in numbers[:-1]:
            convolution = shapes.get(f"{side}.layers.{number}.weight")
            if convolution is None:
                blocks[-1] += 1
                continue
            widths.append(convolution[0])
            blocks.append(0)
        sides[side] = widths, blocks
        last[side] = shapes[f"{side}.layers.{numbers[-1]}.weight"][0]
    return {
        "_class_name": "AutoencoderTiny",
        "in_channels": shapes["encoder.layers.0.weight"][1],
        "out_channels": last["decoder"],
        "latent_channels": last["encoder"],
        "encoder_block_out_channels": sides["encoder"][0],
        "decoder_block_out_channels": sides["decoder"][0],
        "num_encoder_blocks": sides["encoder"][1],
        "num_decoder_blocks": sides["decoder"][1],
    }


def text_config(shapes: Shapes, *, quick_gelu: bool, clip_vocabulary: bool = True) -> dict[str, Any]:
    """The configuration of a CLIPTextModel, or of a CLIPTextModelWithProjection where the projection is there.

    Args:
        shapes: under the names `text_model....`.
        quick_gelu: OpenAI's activation, else the exact one, open_clip's.
        clip_vocabulary: the special tokens are CLIP's; else the last two of the vocabulary.

    Raises:
        UserError: the tensors are not a whole text tower, or heads of 64 channels do not fit it.
    """
    tokens, width = shapes["text_model.embeddings.token_embedding.weight"]
    layers = {found[1] for name in shapes if (found := re.match(r"text_model\.encoder\.layers\.(\d+)\.", name))}
    _require_divisible("text_encoder", [width], 64, "channels of a head")
    projection = shapes.get("text_projection.weight")
    return {
        "architectures": ["CLIPTextModelWithProjection" if projection else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": tokens,
        "hidden_size": width,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": width // 64,
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "projection_dim": projection[0] if projection else width,
        "hidden_act": "quick_gelu" if quick_gelu else "gelu",
        "bos_token_id": (CLIP_TOKENS if clip_vocabulary else tokens) - 2,
        "eos_token_id": (CLIP_TOKENS if clip_vocabulary else tokens) - 1,
        "dtype": "float32",
    }


def _require_divisible(part: str, widths: list[int], number: int, what: str) -> None:
    wrong = [width for width in widths if width % number]
    if wrong:
        raise UserError(
            f"{part}: {number} {what}, as this family has, do not fit widths {wrong}, and no tensor tells the right "
            "number; name a model folder of the same shape with --base FOLDER"
        )
