"""A whole model with tiny random weights, and the folder it is written to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from latentgen.diffusion.noise_tables import NoiseTable
from latentgen.formats.model import Model
from latentgen.formats.model_folder import save_model
from latentgen.models.autoencoder import build_autoencoder
from latentgen.models.clip import Clip, ClipShape, build_clip, to_transformers
from latentgen.models.text import Tower, train_tokenizer
from latentgen.models.unet import build_unet

CAPTIONS = ["a red circle above a blue square", "a blue star", "a green circle"] * 2


def make_clip(vocab_size: int) -> Clip:
    return build_clip(
        ClipShape(
            image_size=16,
            vision="vit",
            patch_size=8,
            vision_width=16,
            vision_layers=1,
            vision_heads=2,
            text_width=16,
            text_layers=1,
            text_heads=2,
            context_length=10,
            vocab_size=vocab_size,
            eos_token_id=vocab_size - 1,
            embed_dim=8,
        )
    )


def make_model(prediction: str = "eps", schedule: dict[str, Any] | None = None, **metadata: Any) -> Model:
    """Pictures of 16x16 pixels, latents [4, 4, 4], captions of 10 tokens."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, 560, 10)
    clip = make_clip(len(tokenizer))
    encoder = to_transformers(clip, bos_token_id=len(tokenizer) - 2, pad_token_id=len(tokenizer) - 1)
    if schedule is None:
        schedule = {"shift": 1.0} if prediction == "flow" else asdict(NoiseTable())
    return Model(
        vae=build_autoencoder(
            resolution=16,
            latent_channels=4,
            channels=(8, 8, 8),
            layers_per_block=1,
            norm_groups=4,
            mid_attention=False,
        ).eval(),
        towers=(Tower("text_encoder", encoder, tokenizer),),
        unet=build_unet(
            latent_size=4,
            latent_channels=4,
            channels=(8, 16),
            layers_per_block=1,
            attention=(False, True),
            heads=2,
            context_dim=16,
            norm_groups=4,
        ).eval(),
        prediction=prediction,
        schedule=schedule,
        metadata=metadata,
    )


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Model]:
    """Builder of tiny models: `tiny_model(prediction, schedule, **metadata)`."""
    return make_model


@pytest.fixture(scope="session")
def tiny_clip() -> Callable[[int], Clip]:
    """Builder of tiny contrastive towers: `tiny_clip(vocab_size)`."""
    return make_clip


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that tests may read but not change."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(make_model(), folder)
    return folder
