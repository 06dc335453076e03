from __future__ import annotations

import pytest

from latentgen.formats.lora.families import UNETS, family_shapes
from latentgen.formats.lora.layouts import LAYOUTS
from latentgen.formats.lora.names import ldm_names

# Read off the keys of the published checkpoints.
KNOWN = {
    "sd1": {
        "conv_in": "input_blocks.0.0",
        "down_blocks.0.resnets.1.conv1": "input_blocks.2.0.in_layers.2",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
        "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k":
            "input_blocks.8.1.transformer_blocks.0.attn2.to_k",
        "down_blocks.3.resnets.1.time_emb_proj": "input_blocks.11.0.emb_layers.1",
        "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
        "mid_block.attentions.0.proj_out": "middle_block.1.proj_out",
        "up_blocks.0.resnets.2.conv1": "output_blocks.2.0.in_layers.2",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
        "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj":
            "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj",
        "time_embedding.linear_2": "time_embed.2",
        "conv_out": "out.2",
    },
    "sdxl": {
        "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q":
            "input_blocks.4.1.transformer_blocks.1.attn1.to_q",
        "down_blocks.2.attentions.1.transformer_blocks.9.attn1.to_out.0":
            "input_blocks.8.1.transformer_blocks.9.attn1.to_out.0",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.2.resnets.2.conv_shortcut": "output_blocks.8.0.skip_connection",
        "add_embedding.linear_1": "label_emb.0.0",
    },
}  # fmt: skip


@pytest.mark.parametrize("family", KNOWN)
def test_names_of_the_original_code(family: str) -> None:
    names = ldm_names(family_shapes(family)["unet"])
    assert {path: names[path] for path in KNOWN[family]} == KNOWN[family]


@pytest.mark.parametrize("family", UNETS)
def test_every_module_has_a_name_of_its_own(family: str) -> None:
    paths = list(family_shapes(family)["unet"])
    names = ldm_names(paths)
    assert set(names) == set(paths)
    assert len(set(names.values())) == len(paths)


@pytest.mark.parametrize("family", UNETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_two_modules_share_a_spelling(family: str, layout: str) -> None:
    for network, modules in family_shapes(family).items():
        spelled = LAYOUTS[layout].names(network, list(modules))
        assert set(spelled) == set(modules)
        everything = [name for names in spelled.values() for name in dict.fromkeys(names)]
        assert len(set(everything)) == len(everything)
