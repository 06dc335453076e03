"""What the modules of a U-Net and of CLIP's text towers are called elsewhere.

Everything is derived from the paths themselves, as `models.adapters.adaptable` gives them, so that networks of any
depth have their names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

LDM_OUTSIDE: Mapping[str, str] = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
LDM_RESNET: Mapping[str, str] = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
"""U-Net modules in diffusers and in the original code (CompVis latent-diffusion, openaimodel.py)."""

_UNIT = re.compile(r"((?:down|up)_blocks\.\d+|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def ldm_names(paths: Iterable[str]) -> dict[str, str]:
    """The original code's names of the U-Net modules `paths` (all of a U-Net's); modules that it lacks are left out.

    The original numbers its blocks through: a residual block with the attention after it is one, a downsampling is one
    of its own, an upsampling is the last part of the block before it.
    """
    paths = list(paths)
    units = {(match[1], match[2], match[3]) for path in paths if (match := _UNIT.fullmatch(path))}
    prefixes = _numbered(units)
    named: dict[str, str] = {}
    for path in paths:
        match = _UNIT.fullmatch(path)
        if match is None:
            if path in LDM_OUTSIDE:
                named[path] = LDM_OUTSIDE[path]
            continue
        block, kind, index, rest = match.groups()
        if kind == "resnets":
            rest = LDM_RESNET.get(rest, rest)
        elif kind == "downsamplers":
            rest = {"conv": "op"}.get(rest, rest)
        named[path] = f"{prefixes[block, kind, index]}.{rest}"
    return named


def _numbered(units: set[tuple[str, str, str]]) -> dict[tuple[str, str, str], str]:
    prefixes: dict[tuple[str, str, str], str] = {}
    for side, at in (("down", 1), ("up", 0)):
        blocks = sorted({int(block.split(".")[1]) for block, *_ in units if block.startswith(side)})
        for block in (f"{side}_blocks.{number}" for number in blocks):
            layers = sum((block, "resnets", index) in units for index in map(str, range(len(units))))
            for layer in map(str, range(layers)):
                stem = f"{'input' if side == 'down' else 'output'}_blocks.{at}"
                for place, kind in enumerate(("resnets", "attentions")):
                    prefixes[block, kind, layer] = f"{stem}.{place}"
                at += 1
            if (block, "downsamplers", "0") in units:
                prefixes[block, "downsamplers", "0"] = f"input_blocks.{at}.0"
                at += 1
            if (block, "upsamplers", "0") in units:
                attends = (block, "attentions", str(layers - 1)) in units
                prefixes[block, "upsamplers", "0"] = f"output_blocks.{at - 1}.{2 if attends else 1}"
    attends = ("mid_block", "attentions", "0") in units
    prefixes["mid_block", "resnets", "0"] = "middle_block.0"
    prefixes["mid_block", "attentions", "0"] = "middle_block.1"
    prefixes["mid_block", "resnets", "1"] = f"middle_block.{2 if attends else 1}"
    return prefixes


_ATTENTION = re.compile(r"(.+\.attn\d)\.to_(q|k|v|out)(?:\.0)?")
_SELF_ATTENTION = re.compile(r"(.+\.self_attn)\.(q|k|v|out)_proj")


def processor_names(path: str) -> tuple[str, ...]:
    """What attention's maps of the U-Net or of a text tower were called when processors held the adapters."""
    if match := _ATTENTION.fullmatch(path):
        above, part = match.groups()
        return f"{above}.processor.to_{part}", f"{above}.to_{part}"
    if match := _SELF_ATTENTION.fullmatch(path):
        above, part = match.groups()
        return (f"{above}.to_{part}",)
    return ()


def text_names(path: str) -> tuple[str, ...]:
    """A text tower's module in files, where layers are below `text_model.`; the first is the usual one."""
    return (path, f"text_model.{path}") if path == "text_projection" else (f"text_model.{path}", path)
