"""Tiny random networks in the shapes of Stable Diffusion 1, 2 and SDXL, and pipelines round them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from latentgen.models.text import train_tokenizer

DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")
UP = ("UpBlock2D", "CrossAttnUpBlock2D")
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {},
    "sd2": {"use_linear_projection": True, "attention_head_dim": (2, 4)},
    "sdxl": {
        "down_block_types": DOWN[::-1],
        "up_block_types": UP[::-1],
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
        "cross_attention_dim": 32,
    },
}
FAMILIES = tuple(UNETS)


def tiny_unet(family: str, **other: Any) -> UNet2DConditionModel:
    config: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 2,
        "down_block_types": DOWN,
        "up_block_types": UP,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**(config | UNETS[family] | other)).eval()


def tiny_text(kind: type, vocab: int, layers: int = 2) -> Any:
    config = CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=10,
        projection_dim=16,
        bos_token_id=vocab - 2,
        eos_token_id=vocab - 1,
        pad_token_id=vocab - 1,
    )
    return kind(config).eval()


def tiny_networks(family: str, seed: int = 0, vocab: int = 40) -> dict[str, nn.Module]:
    """The networks of a family by diffusers' names; the second of two calls gives equal weights."""
    torch.manual_seed(seed)
    networks: dict[str, nn.Module] = {"unet": tiny_unet(family), "text_encoder": tiny_text(CLIPTextModel, vocab)}
    if family == "sdxl":
        networks["text_encoder_2"] = tiny_text(CLIPTextModelWithProjection, vocab, layers=3)
    return networks


def tiny_pipeline(family: str, networks: dict[str, nn.Module] | None = None) -> Any:
    """A diffusers pipeline of the family, round `networks` or new ones."""
    tokenizer = train_tokenizer(["a red circle", "a blue star"] * 2, 560, 10)
    networks = networks or tiny_networks(family, vocab=len(tokenizer))
    torch.manual_seed(1)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8).eval()
    parts: dict[str, Any] = {"vae": vae, "tokenizer": tokenizer, "scheduler": DDIMScheduler(), **networks}
    if family == "sdxl":
        return StableDiffusionXLPipeline(tokenizer_2=tokenizer, **parts)
    return StableDiffusionPipeline(
        safety_checker=None, feature_extractor=None, requires_safety_checker=False, image_encoder=None, **parts
    )


def outputs(networks: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What each network makes of a fixed random input."""
    generator = torch.Generator().manual_seed(3)
    made: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, network in networks.items():
            if name == "unet":
                x = torch.randn(2, 4, 8, 8, generator=generator)
                context = torch.randn(2, 10, network.config["cross_attention_dim"], generator=generator)
                added = None
                if network.config["addition_embed_type"] == "text_time":
                    added = {"text_embeds": torch.randn(2, 16, generator=generator), "time_ids": torch.ones(2, 6)}
                made[name] = network(x, torch.tensor([7, 400]), context, added_cond_kwargs=added).sample
            else:
                ids = torch.randint(0, 30, (2, 10), generator=generator)
                made[name] = network(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    return made
