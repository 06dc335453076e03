"""Laws of the autoencoder and of what is folded into it."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D

from latentgen.core.errors import UserError
from latentgen.models import autoencoder as ae

TINY = {"resolution": 16, "latent_channels": 4, "channels": (8, 16, 16), "layers_per_block": 1, "norm_groups": 4}


def tiny(**changes: object) -> AutoencoderKL:
    torch.manual_seed(0)
    settings: dict = {**TINY, "mid_attention": False, **changes}
    return ae.build_autoencoder(**settings)


def picture(seed: int = 1, size: int = 16) -> torch.Tensor:
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("mid_attention", [False, True])
def test_shapes_factor_and_scaling(mid_attention: bool) -> None:
    vae = tiny(mid_attention=mid_attention)
    mean, std = ae.encode_moments(vae, picture())
    assert ae.factor(vae) == 4
    assert mean.shape == std.shape == (3, 4, 4, 4) == ae.noise_shape(vae, picture())
    assert (std > 0).all()
    assert vae.config["scaling_factor"] == 1.0
    assert ae.decode(vae, ae.latents_of(vae, mean)).shape == (3, 3, 16, 16)
    has_attention = any("attentions.0" in name for name, _ in vae.named_modules())
    assert has_attention == mid_attention


def test_no_blocks_means_strided_convolutions_and_one_resnet_a_level_in_the_decoder() -> None:
    vae = tiny(channels=(8, 8, 8), layers_per_block=0)
    down = [sum(isinstance(m, ResnetBlock2D) for m in block.modules()) for block in vae.encoder.down_blocks]
    up = [sum(isinstance(m, ResnetBlock2D) for m in block.modules()) for block in vae.decoder.up_blocks]
    assert down == [0, 0, 0]
    assert up == [1, 1, 1]
    assert ae.encode_moments(vae, picture())[0].shape == (3, 4, 4, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": (8, 16), "layers_per_block": 0}, "layers_per_block"),
        ({"norm_groups": 3}, "norm_groups"),
        ({"resolution": 18}, "resolution"),
        ({"channels": ()}, "channels"),
        ({"layers_per_block": -1}, "layers_per_block"),
    ],
)
def test_wrong_numbers_are_named(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        tiny(**changes)
    assert "\n" not in str(caught.value)


def test_a_picture_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="18x18"):
        ae.encode_moments(tiny(), picture(size=18))


@pytest.mark.parametrize(("scaling", "shift"), [(1.0, None), (0.25, None), (0.25, 0.3)])
def test_folding_whitens_and_leaves_pictures_unchanged(scaling: float, shift: float | None) -> None:
    vae = tiny()
    vae.register_to_config(scaling_factor=scaling, shift_factor=shift)
    image = picture()
    with torch.no_grad():
        mean, std = ae.encode_moments(vae, image)
        z = ae.sample_latents(mean, std, torch.randn(mean.shape, generator=torch.Generator().manual_seed(2)))
        before = ae.decode(vae, ae.latents_of(vae, z))
        centre, spread = z.mean(dim=(0, 2, 3)), z.std(dim=(0, 2, 3))
        ae.fold_whitening(vae, centre, spread)

        new_mean, new_std = ae.encode_moments(vae, image)
        new_z = ae.latents_of(vae, (z - centre.view(1, -1, 1, 1)) / spread.view(1, -1, 1, 1))
        assert vae.config["scaling_factor"] == 1.0
        assert not vae.config["shift_factor"]
        torch.testing.assert_close(
            new_mean, (mean - centre.view(1, -1, 1, 1)) / spread.view(1, -1, 1, 1), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(new_std, std / spread.view(1, -1, 1, 1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(new_z.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(new_z.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(ae.decode(vae, new_z), before, atol=1e-5, rtol=0)
        as_pipeline = vae.decode(new_z / vae.config["scaling_factor"]).sample
        torch.testing.assert_close(as_pipeline, before, atol=1e-5, rtol=0)


def test_folding_survives_saving(tmp_path) -> None:
    vae = tiny()
    ae.fold_whitening(vae, torch.tensor([0.1, -2.0, 0.0, 3.0]), torch.tensor([0.5, 2.0, 1.0, 4.0]))
    vae.save_pretrained(tmp_path)
    again = AutoencoderKL.from_pretrained(tmp_path, local_files_only=True)
    z = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ae.decode(again, z), ae.decode(vae, z))


def test_a_dead_channel_is_refused_and_nothing_is_changed() -> None:
    vae = tiny()
    before = copy.deepcopy(vae.state_dict())
    with pytest.raises(UserError, match=r"channels \[2\]"):
        ae.fold_whitening(vae, torch.zeros(4), torch.tensor([1.0, 1.0, 0.0, 1.0]))
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())


def test_training_forward_gives_what_encode_and_decode_give() -> None:
    vae = tiny()
    image, noise = picture(), torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    out = ae.AutoencoderForTraining(vae)(image, noise)
    mean, std = ae.encode_moments(vae, image)
    torch.testing.assert_close(out.mean, mean)
    torch.testing.assert_close((out.logvar / 2).exp(), std)
    torch.testing.assert_close(out.reconstruction, vae.decode(mean + std * noise).sample)
    (out.reconstruction.square().mean() + ae.kl_divergence(out.mean, out.logvar)).backward()
    assert all(parameter.grad is not None for parameter in vae.parameters())


def test_kl_is_that_of_torch_distributions() -> None:
    mean, logvar = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    q = torch.distributions.Normal(mean, (logvar / 2).exp())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(ae.kl_divergence(mean, logvar), expected)


def test_residual_initialisation_turns_blocks_into_their_shortcuts() -> None:
    vae = tiny(channels=(8, 8, 8))
    untouched = copy.deepcopy(vae.state_dict())
    ae.initialise(vae, "default")
    assert all(torch.equal(untouched[name], value) for name, value in vae.state_dict().items())
    ae.initialise(vae, "residual")
    blocks = [module for module in vae.modules() if isinstance(module, ResnetBlock2D)]
    x = torch.randn(1, 8, 4, 4)
    assert blocks
    for block in blocks:
        assert torch.equal(block(x, None), x)
    with pytest.raises(UserError, match="nonsense"):
        ae.initialise(vae, "nonsense")


def test_patch_initialisation_carries_the_picture_along_the_shortcuts() -> None:
    plain, patch = tiny(), tiny()
    ae.initialise(patch, "patch")
    down = [m for m in patch.modules() if isinstance(m, Downsample2D)]
    for mine, before in zip(down, (m for m in plain.modules() if isinstance(m, Downsample2D)), strict=True):
        added = mine.conv.weight - before.conv.weight
        taps = added[:, :, :2, :2].flatten(1)
        torch.testing.assert_close(taps @ taps.T, torch.eye(len(taps)), atol=1e-5, rtol=0)
        assert added[:, :, 2].abs().max() == added[..., 2].abs().max() == 0
    up = [m for m in patch.modules() if isinstance(m, Upsample2D)]
    for mine, before in zip(up, (m for m in plain.modules() if isinstance(m, Upsample2D)), strict=True):
        added = mine.conv.weight - before.conv.weight
        torch.testing.assert_close(added[:, :, 1, 1], torch.eye(len(added)), atol=1e-6, rtol=0)
        assert added[:, :, 0].abs().max() == added[:, :, :, 0].abs().max() == 0
    assert len(down) == len(up) == 2
    blocks = [m for m in patch.modules() if isinstance(m, ResnetBlock2D)]
    assert all(m.conv2.weight.abs().max() == 0 for m in blocks)
