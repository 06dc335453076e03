"""The U-Net's names: Stable Diffusion's own (`input_blocks.4.1...`) and diffusers' (`down_blocks.1.attentions.0...`).

Both number the same modules. The original counts every block from the input on, downsampling included; diffusers counts
levels, and layers in them. Which is which follows from how many layers each level has, and that either set of names
tells: `structure_of_original`, `structure_of_diffusers`. One list of pairs, `unet_pairs`, then serves both directions.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from latentgen.core.errors import UserError

OUTER = (
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("label_emb.0.0", "add_embedding.linear_1"),
    ("label_emb.0.2", "add_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
)
RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
OURS = (
    "add_embedding.pool",
    "add_embedding.norm1",
    "add_embedding.proj",
    "add_embedding.norm2",
    "time_embedding.cond_proj",
)
"""Modules that the original lacks keep diffusers' names; programs that know the original only do not read them."""


@dataclass(frozen=True)
class Structure:
    """How the residual blocks of a U-Net are arranged.

    Attributes:
        down: for each level, finest first, the transformer layers after each of its residual blocks; 0 is no attention.
        up: the same on the way up, coarsest first.
        mid: transformer layers between the two residual blocks of the middle; 0: one residual block alone; None: no
            middle.
    """

    down: tuple[tuple[int, ...], ...]
    up: tuple[tuple[int, ...], ...]
    mid: int | None


Pairs = list[tuple[str, str]]
"""Beginnings of names: the original's, diffusers'."""


def structure_of_original(names: Iterable[str]) -> Structure:
    """From names as `input_blocks.1.0.in_layers.0.weight`.

    Raises:
        UserError: blocks are missing.
    """
    names = set(names)
    depths = _depths(names, r"(input_blocks\.\d+|output_blocks\.\d+|middle_block)\.1\.transformer_blocks\.(\d+)\.")
    down: list[list[int]] = [[]]
    for i in range(1, _count(names, "input_blocks")):
        if f"input_blocks.{i}.0.op.weight" in names:
            down.append([])
        else:
            down[-1].append(depths[f"input_blocks.{i}"])
    up: list[list[int]] = [[]]
    count = _count(names, "output_blocks")
    for i in range(count):
        up[-1].append(depths[f"output_blocks.{i}"])
        if {f"output_blocks.{i}.1.conv.weight", f"output_blocks.{i}.2.conv.weight"} & names and i + 1 < count:
            up.append([])
    single = "middle_block.0.in_layers.0.weight" in names
    return _whole(down, up, depths["middle_block"] if single else None)


def structure_of_diffusers(names: Iterable[str]) -> Structure:
    """From names as `down_blocks.0.resnets.0.norm1.weight`, of tensors or of modules.

    Raises:
        UserError: blocks are missing.
    """
    names = set(names)
    place = r"(down_blocks\.\d+\.attentions\.\d+|up_blocks\.\d+\.attentions\.\d+|mid_block\.attentions\.0)"
    depths = _depths(names, place + r"\.transformer_blocks\.(\d+)\.")
    sides: dict[str, list[list[int]]] = {}
    for side in ("down_blocks", "up_blocks"):
        sides[side] = [
            [depths[f"{side}.{level}.attentions.{layer}"] for layer in range(_count(names, f"{side}.{level}.resnets"))]
            for level in range(_count(names, side))
        ]
    single = any(name.startswith("mid_block.resnets.0.") for name in names)
    return _whole(sides["down_blocks"], sides["up_blocks"], depths["mid_block.attentions.0"] if single else None)


def _depths(names: Iterable[str], pattern: str) -> defaultdict[str, int]:
    """For each place, the number of transformer layers there; 0 elsewhere."""
    depths: defaultdict[str, int] = defaultdict(int)
    for name in names:
        if found := re.match(pattern, name):
            depths[found[1]] = max(depths[found[1]], int(found[2]) + 1)
    return depths


def _count(names: Iterable[str], start: str) -> int:
    """One more than the highest number that follows `start`."""
    found = (re.match(rf"{re.escape(start)}\.(\d+)\.", name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _whole(down: list[list[int]], up: list[list[int]], mid: int | None) -> Structure:
    fitting = len(down) == len(up) and all(
        level and len(back) == len(level) + 1 for level, back in zip(down, reversed(up), strict=True)
    )
    if not fitting:
        raise UserError(
            f"the U-Net is not whole: its levels have {[len(level) for level in down]} blocks on the way down and "
            f"{[len(level) for level in up]} on the way up; get the file again"
        )
    return Structure(tuple(map(tuple, down)), tuple(map(tuple, up)), mid)


def unet_pairs(structure: Structure) -> Pairs:
    """Every module of the U-Net under both names, as beginnings of the names of its tensors."""
    pairs: Pairs = [*OUTER, *((name, name) for name in OURS)]
    index = 0
    for level, layers in enumerate(structure.down):
        for layer, depth in enumerate(layers):
            index += 1
            pairs += _block(f"input_blocks.{index}", f"down_blocks.{level}", layer, depth)
        if level + 1 < len(structure.down):
            index += 1
            pairs.append((f"input_blocks.{index}.0.op", f"down_blocks.{level}.downsamplers.0.conv"))
    if structure.mid is not None:
        pairs += _block("middle_block", "mid_block", 0, structure.mid)
        if structure.mid:
            pairs += _residual("middle_block.2", "mid_block.resnets.1")
    index = 0
    for level, layers in enumerate(structure.up):
        for layer, depth in enumerate(layers):
            pairs += _block(f"output_blocks.{index}", f"up_blocks.{level}", layer, depth)
            if level + 1 < len(structure.up) and layer + 1 == len(layers):
                after = 2 if depth else 1
                pairs.append((f"output_blocks.{index}.{after}.conv", f"up_blocks.{level}.upsamplers.0.conv"))
            index += 1
    return pairs


def _block(original: str, diffusers: str, layer: int, depth: int) -> Pairs:
    attention = [(f"{original}.1", f"{diffusers}.attentions.{layer}")] if depth else []
    return _residual(f"{original}.0", f"{diffusers}.resnets.{layer}") + attention


def _residual(original: str, diffusers: str) -> Pairs:
    return [(f"{original}.{theirs}", f"{diffusers}.{ours}") for theirs, ours in RESNET]
