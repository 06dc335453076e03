"""Pictures to start from, and masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentgen.core.errors import UserError
from latentgen.diffusion.samplers import SAMPLERS
from latentgen.formats.model import Model
from latentgen.models.autoencoder import decode
from latentgen.pipelines.editing import given, steps_left
from latentgen.pipelines.generate import Request, check, generate, steps_of
from latentgen.pipelines.pictures import to_pictures


@pytest.fixture
def picture(tmp_path: Path) -> str:
    levels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


@pytest.fixture
def mask(tmp_path: Path) -> str:
    """The right half of the latents."""
    levels = np.zeros((16, 16), dtype=np.uint8)
    levels[:, 8:] = 255
    Image.fromarray(levels).save(tmp_path / "mask.png")
    return str(tmp_path / "mask.png")


def ask(**changes: Any) -> Request:
    return Request(**{"prompt": "a star", "num_inference_steps": 10, "height": 16, "width": 16} | changes)


def draw(model: Model, request: Request) -> np.ndarray:
    return np.asarray(next(generate(model, [request])), dtype=np.int16)


def test_the_weaker_the_closer_to_the_picture(tiny: Model, picture: str) -> None:
    """What nothing is kept of, and what nearly all is kept of: the autoencoder's own rendering."""
    plain, all_of_it = draw(tiny, ask()), draw(tiny, ask(image=picture, strength=1.0))
    assert np.array_equal(plain, all_of_it)
    with torch.no_grad():
        latents = given(tiny, [ask(image=picture)]).latents
        assert latents is not None
        kept = np.asarray(to_pictures(decode(tiny.vae, latents))[0], dtype=np.int16)
    distances = [np.abs(draw(tiny, ask(image=picture, strength=s)) - kept).mean() for s in (0.1, 0.4, 1.0)]
    assert distances == sorted(distances)
    assert distances[0] < 0.5 * distances[2]


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_outside_the_mask_nothing_changes(sampler: str, tiny: Model, picture: str, mask: str) -> None:
    """In latents; the decoder sees a little across the edge."""
    seen: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "latentgen.pipelines.generate.decode", lambda vae, latents: (seen.append(latents), decode(vae, latents))[1]
        )
        draw(tiny, ask(image=picture, mask=mask, sampler=sampler, num_inference_steps=6))
    latents = given(tiny, [ask(image=picture)]).latents
    assert latents is not None
    torch.testing.assert_close(seen[0][..., :2], latents[..., :2], atol=2e-3, rtol=1e-3)
    assert (seen[0][..., 2:] - latents[..., 2:]).abs().mean() > 0.1


def test_the_strength_chooses_the_steps(picture: str) -> None:
    sigmas = torch.arange(10, -1, -1.0)
    for strength, left in ((1.0, 10), (0.99, 9), (0.5, 5), (0.01, 1)):
        request = ask(image=picture, strength=strength)
        assert torch.equal(steps_left(request, sigmas), sigmas[10 - left :])
        assert steps_of([request]) == left
    assert len(steps_left(ask(image=picture), sigmas)) == 8 + 1, "0.8 where none is said"
    assert len(steps_left(ask(), sigmas)) == 10 + 1


def test_pictures_of_other_sizes_are_cut_in_the_middle(tiny: Model, tmp_path: Path, picture: str) -> None:
    levels = np.asarray(Image.open(picture))
    wide = np.concatenate([levels[:, :4] * 0, levels, levels[:, :4] * 0], axis=1)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    one, other = (given(tiny, [ask(image=str(path))]).latents for path in (picture, tmp_path / "wide.png"))
    assert one is not None
    assert other is not None
    assert torch.equal(one, other)


def test_neighbours_with_other_pictures_do_not_mix(tiny: Model, picture: str, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    requests = [ask(image=picture, strength=0.3), ask(image=str(tmp_path / "red.png"), strength=0.3), ask()]
    together = [np.asarray(p, dtype=np.int16) for p in generate(tiny, requests)]
    for request, found in zip(requests, together, strict=True):
        assert np.abs(draw(tiny, request) - found).max() <= 1


def with_inpainting(build: Callable[..., Model]) -> Model:
    import dataclasses

    from latentgen.models.unet import build_unet

    torch.manual_seed(5)
    unet = build_unet(
        latent_size=4, latent_channels=9, channels=(8, 16), layers_per_block=1, attention=(False, True), heads=2,
        context_dim=16, norm_groups=4,
    )  # fmt: skip
    unet.register_to_config(out_channels=4)
    unet.conv_out = torch.nn.Conv2d(8, 4, 3, padding=1)
    return dataclasses.replace(build(), unet=unet.eval())


def test_an_inpainting_model_sees_mask_and_surroundings(
    tiny_builder: Callable[..., Model], picture: str, mask: str
) -> None:
    model = with_inpainting(tiny_builder)
    model.require_fit("here")
    brought = given(model, [ask(image=picture, mask=mask)])
    assert brought.channels is not None
    assert brought.channels.shape == (1, 5, 4, 4)
    assert torch.equal(brought.channels[0, 0], torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 4))
    assert brought.mask is None, "the network keeps what it is shown"
    nothing = given(model, [ask()]).channels
    assert nothing is not None
    assert bool((nothing[:, 0] == 1).all()), "without a picture everything is to be drawn"
    assert np.abs(draw(model, ask()) - draw(model, ask(image=picture, mask=mask))).max() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": "m.png"}, "--mask m.png: says what to do with a picture; add --image FILE"),
        ({"strength": 0.5}, "--strength 0.5: says what to do with a picture; add --image FILE"),
        ({"image": "PICTURE", "strength": 0.0}, "--strength 0.0: choose it above 0"),
        ({"image": "PICTURE", "strength": 1.5}, "--strength 1.5: choose it above 0"),
        ({"image": "gone.png"}, "--image gone.png: no such file; name a picture"),
        ({"image": "PICTURE", "mask": "gone.png"}, "--mask gone.png: no such file"),
        ({"image": "TEXT"}, "--image .*words.png: .*; name another picture"),
        ({"image": "PICTURE", "sampler": "dpm_adaptive"}, "cannot begin in the middle; say --strength 1"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, tiny: Model, picture: str, tmp_path: Path) -> None:
    (tmp_path / "words.png").write_text("no picture")
    files = {"PICTURE": picture, "TEXT": str(tmp_path / "words.png")}
    known = {name: files.get(value, value) if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(UserError, match=message):
        check(ask(**known), tiny)
