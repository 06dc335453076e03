"""Model folders between latentgen and diffusers, both ways."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from latentgen.diffusion.noise_tables import NoiseTable
from latentgen.diffusion.parameterization import denoiser
from latentgen.diffusion.samplers import euler
from latentgen.diffusion.schedules import karras
from latentgen.formats.model_folder import load_model, save_model
from latentgen.formats.scheduler import parameterization, scheduler_config
from latentgen.models.autoencoder import decode
from latentgen.models.text import encode_text, train_tokenizer
from latentgen.pipelines.generate import Request, generate

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def foreign_pipeline(scheduler: Any) -> StableDiffusionPipeline:
    """A tiny Stable Diffusion made of the libraries' own classes and defaults."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a red circle", "a blue star"] * 2, 560, 10)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8, scaling_factor=0.3)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=10,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
    )
    return StableDiffusionPipeline(
        vae, text_encoder.eval(), tokenizer, unet.eval(), scheduler, None, None, requires_safety_checker=False
    )


def draw(pipeline: StableDiffusionPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a red circle",
        height=8,
        width=8,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(1),
        output_type="np",
    ).images


@pytest.mark.parametrize(
    ("scheduler", "prediction", "table"),
    [
        (PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1), "eps", NoiseTable()),
        (DDIMScheduler(**SD, prediction_type="v_prediction", steps_offset=1, clip_sample=False), "v", NoiseTable()),
        (
            DDIMScheduler(
                **SD, prediction_type="v_prediction", rescale_betas_zero_snr=True, steps_offset=1, clip_sample=False
            ),
            "v",
            NoiseTable(zero_terminal_snr=True),
        ),
        (
            EulerDiscreteScheduler(steps_offset=1, prediction_type="sample"),
            "x0",
            NoiseTable(kind="linear", beta_start=0.0001, beta_end=0.02),
        ),
        (
            DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=400, steps_offset=1),
            "eps",
            NoiseTable(kind="cosine", num_timesteps=400, beta_start=0.0001, beta_end=0.02),
        ),
    ],
    ids=["pndm", "ddim-v", "ddim-zero-snr", "euler-x0", "dpm-cosine"],
)
def test_folders_of_diffusers_open_here(scheduler: Any, prediction: str, table: NoiseTable, tmp_path: Path) -> None:
    pipeline = foreign_pipeline(scheduler)
    pipeline.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert (model.prediction, model.schedule, model.metadata) == (prediction, asdict(table), {})
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([5.0])
    with torch.no_grad():
        theirs = pipeline.encode_prompt("a red circle", "cpu", 1, do_classifier_free_guidance=False)[0]
        ours = encode_text(model.towers, ["a red circle"]).states
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(model.unet(x, t, ours).sample, pipeline.unet(x, t, theirs).sample)
        torch.testing.assert_close(decode(model.vae, x), pipeline.vae.decode(x / 0.3).sample)


def test_text_encoders_with_the_keys_of_older_versions_open(tmp_path: Path) -> None:
    foreign_pipeline(DDIMScheduler(**SD, steps_offset=1, clip_sample=False)).save_pretrained(tmp_path)
    weights = tmp_path / "text_encoder" / "model.safetensors"
    new = load_file(weights)
    save_file({f"text_model.{name}": tensor for name, tensor in new.items()}, weights, metadata={"format": "pt"})
    loaded = load_model(tmp_path).towers[0].encoder.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in new.items())


@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "flow", "edm"])
def test_our_folders_open_in_diffusers_without_a_warning(prediction: str, tmp_path: Path, caplog, recwarn) -> None:
    foreign_pipeline(PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1)).save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    object.__setattr__(model, "prediction", prediction)
    if prediction in ("flow", "edm"):
        object.__setattr__(model, "schedule", {"flow": {"shift": 1.0}, "edm": {"sigma_data": 0.8}}[prediction])
    save_model(model, tmp_path / "ours")
    recwarn.clear()
    with caplog.at_level(logging.WARNING):
        pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "ours")
        pictures = draw(pipeline)
    assert not caplog.records
    assert not [w for w in recwarn if issubclass(w.category, FutureWarning | UserWarning)]
    assert pipeline.safety_checker is None
    assert pictures.shape == (1, 8, 8, 3)
    assert np.isfinite(pictures).all()
    by_hand = foreign_pipeline(type(pipeline.scheduler).from_config(scheduler_config(prediction, model.schedule)))
    assert np.array_equal(draw(by_hand), pictures), "same weights, ids and scheduler: the same picture"


@pytest.mark.parametrize(
    "table",
    [
        NoiseTable(),
        NoiseTable(kind="linear", num_timesteps=200),
        NoiseTable(kind="cosine"),
        NoiseTable(zero_terminal_snr=True),
        NoiseTable(kind="sigmoid"),
        NoiseTable(kind="sigmoid", zero_terminal_snr=True),
        NoiseTable(kind="sigmoid_alpha_bar"),
    ],
    ids=str,
)
def test_exported_noise_levels_are_ours(table: NoiseTable) -> None:
    scheduler = EulerDiscreteScheduler.from_config(scheduler_config("v", asdict(table)))
    theirs = scheduler.sigmas[:-1].flip(0).double()
    torch.testing.assert_close(theirs, table.sigmas, rtol=2e-4, atol=1e-6)


def test_exported_edm_is_ours() -> None:
    """The same noise levels, times and preconditioning, so the same picture as with our Euler sampler."""
    process = {"sigma_data": 0.7, "sigma_min": 0.01, "sigma_max": 40.0}
    scheduler = EDMEulerScheduler.from_config(scheduler_config("edm", process))
    scheduler.set_timesteps(7)
    p, noise = parameterization("edm", process), torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))

    def network(x: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.roll(1, dims=-1)) * torch.cos(c_noise.reshape(-1, 1, 1, 1))

    sigmas = karras(7, p)
    torch.testing.assert_close(scheduler.sigmas, sigmas, rtol=1e-5, atol=0)
    x = noise * sigmas[0]
    expected = euler(denoiser(p, network), x, sigmas)
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t.expand(2)), t, x).prev_sample
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def test_a_learned_variance_is_split_off_by_diffusers(tmp_path: Path) -> None:
    pipeline = foreign_pipeline(PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1))
    torch.manual_seed(0)
    pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, out_channels=8).eval()
    pipeline.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    assert model.learned_variance
    save_model(model, tmp_path / "ours")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert isinstance(again.scheduler, DDPMScheduler)
    assert np.isfinite(draw(again)).all()
    request = Request("a red circle", num_inference_steps=2, height=8, width=8)
    assert np.asarray(next(generate(load_model(tmp_path / "ours"), [request]))).shape == (8, 8, 3)


@pytest.mark.parametrize(("prediction", "process"), [("ve", {}), ("edm", {"augmented_dim": 64.0})])
def test_processes_unknown_to_diffusers_are_refused_there(prediction: str, process: dict, tmp_path: Path) -> None:
    """Better than the wrong pictures of a scheduler that is nearly right."""
    foreign_pipeline(PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1)).save_pretrained(tmp_path / "theirs")
    model = dataclasses.replace(load_model(tmp_path / "theirs"), prediction=prediction, schedule=process)
    save_model(model, tmp_path / "ours")
    with pytest.raises(ValueError, match="`latentgen` has no class `Latentgen"):
        StableDiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert load_model(tmp_path / "ours").parameterization() == parameterization(prediction, process)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_exported_flow_means_noise_minus_x0(shift: float) -> None:
    scheduler = DPMSolverMultistepScheduler.from_config(scheduler_config("flow", {"shift": shift}))
    scheduler.set_timesteps(8)
    x0, x = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        assert abs(float(t) - 1000 * float(sigma)) <= 1.0, "the network's time is 1000 t, rounded down"
        # All data is one point, so the velocity of its straight path is known.
        x = scheduler.step((x - x0) / sigma, t, x).prev_sample
    torch.testing.assert_close(x, x0, atol=1e-4, rtol=0)
