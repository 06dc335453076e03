"""diffusers opens the model folder and draws the same picture."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from latentgen.cli.sample import SHIPPED
from latentgen.formats.model_folder import load_model, save_model
from latentgen.models.autoencoder import factor
from latentgen.pipelines.generate import Request, generate, start_noise


@pytest.fixture(scope="module", params=["shipped", "trained", "v", "eps"])
def folder(request, model, tmp_path_factory):
    """The shipped model, a briefly trained one, and ones with larger random weights, in which the prompt has a say."""
    if request.param == "shipped":
        return SHIPPED
    if request.param == "trained":
        return model
    ours, path = load_model(model), tmp_path_factory.mktemp(request.param) / "model"
    torch.manual_seed(1)
    for name, parameter in ours.unet.named_parameters():
        parameter.data.add_((0.3 if "attn2" in name else 0.03) * torch.randn_like(parameter))
    save_model(dataclasses.replace(ours, prediction=request.param), path)
    return path


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
def test_stable_diffusion_pipeline_draws_our_picture(folder, model, guidance_scale, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

    ours = load_model(folder)
    request = Request(
        "a red circle above a blue square",
        negative_prompt="a star",
        seed=3,
        num_inference_steps=6,
        guidance_scale=guidance_scale,
        sampler="euler",
        chunks=1,  # as the pipeline, which cuts what is too long
    )
    (picture,) = generate(ours, [request])
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert isinstance(pipeline.scheduler, EulerDiscreteScheduler)
    pipeline.set_progress_bar_config(disable=True)
    other = pipeline(
        request.prompt,
        negative_prompt=request.negative_prompt,
        latents=start_noise(request, ours.vae.config["latent_channels"], factor(ours.vae)),
        num_inference_steps=request.num_inference_steps,
        guidance_scale=guidance_scale,
        height=64,
        width=64,
    ).images[0]
    mine, theirs = np.asarray(picture).astype(int), np.asarray(other).astype(int)
    assert mine.std() > 5, "a flat picture would prove nothing"
    assert abs(mine - theirs).max() <= 2
    if folder != model:
        (changed,) = generate(ours, [dataclasses.replace(request, prompt="two green stars")])
        assert abs(np.asarray(changed).astype(int) - mine).max() > 8, "the prompt must matter here"
