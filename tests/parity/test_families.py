"""Every family draws what diffusers' own pipeline draws from the same noise, and survives the folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image

from latentgen.core.errors import UserError
from latentgen.diffusion.parameterization import Parameterization
from latentgen.diffusion.schedules import SCHEDULES
from latentgen.formats.folder_parts import write_folder_from
from latentgen.formats.lora.file import trained_lora
from latentgen.formats.lora.writing import write_lora
from latentgen.formats.model import Model
from latentgen.formats.model_folder import load_model, save_model
from latentgen.formats.opening import open_model
from latentgen.formats.scheduler import parameterization, read_schedule
from latentgen.formats.single_file.write import write_single_file
from latentgen.formats.sources import open_source
from latentgen.models.adapters import AdapterSpec, adapter_parameters, add_adapters
from latentgen.pipelines.generate import Request, generate, start_noise

SIDE, STEPS = 32, 4
PIXEL = 1 / 255

SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"set_alpha_to_one": True}),
    "euler": (EulerDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {"final_sigmas_type": "zero"}),
    "unipc": (UniPCMultistepScheduler, {"final_sigmas_type": "zero"}),
}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Model]]:
    made = {}
    for family in tiny.FAMILIES:
        pipeline = tiny.make(family)
        folder = tmp_path_factory.mktemp(family) / "model"
        pipeline.save_pretrained(folder)
        made[family] = (pipeline, load_model(folder))
    return made


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A picture, and a mask whose edge does not fall on the latents' grid."""
    folder = tmp_path_factory.mktemp("scene")
    rng = np.random.default_rng(0)
    picture = np.repeat(np.repeat(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8), 4, 0), 4, 1)
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    mask[6:21, 9:] = 255
    Image.fromarray(picture).save(folder / "picture.png")
    Image.fromarray(mask).save(folder / "mask.png")
    return folder / "picture.png", folder / "mask.png"


def request_for(sampler: str, guidance_scale: float, **more: Any) -> Request:
    return Request(
        "a blue star above a green heart",
        seed=7,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        sampler=sampler,
        schedule="trailing",
        height=SIDE,
        width=SIDE,
        **more,
    )


def prepared(pipeline: Any, sampler: str) -> Any:
    """The pipeline with that scheduler; returns what its start noise has to be divided by to be ours.

    Schedulers that descend from DDPM hold x / sqrt(1 + sigma^2), and diffusers starts them at noise, not at noise times
    sigma / sqrt(1 + sigma^2), which is where we start.
    """
    kind, settings = SCHEDULERS[sampler]
    config = {**pipeline.scheduler.config, "use_karras_sigmas": False}  # our folders ask for them
    pipeline.scheduler = kind.from_config(config, timestep_spacing="trailing", **settings)
    sigma = float(SCHEDULES["trailing"](STEPS, model_process(pipeline))[0])
    return 1.0 if sampler == "euler" else (1 + sigma**-2) ** 0.5


def model_process(pipeline: Any) -> Parameterization:
    return parameterization(*read_schedule(pipeline.scheduler.config, "test"))


def inputs(model: Model, pipeline: Any, request: Request, divisor: float) -> dict[str, Any]:
    return {
        "prompt": request.prompt,
        # diffusers zeroes what is absent, not what is empty.
        "negative_prompt": request.negative_prompt or (None if model.zero_empty else ""),
        "guidance_scale": request.guidance_scale,
        "num_inference_steps": STEPS,
        "latents": start_noise(request, 4, 4) / divisor,
        "output_type": "np",
    }


@pytest.mark.parametrize("negative", ["", "blurry, dark"])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("family", tiny.BASES)
def test_text_to_picture(
    family: str, sampler: str, guidance_scale: float, negative: str, pipelines: dict[str, tuple[Any, Model]]
) -> None:
    pipeline, model = pipelines[family]
    request = request_for(sampler, guidance_scale, negative_prompt=negative)
    divisor = prepared(pipeline, sampler)
    given = inputs(model, pipeline, request, divisor) | {"height": SIDE, "width": SIDE}
    theirs = pipeline(**given).images[0]
    assert_same_picture(model, request, theirs)


def assert_same_picture(model: Model, request: Request, theirs: np.ndarray) -> None:
    ours = np.asarray(next(generate(model, [request])), dtype=np.float64) / 255
    assert theirs.std() > 0.02, "a picture of something"
    assert np.abs(ours - theirs).max() <= PIXEL


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("family", ["sd1-inpaint", "sd2-inpaint", "sdxl-inpaint"])
def test_inpainting(
    family: str, sampler: str, pipelines: dict[str, tuple[Any, Model]], scene: tuple[Path, Path]
) -> None:
    pipeline, model = pipelines[family]
    picture, mask = scene
    request = request_for(sampler, 5.0, image=str(picture), mask=str(mask))
    divisor = prepared(pipeline, sampler)
    image, hole = Image.open(picture), Image.open(mask)
    outside = torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    outside = outside * (torch.from_numpy(np.asarray(hole, dtype=np.float32)) < 127.5)
    with torch.no_grad():  # the pipeline would draw from the posterior; we take its mean
        masked = pipeline.vae.encode(outside).latent_dist.mean * pipeline.vae.config.scaling_factor
    given = inputs(model, pipeline, request, divisor) | {
        "image": image,
        "mask_image": hole,
        "masked_image_latents": masked,
        "strength": 1.0,
        "height": SIDE,
        "width": SIDE,
    }
    assert_same_picture(model, request, pipeline(**given).images[0])


def given_latents(model: Model, pipeline: Any, request: Request) -> dict[str, Any]:
    """Given latents in place of a picture, diffusers draws no posterior and adds this generator's noise."""
    picture = np.asarray(Image.open(str(request.image)), dtype=np.float32)
    with torch.no_grad():
        posterior = pipeline.vae.encode(torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1).latent_dist
    given = inputs(model, pipeline, request, 1.0) | {
        "image": posterior.mean * pipeline.vae.config.scaling_factor,
        "strength": request.strength,
        "generator": torch.Generator().manual_seed(request.seed),
    }
    del given["latents"]
    return given


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_picture_to_picture(sampler: str, pipelines: dict[str, tuple[Any, Model]], scene: tuple[Path, Path]) -> None:
    pipeline, model = pipelines["sd1"]
    request = request_for(sampler, 5.0, image=str(scene[0]), strength=0.5)
    prepared(pipeline, sampler)
    given = given_latents(model, pipeline, request)
    components = {name: part for name, part in pipeline.components.items() if name != "image_encoder"}
    theirs = StableDiffusionImg2ImgPipeline(**components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    assert_same_picture(model, request, theirs(**given).images[0])


def test_the_refiner(pipelines: dict[str, tuple[Any, Model]], scene: tuple[Path, Path]) -> None:
    pipeline, model = pipelines["refiner"]
    request = request_for("euler", 5.0, image=str(scene[0]), strength=0.5, negative_prompt="blurry, dark")
    prepared(pipeline, "euler")
    given = given_latents(model, pipeline, request) | {"original_size": (SIDE, SIDE), "target_size": (SIDE, SIDE)}
    assert_same_picture(model, request, pipeline(**given).images[0])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_folders_keep_every_tensor(family: str, pipelines: dict[str, tuple[Any, Model]], tmp_path: Path) -> None:
    _, model = pipelines[family]
    save_model(model, tmp_path / "ours")
    pipeline = type(tiny.make(family)).from_pretrained(tmp_path / "ours")
    again = load_model(tmp_path / "ours")
    for name, network in model.networks().items():
        theirs, back = pipeline.components[name].state_dict(), again.networks()[name].state_dict()
        assert theirs.keys() == back.keys()
        assert all(torch.equal(back[key], value) for key, value in network.state_dict().items())
        assert all(torch.equal(back[key], value) for key, value in theirs.items())
    assert (again.zero_empty, again.sizes, again.inpaints) == (model.zero_empty, model.sizes, model.inpaints)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_half_precision_in_the_file_only(
    family: str, dtype: torch.dtype, pipelines: dict[str, tuple[Any, Model]], tmp_path: Path
) -> None:
    """Stored in 16 bits and drawn in 32, on both sides."""
    _, model = pipelines[family]
    save_model(model, tmp_path / "half", dtype)
    pipeline = type(tiny.make(family)).from_pretrained(tmp_path / "half", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    opened, request = load_model(tmp_path / "half"), request_for("dpmpp_2m", 5.0)
    divisor = prepared(pipeline, "dpmpp_2m")
    given = inputs(opened, pipeline, request, divisor) | {"height": SIDE, "width": SIDE}
    assert_same_picture(opened, request, pipeline(**given).images[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", tiny.BASES)
def test_through_a_single_file(
    family: str, dtype: torch.dtype, pipelines: dict[str, tuple[Any, Model]], tmp_path: Path
) -> None:
    """Exported in the original layout, opened from there, and made a folder again that diffusers opens."""
    _, model = pipelines[family]
    save_model(model, tmp_path / "folder", dtype)
    write_single_file(open_source(str(tmp_path / "folder")), tmp_path / "file.safetensors")
    opened = open_model(tmp_path / "file.safetensors").model
    write_folder_from(open_source(str(tmp_path / "file.safetensors")), tmp_path / "again")
    pipeline = type(tiny.make(family)).from_pretrained(tmp_path / "again", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    request = request_for("dpmpp_2m", 5.0, negative_prompt="blurry, dark")
    divisor = prepared(pipeline, "dpmpp_2m")
    given = inputs(opened, pipeline, request, divisor) | {"height": SIDE, "width": SIDE}
    assert_same_picture(opened, request, pipeline(**given).images[0])


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("family", tiny.BASES)
def test_with_a_lora(family: str, layout: str, tmp_path: Path) -> None:
    """Random adapters on U-Net and text encoders, from one file on both sides."""
    folder = tiny.saved(family, tmp_path / "model")
    model = load_model(folder)
    networks = {name: network for name, network in model.networks().items() if name != "vae"}
    add_adapters(networks, AdapterSpec(rank=2, targets=("attention", "feed_forward")))
    torch.manual_seed(1)
    for network in networks.values():
        for parameter in adapter_parameters(network).values():
            torch.nn.init.normal_(parameter, std=0.2)
    write_lora(trained_lora(networks), tmp_path / "lora.safetensors", layout, load_model(folder).networks())
    pipeline = tiny.make(family)
    pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    opened, request = open_model(folder, loras=[(tmp_path / "lora.safetensors", 1.0)]).model, request_for("euler", 5.0)
    divisor = prepared(pipeline, "euler")
    given = inputs(opened, pipeline, request, divisor) | {"height": SIDE, "width": SIDE}
    theirs = pipeline(**given).images[0]
    assert_same_picture(opened, request, theirs)
    plain = np.asarray(next(generate(load_model(folder), [request])), dtype=np.float64) / 255
    assert np.abs(plain - theirs).max() > 10 * PIXEL, "it does something"


def test_a_tiny_autoencoder(pipelines: dict[str, tuple[Any, Model]], tmp_path: Path) -> None:
    pipeline = tiny.make("sd1")
    pipeline.register_modules(vae=tiny.tiny_autoencoder())
    pipeline.save_pretrained(tmp_path / "model")
    model, request = load_model(tmp_path / "model"), request_for("euler", 5.0)
    divisor = prepared(pipeline, "euler")
    given = inputs(model, pipeline, request, divisor) | {"height": SIDE, "width": SIDE}
    assert_same_picture(model, request, pipeline(**given).images[0])


def test_parts_of_different_models_are_refused(pipelines: dict[str, tuple[Any, Model]]) -> None:
    sd1, sd2, xl = (pipelines[name][1] for name in ("sd1", "sd2-v", "sdxl"))
    assert dataclasses.replace(sd1, unet=sd2.unet).require_fit("here") is None, "of one width: they fit"
    with pytest.raises(UserError, match=r"^here: the U-Net reads text states of width 96, the text encoder makes 32"):
        dataclasses.replace(sd1, unet=xl.unet).require_fit("here")
    with pytest.raises(UserError, match=r"^here: the U-Net reads text states of width 32, the text encoder makes 96"):
        dataclasses.replace(xl, unet=sd1.unet).require_fit("here")
    torch.manual_seed(0)
    channels = dataclasses.replace(sd1, unet=tiny.unet(32, 7, attention_head_dim=4))
    with pytest.raises(UserError, match=r"the U-Net takes 7 channels.*4 \(text to picture\) and 9 \(inpainting\)"):
        channels.require_fit("here")
