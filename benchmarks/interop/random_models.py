"""Random models of published shapes, by which other programs recognise a family; and random adapters for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from latentgen.diffusion.noise_tables import NoiseTable
from latentgen.formats.lora.families import TEXTS, UNETS
from latentgen.formats.lora.file import LoraFile
from latentgen.formats.model import Model
from latentgen.formats.single_file.vocabulary import clip_tokenizer
from latentgen.models.adapters import AdapterSpec, adaptable, targets_of
from latentgen.models.deltas import Factors, scaled
from latentgen.models.text import Tower

VEGA: Mapping[str, Any] = {
    "transformer_layers_per_block": [1, [1, 1], [2, 2]],
    "reverse_transformer_layers_per_block": [[2, 2, 2], 1, 1],
    "mid_block_type": "UNetMidBlock2D",
}
SHAPES: Mapping[str, tuple[str, Mapping[str, Any]]] = {"sd1": ("sd1", {}), "vega": ("sdxl", VEGA)}
"""Family, and where a U-Net differs from its: Stable Diffusion 1.x; Segmind Vega, the smallest of SDXL's kin."""

RANK = 4
TEXT_STRENGTH, PICTURE_SPREAD = 10.0, 0.5
"""Factor on what a fresh cross-attention adds, which is too little to see; standard deviation of pictures (-1 to 1)."""


@torch.no_grad()
def random_model(name: str) -> Model:
    """A model of `SHAPES` with random weights, in fp32.

    The last layers are scaled so that what the U-Net predicts has the spread of noise, and a picture fills its range:
    else pictures would be grey whatever the prompt, and two programs could hardly disagree.
    """
    torch.manual_seed(0)
    family, other = SHAPES[name]
    unet = UNet2DConditionModel(sample_size=64, **{**UNETS[family], **other}).eval()
    towers = [
        _tower(part, shape, second=part == "text_encoder_2", padded="!" if part == "text_encoder_2" else None)
        for part, shape in TEXTS[family].items()
    ]
    vae = _vae(0.13025 if family == "sdxl" else 0.18215)
    for path, module in unet.named_modules():
        if path.endswith("attn2.to_out.0"):
            _scale(module, TEXT_STRENGTH)
    model = Model(
        vae=vae,
        towers=tuple(towers),
        unet=unet,
        prediction="eps",
        schedule=asdict(NoiseTable()),
        zero_empty=family == "sdxl",
    )
    context = model.encode(["a red circle"])
    if model.sizes:
        context = context._replace(sizes=torch.tensor([[64.0, 64, 0, 0, 64, 64]]))
    _scale(unet.conv_out, 1 / float(unet(torch.randn(1, 4, 8, 8), 500, **context.inputs())[0].std()))
    pictures = vae.decode(torch.randn(1, 4, 8, 8) / vae.config["scaling_factor"])[0]
    _scale(vae.decoder.conv_out, PICTURE_SPREAD / float(pictures.std()))
    return model


def _tower(name: str, shape: Mapping[str, Any], *, second: bool, padded: str | None) -> Tower:
    config = CLIPTextConfig(
        hidden_act="gelu" if second else "quick_gelu", bos_token_id=49406, eos_token_id=49407, **shape
    )
    encoder = CLIPTextModelWithProjection(config) if second else CLIPTextModel(config)
    return Tower(name, encoder.eval(), clip_tokenizer() if padded is None else clip_tokenizer(padded))


def _vae(scaling_factor: float) -> AutoencoderKL:
    config: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "sample_size": 512,
    }
    return AutoencoderKL(**config, scaling_factor=scaling_factor).eval()


def _scale(layer: Any, factor: float) -> None:
    layer.weight.mul_(factor)
    layer.bias.mul_(factor)


def random_lora(networks: Mapping[str, nn.Module], kind: str, targets: tuple[str, ...], strength: float) -> LoraFile:
    """Adapters for `networks`, which stay as they are.

    Args:
        kind: "lora", "dora", "loha" or "lokr".
        targets: as of `AdapterSpec`.
        strength: standard deviation of the change to a weight.
    """
    generator, alpha = torch.Generator().manual_seed(1), torch.tensor(RANK / 2)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def factors(weight: Tensor) -> Factors:
        o, i = weight.shape[:2]
        if kind == "loha":
            tensors = {"w1_a": drawn(o, RANK), "w1_b": drawn(RANK, i), "w2_a": drawn(o, RANK), "w2_b": drawn(RANK, i)}
            return scaled(Factors("loha", tensors, alpha), 2 * strength / RANK)
        if kind == "lokr":
            tensors = {"w1": drawn(4, 4), "w2_a": drawn(o // 4, RANK), "w2_b": drawn(RANK, i // 4)}
            return scaled(Factors("lokr", tensors, alpha), 2 * strength / RANK**0.5)
        made = scaled(Factors("lora", {"down": drawn(RANK, i), "up": drawn(o, RANK)}, alpha), 2 * strength / RANK**0.5)
        if kind == "lora":
            return made
        length = weight.detach().float().flatten(1).norm(dim=1).reshape(o, *[1] * (weight.dim() - 1))
        return replace(made, magnitude=length * (1 + 0.1 * drawn(*length.shape)))

    paths = targets_of(networks, AdapterSpec(targets=targets))
    return LoraFile(
        modules={
            name: {path: factors(adaptable(network)[path].weight) for path in paths[name]}
            for name, network in networks.items()
        }
    )
