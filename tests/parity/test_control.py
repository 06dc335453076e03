"""A ControlNet of any family draws what diffusers' own pipelines draw with it, and passes between the two."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_families as same
import tiny
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from PIL import Image

from latentgen.core.errors import UserError
from latentgen.formats.control import load_control, save_control, with_control
from latentgen.formats.model import Model
from latentgen.formats.model_folder import load_model
from latentgen.models.control import build_control
from latentgen.pipelines.generate import Request, generate

KINDS = {
    "sd1": StableDiffusionControlNetPipeline,
    "sd2-v": StableDiffusionControlNetPipeline,
    "sd1-inpaint": StableDiffusionControlNetInpaintPipeline,
    "sdxl": StableDiffusionXLControlNetPipeline,
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same networks in both houses."""

    theirs: Any
    ours: Model
    folder: Path


def shaken(control: ControlNetModel) -> ControlNetModel:
    """With zero convolutions that are not zero, so that the picture counts."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, weight in control.named_parameters():
            if "controlnet_" in name and not weight.any():
                weight.normal_(std=0.3)
    return control.eval()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    made = {}
    for family, kind in KINDS.items():
        folder, plain = tmp_path_factory.mktemp(family), tiny.make(family)
        plain.save_pretrained(folder / "model")
        model = load_model(folder / "model")
        save_control(shaken(build_control(model.unet, 4, 4)), folder / "control", {})
        control = ControlNetModel.from_pretrained(folder / "control").eval()
        more = {"add_watermarker": False} if family == "sdxl" else {"requires_safety_checker": False}
        parts = {name: part for name, part in plain.components.items() if name != "image_encoder"}
        pipeline = kind(**parts, controlnet=control, **more)
        pipeline.set_progress_bar_config(disable=True)
        made[family] = Pair(pipeline, with_control(model, folder / "control"), folder)
    return made


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture to follow."""
    path = tmp_path_factory.mktemp("lines") / "lines.png"
    levels = np.random.default_rng(3).integers(0, 255, (same.SIDE, same.SIDE, 3), dtype=np.uint8)
    Image.fromarray(levels).save(path)
    return path


def theirs(pair: Pair, request: Request, sampler: str, lines: Path, **more: Any) -> np.ndarray:
    divisor = same.prepared(pair.theirs, sampler)
    given = same.inputs(pair.ours, pair.theirs, request, divisor) | {
        "image": Image.open(lines),
        "controlnet_conditioning_scale": request.control_scale,
        "control_guidance_start": request.control_start,
        "control_guidance_end": request.control_end,
        "height": same.SIDE,
        "width": same.SIDE,
    }
    return pair.theirs(**given | more).images[0]


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("family", ["sd1", "sd2-v", "sdxl"])
def test_a_picture_is_followed(
    family: str, sampler: str, guidance_scale: float, scale: float, pairs: dict[str, Pair], lines: Path
) -> None:
    pair, more = pairs[family], {"negative_prompt": "blurry, dark", "control_scale": scale}
    request = same.request_for(sampler, guidance_scale, control=str(lines), **more)
    same.assert_same_picture(pair.ours, request, theirs(pair, request, sampler, lines))


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.25, 1.0), (0.25, 0.75), (0.1, 0.2)])
def test_for_a_share_of_the_steps(start: float, end: float, pairs: dict[str, Pair], lines: Path) -> None:
    pair = pairs["sd1"]
    request = same.request_for("euler", 5.0, control=str(lines), control_start=start, control_end=end)
    picture = theirs(pair, request, "euler", lines)
    same.assert_same_picture(pair.ours, request, picture)
    always = dataclasses.replace(request, control_start=0.0, control_end=1.0)
    assert np.abs(drawn(pair.ours, always) - picture).max() > same.PIXEL, "the share counts"


def test_beside_an_inpainting_network(pairs: dict[str, Pair], lines: Path, tmp_path: Path) -> None:
    """The ControlNet is shown the noisy latents alone."""
    pair = pairs["sd1-inpaint"]
    rng = np.random.default_rng(4)
    levels, hole = rng.integers(0, 255, (same.SIDE, same.SIDE, 3), dtype=np.uint8), np.zeros((same.SIDE, same.SIDE))
    hole[8:20, 12:] = 255
    Image.fromarray(levels).save(tmp_path / "picture.png")
    Image.fromarray(hole.astype(np.uint8)).save(tmp_path / "mask.png")
    request = same.request_for(
        "ddim", 5.0, control=str(lines), image=str(tmp_path / "picture.png"), mask=str(tmp_path / "mask.png")
    )
    outside = torch.from_numpy(levels.astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    outside = outside * torch.from_numpy(hole < 127.5)
    vae = pair.theirs.vae
    with torch.no_grad():  # the pipeline would draw from the posterior; we take its mean
        mean = vae.encode(outside).latent_dist.mean * vae.config.scaling_factor
    pair.theirs._encode_vae_image = lambda image, generator: mean
    picture = theirs(
        pair,
        request,
        "ddim",
        lines,
        image=Image.fromarray(levels),
        mask_image=Image.fromarray(hole.astype(np.uint8)),
        control_image=Image.open(lines),
        strength=1.0,
    )
    same.assert_same_picture(pair.ours, request, picture)


def drawn(model: Model, request: Request) -> np.ndarray:
    return np.asarray(next(generate(model, [request])), dtype=np.float64) / 255


@pytest.mark.parametrize("family", KINDS)
def test_a_new_one_is_diffusers_own_and_changes_nothing(family: str, pairs: dict[str, Pair], lines: Path) -> None:
    model = dataclasses.replace(pairs[family].ours, control=None)
    new = build_control(model.unet, 4, 4)
    if not model.inpaints:  # diffusers' copy takes the mask too, and then fits no pipeline
        reference = ControlNetModel.from_unet(model.unet, conditioning_embedding_out_channels=(16, 32, 96))
        assert {key: value for key, value in new.config.items() if not key.startswith("_")} == {
            **{key: value for key, value in reference.config.items() if not key.startswith("_")},
            "addition_embed_type_num_heads": model.unet.config["addition_embed_type_num_heads"],
        }
        copied = {key: value for key, value in reference.state_dict().items() if not key.startswith("controlnet_")}
        assert all(torch.equal(new.state_dict()[key], value) for key, value in copied.items())
    request = same.request_for("ddim", 5.0)
    followed = dataclasses.replace(request, control=str(lines))
    with_new = dataclasses.replace(model, control=new.eval())
    assert np.array_equal(drawn(model, request), drawn(with_new, followed))


@pytest.mark.parametrize("family", KINDS)
def test_folders_keep_every_tensor(family: str, pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pairs[family]
    pair.theirs.controlnet.save_pretrained(tmp_path / "theirs")
    back = load_control(tmp_path / "theirs").state_dict()
    assert pair.ours.control is not None
    ours = pair.ours.control.state_dict()
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[key], value) for key, value in ours.items())


def test_one_of_another_family_is_refused(pairs: dict[str, Pair], tmp_path: Path) -> None:
    sd1, xl = pairs["sd1"], pairs["sdxl"]
    with pytest.raises(UserError, match=r"of another family than the model: text states of width 96, not 32; take"):
        with_control(sd1.ours, xl.folder / "control")
    with pytest.raises(UserError, match=r"of another family than the model: text states of width 32, not 96; take"):
        with_control(xl.ours, sd1.folder / "control")
    save_control(build_control(sd1.ours.unet, 4, 8), tmp_path / "coarse", {})
    with pytest.raises(UserError, match=r"pixels for each latent: 8, not 4"):
        with_control(sd1.ours, tmp_path / "coarse")
