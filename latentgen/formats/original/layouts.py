"""Where the parts of a model lie in a single file: beginnings of names, for each family.

The layouts are those of the original programs: CompVis/stable-diffusion (1.x), Stability-AI/stablediffusion (2.x) and
Stability-AI/generative-models (SDXL).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple


class Place(NamedTuple):
    """Where a part lies.

    Attributes:
        prefix: of its names.
        kind: how what follows is named: one of the kinds of `renaming`, or "diffusers" where nothing is to be renamed.
    """

    prefix: str
    kind: str


UNET, VAE = Place("model.diffusion_model.", "unet"), Place("first_stage_model.", "vae")

LAYOUTS: Mapping[str, Mapping[str, Place]] = {
    "sd1": {"unet": UNET, "vae": VAE, "text_encoder": Place("cond_stage_model.transformer.", "clip")},
    "sd2": {"unet": UNET, "vae": VAE, "text_encoder": Place("cond_stage_model.model.", "open_clip")},
    "sdxl": {
        "unet": UNET,
        "vae": VAE,
        "text_encoder": Place("conditioner.embedders.0.transformer.", "clip"),
        "text_encoder_2": Place("conditioner.embedders.1.model.", "open_clip"),
    },
    "sdxl-refiner": {"unet": UNET, "vae": VAE, "text_encoder_2": Place("conditioner.embedders.0.model.", "open_clip")},
}
"""What is written, and most of what is read."""

TITLES: Mapping[str, str] = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "sdxl-refiner": "Stable Diffusion XL refiner",
}

UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "")
VAE_PREFIXES = ("first_stage_model.", "vae.", "")

EMA = "model_ema."
"""Where averaged weights lie, in the names of the U-Net without their dots."""

V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
"""Empty tensors by which ComfyUI and others know an SDXL model that predicts v, and one with zero terminal SNR."""

IGNORED = re.compile(
    r"(model_ema\.|loss\.|logvar$|betas$|alphas_cumprod|sqrt_|log_one_minus_|posterior_|lvlb_weights$|"
    r"scale_factor$|global_step$|denoiser\.|v_pred$|ztsnr$|sigmas$|state_dict$)"
    r"|.*(\.position_ids|logit_scale|\.attn_mask)$"
    r"|conditioner\.embedders\.0\.transformer\.text_projection\.weight$"
    r"|cond_stage_model\.(transformer\.)?text_projection(\.weight)?$"
)
"""Tensors that programs keep in their files and that no part of a model needs."""

OTHERS: Mapping[str, str] = {
    "joint_blocks.0.": "Stable Diffusion 3",
    "double_blocks.0.": "Flux",
    "double_stream_blocks.0.": "HiDream",
    "time_stack.": "Stable Video Diffusion",
    "time_mix_blocks.": "Stable Video Diffusion",
    "clip_txt_mapper.": "Stable Cascade",
    "edm_mean": "Playground v2.5",
    "edm_vpred.": "an SDXL model of the EDM process with v prediction",
    "motion_modules.": "AnimateDiff",
    "cc_projection.": "Stable Zero123",
    "label_emb.weight": "the Stable Diffusion upscaler",
    "noise_augmentor.": "Stable unCLIP",
}
"""Pieces of names by which models are known that are not supported, and what they are."""
