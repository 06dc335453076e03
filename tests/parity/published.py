"""Tiny random models with the structure of published ones, for files whose tensors alone must tell what they are.

Each has its model's levels, layers, places of attention and conditions, CLIP's whole vocabulary, and the smallest
widths that its family's rules allow: groups of 32, heads as the family has them. `tiny` has smaller ones. Loaded by the
tests of many folders.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers import pipelines as diffusers_pipelines
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from latentgen.formats.single_file.vocabulary import clip_tokenizer

WIDTH, WIDTH_2 = 64, 128
"""Of the text encoders' states. diffusers tells SDXL's two towers in a single file apart by their widths."""

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"

SD1_UNET = {
    "block_out_channels": (32, 64, 64, 64),
    "down_block_types": (CROSS, CROSS, CROSS, PLAIN),
    "attention_head_dim": 8,
    "cross_attention_dim": WIDTH,
}
SD2_UNET = {
    **SD1_UNET,
    "block_out_channels": (64, 64, 128, 128),
    "attention_head_dim": (1, 1, 2, 2),
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL_UNET = {
    "block_out_channels": (64, 64, 128),
    "down_block_types": (PLAIN, CROSS, CROSS),
    "attention_head_dim": (1, 1, 2),
    "transformer_layers_per_block": (1, 2, 3),
    "cross_attention_dim": WIDTH + WIDTH_2,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": WIDTH_2 + 6 * 8,
}

UNETS: dict[str, dict[str, Any]] = {
    "sd1": SD1_UNET,
    "sd1-inpaint": {**SD1_UNET, "in_channels": 9},
    "sd1-pix2pix": {**SD1_UNET, "in_channels": 8},
    "sd1-three-levels": {
        **SD1_UNET,
        "block_out_channels": (32, 64, 64),
        "down_block_types": (CROSS, PLAIN, CROSS),
        "layers_per_block": 1,
    },
    "bk-sdm-base": {**SD1_UNET, "layers_per_block": 1},
    "bk-sdm-small": {**SD1_UNET, "layers_per_block": 1, "mid_block_type": None},
    "bk-sdm-tiny": {
        **SD1_UNET,
        "block_out_channels": (32, 64, 64),
        "down_block_types": (CROSS, CROSS, CROSS),
        "layers_per_block": 1,
        "mid_block_type": None,
    },
    "sd2": SD2_UNET,
    "sd2-v": SD2_UNET,
    "sd2-inpaint": {**SD2_UNET, "in_channels": 9},
    "sdxl": SDXL_UNET,
    "sdxl-v": SDXL_UNET,
    "sdxl-inpaint": {**SDXL_UNET, "in_channels": 9},
    "sdxl-refiner": {
        **SDXL_UNET,
        "block_out_channels": (64, 64, 128, 128),
        "down_block_types": (PLAIN, CROSS, CROSS, PLAIN),
        "attention_head_dim": (1, 1, 2, 2),
        "transformer_layers_per_block": 2,
        "cross_attention_dim": WIDTH_2,
        "projection_class_embeddings_input_dim": WIDTH_2 + 5 * 8,
    },
    "ssd-1b": {
        **SDXL_UNET,
        "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "vega": {
        **SDXL_UNET,
        "transformer_layers_per_block": [1, [1, 1], [2, 2]],
        "reverse_transformer_layers_per_block": [[2, 2, 2], 1, 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "koala": {**SDXL_UNET, "layers_per_block": 1, "transformer_layers_per_block": (1, 2, 5), "mid_block_type": None},
}
"""Configurations of the U-Nets, by model."""

PIPELINES = {
    "sd1-inpaint": "StableDiffusionInpaintPipeline",
    "sd1-pix2pix": "StableDiffusionInstructPix2PixPipeline",
    "sd2-inpaint": "StableDiffusionInpaintPipeline",
    "sdxl-inpaint": "StableDiffusionXLInpaintPipeline",
    "sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
}


def family(name: str) -> str:
    """Whose layout a model has."""
    if name == "sdxl-refiner":
        return name
    if "addition_embed_type" in UNETS[name]:
        return "sdxl"
    return "sd2" if UNETS[name].get("use_linear_projection") else "sd1"


def prediction(name: str) -> str:
    return "v" if name.endswith("-v") else "eps"


def unet(name: str) -> UNet2DConditionModel:
    config = UNETS[name]
    ups = [kind.replace("Down", "Up") for kind in reversed(config["down_block_types"])]
    torch.manual_seed(1)
    return random(UNet2DConditionModel(sample_size=8, up_block_types=tuple(ups), **config))


def vae(scaling_factor: float = 0.18215) -> AutoencoderKL:
    torch.manual_seed(2)
    blocks: Any = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (32, 64),
    }
    return random(AutoencoderKL(**blocks, layers_per_block=1, sample_size=16, scaling_factor=scaling_factor))


def text(act: str, layers: int = 2, projection: bool = False) -> Any:
    width = WIDTH_2 if projection else WIDTH
    torch.manual_seed(3)
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        projection_dim=width,
        hidden_act=act,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    return random((CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


def random(network: Any) -> Any:
    """Away from the initial values, under which a swapped or a lost tensor could hide."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def make(name: str) -> DiffusionPipeline:
    """A whole pipeline of a model of `UNETS`."""
    kind = family(name)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="trailing",
        prediction_type={"v": "v_prediction", "eps": "epsilon"}[prediction(name)],
    )
    parts: dict[str, Any] = {
        "unet": unet(name),
        "vae": vae(0.13025 if kind.startswith("sdxl") else 0.18215),
        "scheduler": scheduler,
    }
    if kind.startswith("sdxl"):
        first = kind == "sdxl"
        parts |= {
            "text_encoder": text("quick_gelu") if first else None,
            "tokenizer": clip_tokenizer() if first else None,
            "text_encoder_2": text("gelu", layers=3, projection=True),
            "tokenizer_2": clip_tokenizer("!"),
        }
        usual = "StableDiffusionXLPipeline"
    else:
        parts |= {
            "text_encoder": text("quick_gelu" if kind == "sd1" else "gelu"),
            "tokenizer": clip_tokenizer("!" if kind == "sd2" else "<|endoftext|>"),
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
        usual = "StableDiffusionPipeline"
    if name == "sdxl-refiner":
        parts |= {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
    pipeline = getattr(diffusers_pipelines, PIPELINES.get(name, usual))(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@functools.cache
def saved(name: str) -> Path:
    """The folder that diffusers writes of `make(name)`: made once a process; not to be changed."""
    folder = Path(_scratch()) / name
    make(name).save_pretrained(folder)
    return folder


@functools.cache
def _scratch() -> str:
    folder = tempfile.mkdtemp(prefix="latentgen-tiny-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
