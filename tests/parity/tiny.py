"""The smallest random models of every family that other tools know, as diffusers' own pipelines.

Their vocabulary is a few words, and they draw in an instant. `published` has models of which single files of other
programs tell all. Loaded by the tests of many folders.
"""

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
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from latentgen.models.text import train_tokenizer

CAPTIONS = ["a red circle", "a blue star above a green heart", "blurry, dark"] * 2
LENGTH = 12
DOWN, UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")


def tokenizer() -> CLIPTokenizer:
    return train_tokenizer(CAPTIONS, 560, LENGTH)


def text_config(words: CLIPTokenizer, width: int, act: str = "quick_gelu", projection: int = 24) -> CLIPTextConfig:
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
        cross_attention_dim=context,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        **{"down_block_types": DOWN, "up_block_types": UP, **more},
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
        text_encoder_2=CLIPTextModelWithProjection(text_config(words, 64, "gelu")),
        tokenizer_2=words,
        unet=unet(
            64 if refiner else 96,
            channels,
            down_block_types=DOWN[::-1],
            up_block_types=UP[::-1],
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


BASES = ("sd1", "sd2-v", "sdxl")
"""Those that draw from a text alone."""


def make(family: str) -> Any:
    """A pipeline of one of `FAMILIES`; its weights are the same every time."""
    torch.manual_seed(0)
    pipeline = FAMILIES[family]()
    for network in pipeline.components.values():
        if isinstance(network, nn.Module):
            network.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def saved(family: str, folder: Path) -> Path:
    make(family).save_pretrained(folder)
    return folder


def networks(family: str) -> dict[str, Any]:
    """The networks of `make(family)` that are adapted to pictures and words, by diffusers' names."""
    parts = make(family).components
    return {name: parts[name] for name in ("unet", "text_encoder", "text_encoder_2") if parts.get(name) is not None}


def pipeline_of(family: str, own: dict[str, Any]) -> Any:
    """`make(family)` with these networks."""
    pipeline = make(family)
    pipeline.register_modules(**own)
    return pipeline


def added_to_time(unet: Any) -> dict[str, torch.Tensor] | None:
    """What SDXL's U-Nets are told of two pictures beside their context; None for others."""
    if unet.config["addition_embed_type"] != "text_time":
        return None
    return {"text_embeds": torch.linspace(-1, 1, 48).reshape(2, 24), "time_ids": torch.ones(2, 6)}


def outputs(own: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What each network makes of a fixed random input."""
    generator = torch.Generator().manual_seed(3)
    made: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, network in own.items():
            if name == "unet":
                x = torch.randn(2, 4, 8, 8, generator=generator)
                context = torch.randn(2, LENGTH, network.config["cross_attention_dim"], generator=generator)
                time, added = torch.tensor([7, 400]), added_to_time(network)
                made[name] = network(x, time, context, added_cond_kwargs=added).sample
            else:
                ids = torch.randint(0, 30, (2, LENGTH), generator=generator)
                made[name] = network(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    return made


def tiny_autoencoder() -> AutoencoderTiny:
    torch.manual_seed(3)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
    ).eval()
