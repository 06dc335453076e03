"""Tiny random models of every family that other tools know, as diffusers' own pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from latentgen.models.text import train_tokenizer

CAPTIONS = ["a red circle", "a blue star above a green heart", "blurry, dark"] * 2
LENGTH = 12


def tokenizer() -> CLIPTokenizer:
    return train_tokenizer(CAPTIONS, 560, LENGTH)


def text_config(words: CLIPTokenizer, width: int, act: str = "quick_gelu", projection: int = 16) -> CLIPTextConfig:
    assert isinstance(words.eos_token_id, int)
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        hidden_act=act,
        projection_dim=projection,
        bos_token_id=len(words) - 2,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.eos_token_id,
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )


def unet(context: int, in_channels: int = 4, **more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=2,
        cross_attention_dim=context,
        norm_num_groups=4,
        **more,
    )


def scheduler(prediction: str = "epsilon") -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )


def small(
    kind: Any = StableDiffusionPipeline, *, prediction: str = "epsilon", channels: int = 4, two: bool = False
) -> Any:
    """Stable Diffusion 1 (8 heads in every level) or 2 (heads of one width, linear projections, another activation)."""
    words = tokenizer()
    own = {"attention_head_dim": (2, 4), "use_linear_projection": True} if two else {"attention_head_dim": 4}
    return kind(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(words, 32, "gelu" if two else "quick_gelu")),
        tokenizer=words,
        unet=unet(32, channels, **own),
        scheduler=scheduler(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def large(kind: Any = StableDiffusionXLPipeline, *, channels: int = 4, refiner: bool = False) -> Any:
    """SDXL, or its refiner, which has the second text encoder only and is told a score in place of a size."""
    words, more = tokenizer(), {}
    if kind is not StableDiffusionXLPipeline:
        more["requires_aesthetics_score"] = refiner
    return kind(
        vae=vae(),
        text_encoder=None if refiner else CLIPTextModel(text_config(words, 32)),
        tokenizer=None if refiner else words,
        text_encoder_2=CLIPTextModelWithProjection(text_config(words, 64, "gelu", 24)),
        tokenizer_2=words,
        unet=unet(
            64 if refiner else 96,
            channels,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 8 * (5 if refiner else 6),
        ),
        scheduler=scheduler(),
        **more,
        **({"add_watermarker": False}),
    )


FAMILIES = {
    "sd1": lambda: small(),
    "sd2-v": lambda: small(prediction="v_prediction", two=True),
    "sd1-inpaint": lambda: small(StableDiffusionInpaintPipeline, channels=9),
    "sd2-inpaint": lambda: small(StableDiffusionInpaintPipeline, channels=9, two=True),
    "sdxl": lambda: large(),
    "sdxl-inpaint": lambda: large(StableDiffusionXLInpaintPipeline, channels=9),
    "refiner": lambda: large(StableDiffusionXLImg2ImgPipeline, refiner=True),
}


def make(family: str) -> Any:
    torch.manual_seed(0)
    pipeline = FAMILIES[family]()
    for name in ("unet", "text_encoder", "text_encoder_2", "vae"):
        network = pipeline.components.get(name)
        if network is not None:
            network.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def saved(family: str, folder: Path) -> Path:
    make(family).save_pretrained(folder)
    return folder


def tiny_autoencoder() -> AutoencoderTiny:
    torch.manual_seed(3)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
    ).eval()
