"""The autoencoder's losses, and the whitening that ends its training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from latentgen.core.rand import Draw
from latentgen.data.fetch import PictureBatches, from_bytes, to_tensor
from latentgen.formats.model import Model
from latentgen.models.autoencoder import AutoencoderForTraining, decode, encode_moments, kl_divergence
from latentgen.models.critics import VGG_BLOCKS
from latentgen.pipelines.pictures import cells
from latentgen.tasks.vae import VaeLosses, VaeTask, finish_vae, latent_statistics

DrawOf = Callable[..., Draw]


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random weights under VGG-16's names."""
    draws, weights, before, index = torch.Generator().manual_seed(0), {}, 3, 0
    for convolutions, width in VGG_BLOCKS:
        for _ in range(convolutions):
            weights[f"features.{index}.weight"] = (
                torch.randn(width, before, 3, 3, generator=draws) * (2 / 9 / before) ** 0.5
            )
            weights[f"features.{index}.bias"] = torch.zeros(width)
            before, index = width, index + 2
        index += 1
    path = tmp_path_factory.mktemp("vgg") / "vgg.safetensors"
    save_file(weights, path)
    return str(path)


def batch(few: Callable, draw: Draw, side: int = 16) -> dict:
    return PictureBatches(few(8, side=side), captions=0)(draw)


def task(tiny_builder: Callable[..., Model], few: Callable, **weights: object) -> VaeTask:
    held_out = [few(2, seed=9).image(i) for i in range(2)]
    return VaeTask(tiny_builder().vae, VaeLosses(**weights), held_out)  # type: ignore[arg-type]


def test_the_plain_loss_is_pixels_and_divergence(tiny_builder: Callable, few: Callable, draw: DrawOf) -> None:
    for pixel in ("l1", "l2"):
        made, d = task(tiny_builder, few, pixel=pixel, kl=0.25), draw()
        image = batch(few, d)["image"]
        losses = made.losses("vae", {"image": image}, d)
        image = from_bytes(image)
        assert losses.keys() == {"loss", "pixel", "kl"}
        with torch.no_grad():
            mean, std = encode_moments(made.vae, image)
            again = decode(made.vae, mean + std * d.normal("posterior", (4, 4, 4)))
        error = (again - image).abs() if pixel == "l1" else (again - image) ** 2
        torch.testing.assert_close(losses["pixel"].detach(), error.mean(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(losses["kl"].detach(), kl_divergence(mean, 2 * std.log()), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(losses["loss"], losses["pixel"] + 0.25 * losses["kl"])


def test_the_perceptual_term_is_added(tiny_builder: Callable, few: Callable, draw: DrawOf, vgg: str) -> None:
    made, d = task(tiny_builder, few, perceptual=0.5, perceptual_weights=vgg, kl=0.0), draw(range(2))
    losses = made.losses("vae", batch(few, d), d)
    assert 0 < losses["perceptual"].item() <= 10
    torch.testing.assert_close(losses["loss"], losses["pixel"] + 0.5 * losses["perceptual"])
    assert not any(
        name.startswith("features") for module in made.modules.values() for name, _ in module.named_parameters()
    )
    losses["loss"].backward()
    assert all(bool(p.grad.isfinite().all()) for p in made.vae.parameters() if p.grad is not None)


def test_the_critic_starts_late_and_each_phase_trains_its_own(
    tiny_builder: Callable, few: Callable, draw: DrawOf
) -> None:
    made = task(tiny_builder, few, critic=0.5, critic_start=3, critic_channels=8)
    assert [(phase.name, phase.trains, phase.start) for phase in made.phases()] == [
        ("vae", ("vae",), 0),
        ("critic", ("critic",), 3),
    ]
    early, late = draw(step=2), draw(step=3)
    assert "adversarial" not in made.losses("vae", batch(few, early, 32), early)
    losses = made.losses("vae", batch(few, late, 32), late)
    assert bool(torch.stack(list(losses.values())).isfinite().all())
    without = losses["pixel"] + 1e-6 * losses["kl"]
    assert (losses["loss"] - without).abs().item() > 1e-6, "the adversarial term takes part"
    losses["loss"].backward()
    assert made.vae.decoder.conv_out.weight.grad is not None
    made.vae.zero_grad()
    made.modules["critic"].zero_grad()
    judged = made.losses("critic", batch(few, late, 32), late)
    judged["loss"].backward()
    assert all(p.grad is None for p in made.vae.parameters())
    assert all(p.grad is not None for p in made.modules["critic"].parameters())
    assert len(task(tiny_builder, few).phases()) == 1


def test_preview_measures_and_draws(tiny_builder: Callable, few: Callable, tmp_path: Path) -> None:
    made = task(tiny_builder, few)
    values = made.preview({"vae": made.modules["vae"]}, 12, tmp_path)
    assert values.keys() == {"psnr", "ssim"}
    assert 0 < values["psnr"] < 60
    assert -1 <= values["ssim"] <= 1
    with Image.open(tmp_path / "00000012.png") as sheet:
        assert sheet.width > 2 * 2 * 16


class Wide:
    """40 pictures, more than one batch of the measurement."""

    def __init__(self, source: object) -> None:
        self.source = source

    def __len__(self) -> int:
        return 40

    def image(self, index: int) -> NDArray[np.uint8]:
        return self.source.image(index)  # type: ignore[attr-defined]

    def shape(self, index: int) -> tuple[int, int]:
        return self.source.shape(index)  # type: ignore[attr-defined]


def test_latent_statistics_are_those_of_all_latents(tiny: Model, few: Callable) -> None:
    source = Wide(few(40))
    mean, std = latent_statistics(tiny.vae, source, seed=5)  # type: ignore[arg-type]
    draws, parts = torch.Generator().manual_seed(5), []
    with torch.no_grad():
        for numbers in (range(32), range(32, 40)):
            m, s = encode_moments(tiny.vae, to_tensor([source.image(i) for i in numbers]))
            parts.append(m + s * torch.randn(m.shape, generator=draws))
    z = torch.cat(parts).double().transpose(0, 1).flatten(1)
    assert mean.dtype == torch.float64
    torch.testing.assert_close(mean, z.mean(dim=1), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(std, z.std(dim=1, correction=0), rtol=1e-6, atol=1e-9)
    asked: list[int] = []
    read, source.image = source.image, lambda index: asked.append(index) or read(index)  # type: ignore[method-assign]
    latent_statistics(tiny.vae, source, seed=5, pictures=10)  # type: ignore[arg-type]
    assert asked == list(range(0, 40, 4)), "fewer pictures are spread over all"


def test_finish_vae_whitens_and_keeps_the_pictures(tiny_builder: Callable, few: Callable, tmp_path: Path) -> None:
    trained, source = AutoencoderForTraining(tiny_builder().vae), few(600)
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    finish_vae(trained, source, 0, tmp_path / "vae")
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert isinstance(vae, AutoencoderKL)
    for seed, tolerance in ((0, 1e-4), (1, 0.05)):  # the noise of the measurement, and other noise
        mean, std = latent_statistics(vae, source, seed=seed)
        assert float(mean.abs().max()) < tolerance
        assert float((std - 1).abs().max()) < tolerance
    assert vae.config["scaling_factor"] == 1.0
    image = to_tensor([source.image(i) for i in range(4)])
    with torch.no_grad():
        old = decode(trained.vae, encode_moments(trained.vae, image)[0])
        new = decode(vae, encode_moments(vae, image)[0])
    torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-4)
    written = json.loads((tmp_path / "vae" / "latent_statistics.json").read_text())
    expected = latent_statistics(trained.vae, source, seed=0)
    assert written["mean"] == pytest.approx(expected[0].tolist())
    assert written["std"] == pytest.approx(expected[1].tolist())


def test_what_is_measured_of_each_picture_is_the_loss_without_the_critic(
    tiny_builder: Callable, few: Callable, draw: DrawOf, vgg: str
) -> None:
    weights = {"pixel": "l1_l2", "kl": 0.25, "perceptual": 0.5, "perceptual_weights": vgg}
    made, d = task(tiny_builder, few, critic=0.5, **weights), draw(step=3)
    plain = task(tiny_builder, few, **weights)
    image = batch(few, d)
    found = made.measure({"vae": AutoencoderForTraining(made.vae)}, image, d)
    with torch.no_grad():
        losses = plain.losses("vae", image, d)
    for name in ("loss", "pixel"):
        assert found[name].shape == (8,)
        torch.testing.assert_close(found[name].mean(), losses[name])
        assert found[name].std() > 0
    alone = draw(range(2, 3), step=3)
    one = made.measure({"vae": AutoencoderForTraining(made.vae)}, batch(few, alone), alone)
    torch.testing.assert_close(one["loss"], found["loss"][2:3])


def test_pictures_of_several_shapes_are_measured_and_shown(
    tiny_builder: Callable, few: Callable, tmp_path: Path
) -> None:
    source = few(10, seed=9, shapes=((16, 16), (12, 20), (20, 12)))
    made = VaeTask(tiny_builder().vae, VaeLosses(), [source.image(i) for i in range(10)])
    networks = {"vae": made.modules["vae"]}
    values = made.preview(networks, 1, tmp_path)
    alone = []
    for i in range(10):
        made.held_out = (source.image(i),)
        alone.append(made.preview(networks, 2, tmp_path)["psnr"])
    assert values["psnr"] == pytest.approx(sum(alone) / 10, rel=1e-4)
    with Image.open(tmp_path / "00000001.png") as sheet:
        assert sheet.size == (8 * (40 + 4) + 4, 2 * (40 + 4 + 18) + 4)
        rows = cells(sheet.convert("RGB"), 2, 8, captions=True)
    for number, cell in enumerate(rows[0]):
        height, width = source.shape(number)
        left, top = (40 - 2 * width) // 2, (40 - 2 * height) // 2
        shown = np.asarray(cell.crop((left, top, left + 2 * width, top + 2 * height)))[::2, ::2]
        assert np.array_equal(shown, source.image(number)), "in the middle of its cell"


def test_latent_statistics_count_every_pixel_of_every_shape(tiny: Model, few: Callable) -> None:
    source = few(9, shapes=((16, 16), (16, 32), (32, 16)))
    mean, std = latent_statistics(tiny.vae, source, seed=5)
    draws, parts = torch.Generator().manual_seed(5), []
    with torch.no_grad():
        for first in range(3):
            m, s = encode_moments(tiny.vae, to_tensor([source.image(i) for i in range(first, 9, 3)]))
            parts.append((m + s * torch.randn(m.shape, generator=draws)).transpose(0, 1).flatten(1))
    z = torch.cat(parts, dim=1).double()
    torch.testing.assert_close(mean, z.mean(dim=1), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(std, z.std(dim=1, correction=0), rtol=1e-6, atol=1e-9)
