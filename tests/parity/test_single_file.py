"""Our single files open in diffusers, and our table of names is diffusers' own at the published models' sizes."""

from __future__ import annotations

from typing import Any

import published
import pytest
import torch
from diffusers import pipelines as diffusers_pipelines
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

from latentgen.formats.folder_parts import parts_of_folder, write_folder_from
from latentgen.formats.model_folder import quiet_libraries
from latentgen.formats.original.renaming import original_names
from latentgen.formats.part_check import expected_shapes
from latentgen.formats.parts import canonical
from latentgen.formats.single_file.read import read_single_file
from latentgen.formats.single_file.write import write_single_file

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
FOUR = {"block_out_channels": (320, 640, 1280, 1280), "down_block_types": (CROSS, CROSS, CROSS, PLAIN)}
XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": (PLAIN, CROSS, CROSS),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
REAL: dict[str, tuple[dict[str, Any], int]] = {
    "stable-diffusion-v1-5": ({**FOUR, "attention_head_dim": 8, "cross_attention_dim": 768}, 686),
    "stable-diffusion-2-1": (
        {**FOUR, "attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True},
        686,
    ),
    "stable-diffusion-xl-base-1.0": ({**XL, "transformer_layers_per_block": (1, 2, 10)}, 1680),
    "stable-diffusion-xl-refiner-1.0": (
        {
            **XL,
            "block_out_channels": (384, 768, 1536, 1536),
            "down_block_types": (PLAIN, CROSS, CROSS, PLAIN),
            "attention_head_dim": (6, 12, 24, 24),
            "cross_attention_dim": 1280,
            "projection_class_embeddings_input_dim": 2560,
            "transformer_layers_per_block": 4,
        },
        1220,
    ),
    "SSD-1B": (
        {
            **XL,
            "transformer_layers_per_block": [1, [2, 2], [4, 4]],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
            "mid_block_type": "UNetMidBlock2D",
        },
        944,
    ),
}
"""U-Nets as their folders describe them, and how many tensors each has."""


def filled(config: dict[str, Any]) -> dict[str, Any]:
    ups = tuple(kind.replace("Down", "Up") for kind in reversed(config["down_block_types"]))
    return {"layers_per_block": 2, "up_block_types": ups, "class_embed_type": None, **config}


@pytest.mark.parametrize("name", REAL)
def test_published_unets_have_the_names_that_diffusers_expects(name: str) -> None:
    config, count = REAL[name]
    names = expected_shapes("unet", filled(config))
    theirs = original_names("unet", names)
    assert len(names) == count
    assert None not in theirs.values()
    assert len(set(theirs.values())) == count, "two tensors would have one name"
    marked = {f"model.diffusion_model.{original}": ours for ours, original in theirs.items()}
    converted = convert_ldm_unet_checkpoint(marked, filled(config))
    assert converted == {name: name for name in names}


def test_the_published_autoencoder_has_the_names_that_diffusers_expects() -> None:
    config = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
    }
    names = expected_shapes("vae", config)
    theirs = original_names("vae", names)
    assert len(names) == 248
    assert None not in theirs.values()
    tensors = {f"first_stage_model.{original}": torch.empty(names[ours]) for ours, original in theirs.items()}
    converted = convert_ldm_vae_checkpoint(tensors, config)
    assert {name: tuple(value.shape) for name, value in converted.items()} == names


@pytest.mark.parametrize("name", published.UNETS)
def test_diffusers_opens_our_file_with_equal_tensors(name: str, tmp_path) -> None:
    folder = published.saved(name)
    parts = parts_of_folder(folder)
    write_single_file(parts, tmp_path / "model.safetensors")
    kind = getattr(diffusers_pipelines, parts.pipeline["_class_name"])
    with quiet_libraries():
        pipeline = kind.from_single_file(tmp_path / "model.safetensors", config=str(folder), local_files_only=True)
    for part, state in parts.states.items():
        opened = canonical(part, getattr(pipeline, part).state_dict())
        assert opened.keys() == state.keys()
        for key, value in state.items():
            assert torch.equal(opened[key], value), f"{part}/{key}"


@pytest.mark.parametrize("name", ["sd1", "sd2-v", "sdxl-refiner", "ssd-1b"])
def test_an_imported_folder_draws_what_the_original_pipeline_drew(name: str, tmp_path) -> None:
    folder = published.saved(name)
    write_single_file(parts_of_folder(folder), tmp_path / "model.safetensors")
    write_folder_from(read_single_file(tmp_path / "model.safetensors"), tmp_path / "again")
    kind = type(published.make(name))
    pictures = []
    for place in (folder, tmp_path / "again"):
        with quiet_libraries():
            pipeline = kind.from_pretrained(place, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        start: dict[str, Any] = {"height": 16, "width": 16}
        if name == "sdxl-refiner":
            start = {"image": torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16), "strength": 0.9}
        generator = torch.Generator().manual_seed(1)
        pictures.append(
            pipeline("a red circle", num_inference_steps=3, generator=generator, output_type="np", **start).images
        )
    assert (pictures[0] == pictures[1]).all()
    assert pictures[0].std() > 0.01, "a flat picture would prove nothing"
