"""The autoencoder's names: latent diffusion's own (`decoder.up.3.block.0...`) and diffusers'.

The decoder's levels are counted from the picture on in the original, from the latents on in diffusers. Attention is
made of 1x1 convolutions in the original and of linear layers in diffusers: `POINTWISE`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from latentgen.formats.original.unet_names import Pairs

OUTER = (
    ("encoder.conv_in", "encoder.conv_in"),
    ("encoder.norm_out", "encoder.conv_norm_out"),
    ("encoder.conv_out", "encoder.conv_out"),
    ("decoder.conv_in", "decoder.conv_in"),
    ("decoder.norm_out", "decoder.conv_norm_out"),
    ("decoder.conv_out", "decoder.conv_out"),
    ("quant_conv", "quant_conv"),
    ("post_quant_conv", "post_quant_conv"),
)
RESNET = (*((name, name) for name in ("norm1", "conv1", "norm2", "conv2")), ("nin_shortcut", "conv_shortcut"))
ATTENTION = (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))
FORMER = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
"""Names that diffusers gave to the attention before version 0.17, and its names now; still in many folders."""

POINTWISE = re.compile(r"(encoder|decoder)\.mid_block\.attentions\.0\.to_(q|k|v|out\.0)\.weight")
"""In diffusers' names, the weights that are [d, d] there and [d, d, 1, 1] in the original."""

TINY_SIDES = (("taesd_encoder.", "encoder.layers.", 0), ("taesd_decoder.", "decoder.layers.", 1))
"""AutoencoderTiny: the original's beginning, diffusers', and by how much the original's numbers are greater."""


def vae_pairs(levels: int, layers: int) -> Pairs:
    """Every module of an AutoencoderKL under both names, as beginnings of the names of its tensors.

    Args:
        levels: of widths.
        layers: residual blocks of a level of the decoder, which has more of them than the encoder.
    """
    pairs: Pairs = list(OUTER)
    for level in range(levels):
        back = levels - 1 - level
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{level}"
        for layer in range(layers):
            pairs += _below(RESNET, f"encoder.down.{level}.block.{layer}", f"{down}.resnets.{layer}")
            pairs += _below(RESNET, f"decoder.up.{back}.block.{layer}", f"{up}.resnets.{layer}")
        pairs.append((f"encoder.down.{level}.downsample.conv", f"{down}.downsamplers.0.conv"))
        pairs.append((f"decoder.up.{back}.upsample.conv", f"{up}.upsamplers.0.conv"))
    for side in ("encoder", "decoder"):
        for block in range(2):
            pairs += _below(RESNET, f"{side}.mid.block_{block + 1}", f"{side}.mid_block.resnets.{block}")
        pairs += _below(ATTENTION, f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0")
    return pairs


def _below(table: Iterable[tuple[str, str]], original: str, diffusers: str) -> Pairs:
    return [(f"{original}.{theirs}", f"{diffusers}.{ours}") for theirs, ours in table]


def vae_size_of_original(names: Iterable[str]) -> tuple[int, int]:
    """Levels, and residual blocks of a level of the decoder, from names as `decoder.up.3.block.0.norm1.weight`."""
    return _size(names, r"decoder\.up\.(\d+)\.block\.(\d+)\.")


def vae_size_of_diffusers(names: Iterable[str]) -> tuple[int, int]:
    """The same from names as `decoder.up_blocks.0.resnets.0.norm1.weight`."""
    return _size(names, r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.")


def _size(names: Iterable[str], pattern: str) -> tuple[int, int]:
    found = [match for name in names if (match := re.match(pattern, name))]
    return max((int(m[1]) + 1 for m in found), default=0), max((int(m[2]) + 1 for m in found), default=0)


def renamed_former(name: str) -> str:
    """An autoencoder's tensor under diffusers' present name."""
    for former, present in FORMER:
        name = name.replace(f"mid_block.attentions.0.{former}.", f"mid_block.attentions.0.{present}.")
    return name
