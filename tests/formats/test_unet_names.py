"""One table names the U-Net's modules both ways, whatever its shape."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentgen.core.errors import UserError
from latentgen.formats.original.renaming import diffusers_names, original_names
from latentgen.formats.original.unet_names import (
    RESNET,
    Structure,
    structure_of_diffusers,
    structure_of_original,
    unet_pairs,
)


@st.composite
def structures(draw: st.DrawFn) -> Structure:
    depth = st.integers(0, 3)
    counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    levels = [draw(st.booleans()) for _ in counts]

    def level(on: bool, count: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(1, 3)) if on else 0 for _ in range(count))

    down = tuple(level(on, count) for on, count in zip(levels, counts, strict=True))
    up = tuple(level(on, count + 1) for on, count in zip(reversed(levels), reversed(counts), strict=True))
    return Structure(down, up, draw(st.one_of(st.none(), depth)))


def tensors_of(structure: Structure) -> list[str]:
    """Diffusers' names of a U-Net's tensors, spelled out level by level without the table of pairs."""
    names = ["conv_in.weight", "conv_out.bias", "time_embedding.linear_1.weight"]

    def block(place: str, layer: int, depth: int) -> None:
        names.extend(f"{place}.resnets.{layer}.{ours}.weight" for _, ours in RESNET)
        for i in range(depth):
            names.append(f"{place}.attentions.{layer}.transformer_blocks.{i}.attn2.to_k.weight")
        if depth:
            names.append(f"{place}.attentions.{layer}.proj_in.weight")

    for side, levels, sampler in (
        ("down_blocks", structure.down, "downsamplers"),
        ("up_blocks", structure.up, "upsamplers"),
    ):
        for level, depths in enumerate(levels):
            for layer, depth in enumerate(depths):
                block(f"{side}.{level}", layer, depth)
            if level + 1 < len(levels):
                names.append(f"{side}.{level}.{sampler}.0.conv.weight")
    if structure.mid is not None:
        block("mid_block", 0, structure.mid)
        if structure.mid:
            names += [f"mid_block.resnets.1.{ours}.weight" for _, ours in RESNET]
    return names


@given(structures())
def test_every_name_has_one_of_the_other_kind_and_comes_back(structure: Structure) -> None:
    names = tensors_of(structure)
    assert structure_of_diffusers(names) == structure
    there = original_names("unet", names)
    assert None not in there.values()
    assert len(set(there.values())) == len(names)
    originals = [name for name in there.values() if name is not None]
    assert structure_of_original(originals) == structure
    assert diffusers_names("unet", originals) == {original: ours for ours, original in there.items()}


@given(structures())
def test_no_two_modules_share_a_name(structure: Structure) -> None:
    pairs = unet_pairs(structure)
    assert len({original for original, _ in pairs}) == len({ours for _, ours in pairs}) == len(pairs)


@pytest.mark.parametrize("gone", ["up_blocks.1.", "down_blocks.1."])
def test_a_unet_without_some_blocks_is_refused(gone: str) -> None:
    names = tensors_of(Structure(((1, 1), (0, 0)), ((0, 0, 0), (1, 1, 1)), 1))
    with pytest.raises(UserError, match="not whole"):
        structure_of_diffusers([name for name in names if not name.startswith(gone)])
    originals = original_names("unet", names)
    left = [original for ours, original in originals.items() if not ours.startswith(gone) and original]
    with pytest.raises(UserError, match="not whole"):
        structure_of_original(left)
