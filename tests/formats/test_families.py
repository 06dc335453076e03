"""What a file holds, by names and shapes alone."""

from __future__ import annotations

from typing import Any

import pytest

from latentgen.core.errors import UserError
from latentgen.formats.families import recognise
from latentgen.formats.headers import Entry, Header

LORA = {
    "kohya": ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight", "LoRA"),
    "diffusers": ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight", "LoRA"),
    "comfyui": ("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.lora_down.weight", "LoRA"),
    "peft": ("base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight", "LoRA"),
}


def header(shapes: dict[str, tuple[int, ...]], **metadata: str) -> Header:
    return Header({name: Entry(shape, "F16") for name, shape in shapes.items()}, metadata)


@pytest.mark.parametrize("layout", LORA)
@pytest.mark.parametrize(("width", "family"), [(768, "sd1"), (1024, "sd2"), (2048, "sdxl"), (1280, "sdxl-refiner")])
def test_loras_are_known_by_their_names_and_families_by_the_texts_width(layout: str, width: int, family: str) -> None:
    found = recognise(header({LORA[layout][0]: (16, width)}))
    assert (found.kind, found.layout, found.family) == ("lora", layout, family)
    assert (found.details["rank"], found.details["method"], found.details["modules"]) == (16, "LoRA", 1)


@pytest.mark.parametrize(
    ("names", "method"),
    [
        (["lora_unet_a.lora_down.weight", "lora_unet_a.dora_scale"], "DoRA"),
        (["lora_unet_a.hada_w1_a", "lora_unet_a.hada_w1_b"], "LoHa"),
        (["lora_unet_a.lokr_w1", "lora_unet_a.lokr_w2"], "LoKr"),
    ],
)
def test_kinds_of_small_changes(names: list[str], method: str) -> None:
    assert recognise(header(dict.fromkeys(names, (4, 4)))).details["method"] == method


@pytest.mark.parametrize(
    ("shapes", "layout", "family", "tokens"),
    [
        ({"emb_params": (3, 768)}, "emb_params", "sd1", 3),
        ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "clip_l, clip_g", "sdxl", 2),
        ({"<cat>": (1024,)}, "diffusers", "sd2", 1),
    ],
)
def test_learned_words(shapes: dict[str, Any], layout: str, family: str, tokens: int) -> None:
    found = recognise(header(shapes))
    assert (found.kind, found.layout, found.family, found.details["tokens"]) == ("embedding", layout, family, tokens)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("controlnet_cond_embedding.conv_in.weight", "diffusers"),
        ("control_model.input_hint_block.0.weight", "original"),
    ],
)
def test_controlnets(name: str, layout: str) -> None:
    found = recognise(header({name: (16, 3, 3, 3), "x.attn2.to_k.weight": (320, 768)}))
    assert (found.kind, found.layout, found.family) == ("controlnet", layout, "sd1")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("double_blocks.0.img_attn.qkv.weight", "Flux"),
        ("edm_mean", "Playground"),
        ("model.diffusion_model.label_emb.weight", "upscaler"),
    ],
)
def test_other_models_are_named(name: str, said: str) -> None:
    shapes = {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3), name: (4, 4)}
    with pytest.raises(UserError, match=said):
        recognise(header(shapes))


def test_text_towers_alone() -> None:
    clip = recognise(header({"text_model.embeddings.token_embedding.weight": (49408, 768)}))
    tower = recognise(header({"transformer.resblocks.0.attn.in_proj_weight": (3072, 1024), "visual.proj": (4, 4)}))
    assert (clip.kind, tower.kind) == ("clip", "clip")
    assert tower.parameters == {"text_encoder": 3072 * 1024}, "the image tower is not part of it"
