"""The variational autoencoder between pictures and latents: a diffusers AutoencoderKL, and what we do with one.

Three kinds of latents, never mixed up:

* raw latents z, what the encoder itself says: `encode_moments` and `sample_latents`;
* latents, what diffusion works on: `latents_of(z) = (z - shift_factor) * scaling_factor`;
* white latents: after `fold_whitening` the two are the same, and draws have mean 0 and standard deviation 1 per channel
  (the posterior's means alone vary less).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from latentgen.core.errors import UserError

Vae = AutoencoderKL | AutoencoderTiny
"""The full one, and the small one that some use for speed (TAESD); only the first is trained here."""


def build_autoencoder(
    *,
    resolution: int,
    latent_channels: int,
    channels: tuple[int, ...],
    layers_per_block: int,
    norm_groups: int,
    mid_attention: bool,
) -> AutoencoderKL:
    """Build the autoencoder of latent diffusion (arXiv 2112.10752) with random weights.

    Args:
        resolution: side of the training pictures in pixels; a multiple of the factor.
        latent_channels: channels c of the latents [b, c, h/f, w/f].
        channels: width of each level, finest first; the factor f is `2 ** (len(channels) - 1)`.
        layers_per_block: residual blocks per level of the encoder; the decoder has one more. With 0 the encoder is
            strided convolutions around the middle block, and all widths must be equal.
        norm_groups: groups of each group normalisation; must divide every width.
        mid_attention: one attention layer in the middle of the encoder and of the decoder.

    Raises:
        UserError: the numbers do not fit together.
    """
    channels = tuple(channels)
    if not channels or min(channels) < 1 or latent_channels < 1:
        raise UserError(
            f"autoencoder: channels {list(channels)} and latent_channels {latent_channels} must be 1 or more"
        )
    if layers_per_block < 0:
        raise UserError(f"autoencoder: layers_per_block is {layers_per_block}; use 0 or more")
    if layers_per_block == 0 and len(set(channels)) > 1:
        raise UserError(
            f"autoencoder: layers_per_block 0 cannot change the width between levels, channels are {list(channels)}; "
            "make them equal or use layers_per_block 1"
        )
    indivisible = [width for width in channels if norm_groups < 1 or width % norm_groups]
    if indivisible:
        raise UserError(f"autoencoder: norm_groups {norm_groups} does not divide the channels {indivisible}")
    times = 2 ** (len(channels) - 1)
    if resolution < times or resolution % times:
        raise UserError(
            f"autoencoder: resolution {resolution} is not a multiple of {times}, the factor of {len(channels)} levels"
        )
    levels: dict[str, Any] = {  # the library's annotations admit one level only
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "block_out_channels": channels,
    }
    return AutoencoderKL(
        **levels,
        layers_per_block=layers_per_block,
        latent_channels=latent_channels,
        norm_num_groups=norm_groups,
        sample_size=resolution,
        mid_block_add_attention=mid_attention,
        # The library's default is the constant of one particular published model.
        scaling_factor=1.0,
    )


@torch.no_grad()
def initialise(vae: AutoencoderKL, scheme: str) -> None:
    """Change the random weights of a new autoencoder in place.

    Args:
        vae: freshly built.
        scheme: "default" leaves PyTorch's own initialisation. "residual" sets the last convolution of every residual
            block to zero, so that each block starts as its shortcut (arXiv 1901.09321 section 3). "patch" also lets
            what is left, the path of shortcuts, carry the picture from the first step on: strided convolutions gain
            an orthogonal map of the 2x2 patch they reduce, upsampling ones the identity, shortcuts are orthogonal.

    Raises:
        UserError: no scheme of that name.
    """
    if scheme not in SCHEMES:
        raise UserError(f'autoencoder: no initialisation "{scheme}"; use one of {", ".join(SCHEMES)}')
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D) and scheme != "default":
            _zero(module.conv2)
            if module.conv_shortcut is not None and scheme == "patch":
                nn.init.orthogonal_(module.conv_shortcut.weight)
        elif isinstance(module, Downsample2D) and scheme == "patch":
            conv = module.conv
            assert isinstance(conv, nn.Conv2d)
            taps = nn.init.orthogonal_(torch.empty(conv.out_channels, conv.in_channels * 4))
            conv.weight[:, :, :2, :2] += taps.view(conv.out_channels, conv.in_channels, 2, 2)
        elif isinstance(module, Upsample2D) and scheme == "patch":
            conv = module.conv
            assert isinstance(conv, nn.Conv2d)
            conv.weight[:, :, 1, 1] += torch.eye(conv.out_channels)


def _zero(conv: nn.Module) -> None:
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)


SCHEMES = ("default", "residual", "patch")


def factor(vae: Vae) -> int:
    """Pixels of the picture per pixel of the latents, along each side."""
    return 2 ** (len(vae.config["block_out_channels"]) - 1)


def _require_multiple(vae: Vae, image: Tensor) -> None:
    height, width = image.shape[-2:]
    if height % factor(vae) or width % factor(vae):
        raise UserError(
            f"autoencoder: a picture of {width}x{height} pixels does not divide by {factor(vae)}; crop or resize it"
        )


def at_once(height: int, width: int) -> int:
    """How many pictures of so many pixels go through an autoencoder together: of 512 x 512 one.

    Stable Diffusion's needs about a GiB for each such picture in float32, more than its U-Net for several of them; and
    one of that size keeps a GPU busy.
    """
    return max(1, 512 * 512 // (height * width))


def encode_moments(vae: Vae, image: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the raw latents of pictures; an AutoencoderTiny gives one latent, not a spread.

    Args:
        vae: the autoencoder.
        image: [b, 3, h, w] in [-1, 1]; h and w multiples of the factor f.

    Returns:
        Two tensors [b, c, h/f, w/f].

    Raises:
        UserError: the picture's sides do not divide by the factor.
    """
    _require_multiple(vae, image)
    parts = [_encode_raw(vae, part) for part in image.split(at_once(*image.shape[2:]))]
    means, stds = zip(*parts, strict=True)
    return torch.cat(means), torch.cat(stds)


def _encode_raw(vae: Vae, image: Tensor) -> tuple[Tensor, Tensor]:
    posterior = vae.encode(image, return_dict=False)[0]
    if isinstance(posterior, Tensor):
        return posterior, torch.zeros_like(posterior)
    return posterior.mean, posterior.std


def sample_latents(mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """Raw latents drawn from the posterior: `mean + std * noise`, all [b, c, h, w], noise standard normal."""
    return mean + std * noise


def _shift_and_scale(vae: Vae) -> tuple[float, float]:
    return vae.config["shift_factor"] or 0.0, vae.config["scaling_factor"]


def latents_of(vae: Vae, z: Tensor) -> Tensor:
    """The latents that diffusion works on, from raw latents z [b, c, h, w]: `(z - shift_factor) * scaling_factor`."""
    shift, scale = _shift_and_scale(vae)
    return (z - shift) * scale


def decode(vae: Vae, latents: Tensor) -> Tensor:
    """Pictures [b, 3, h*f, w*f], about [-1, 1] and not clamped, from the latents [b, c, h, w] of diffusion."""
    shift, scale = _shift_and_scale(vae)
    together = at_once(*(factor(vae) * side for side in latents.shape[2:]))
    return torch.cat([_decode_raw(vae, part / scale + shift) for part in latents.split(together)])


def _decode_raw(vae: Vae, z: Tensor) -> Tensor:
    raw: Any = z  # annotated as a legacy tensor type by the library
    return vae.decode(raw, return_dict=False)[0]


@torch.no_grad()
def fold_whitening(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Make the raw latents white by changing two 1x1 convolutions; what is decoded stays the same.

    New raw latents are `(z - mean) / std` per channel, so the scaling factor becomes 1 and the shift factor 0, whatever
    they were. The mean rows of `quant_conv` take the whole map; its log-variance rows lose `2 ln(std)` in the
    bias; `post_quant_conv` undoes it: W (std z' + mean) + b. The old scaling is part of what is folded: pictures
    decoded from the latents of diffusion are the same before and after.

    Args:
        vae: changed in place.
        mean: [c], mean of the raw latents (as `encode_moments` and `sample_latents` give them) over the data.
        std: [c], their standard deviation.

    Raises:
        UserError: a channel does not vary or is not finite, or the autoencoder lacks one of the two convolutions.
    """
    quant, post = vae.quant_conv, vae.post_quant_conv
    if quant is None or post is None:
        raise UserError("autoencoder: whitening needs quant_conv and post_quant_conv, this one was made without them")
    channels = vae.config["latent_channels"]
    assert mean.shape == std.shape == (channels,), f"expected [{channels}], got {mean.shape} and {std.shape}"
    mean, std = mean.to(quant.weight.device, torch.float64), std.to(quant.weight.device, torch.float64)
    usable = torch.isfinite(mean) & torch.isfinite(std) & (std > 0)
    if not usable.all():
        bad = (~usable).nonzero().flatten().tolist()
        raise UserError(
            f"autoencoder: latent channels {bad} with means {mean[bad].tolist()} and standard deviations "
            f"{std[bad].tolist()} cannot be whitened; train longer or with fewer latent channels"
        )
    assert quant.bias is not None
    assert post.bias is not None
    # In float64, so that the folded weights are the exact product rounded once.
    weight, bias = quant.weight.double(), quant.bias.double()
    weight[:channels] /= std.view(-1, 1, 1, 1)
    bias[:channels] = (bias[:channels] - mean) / std
    bias[channels:] -= 2 * std.log()
    quant.weight.copy_(weight)
    quant.bias.copy_(bias)

    weight, bias = post.weight.double(), post.bias.double()
    bias += weight[:, :, 0, 0] @ mean
    weight *= std.view(1, -1, 1, 1)
    post.weight.copy_(weight)
    post.bias.copy_(bias)
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """Divergence of N(mean, exp(logvar)) from N(0, 1) in nats per latent value, averaged; a scalar.

    Args:
        mean: [b, c, h, w].
        logvar: [b, c, h, w], logarithm of the variance. Source: arXiv 1312.6114 appendix B.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()


class Reconstruction(NamedTuple):
    """What one training forward of the autoencoder gives.

    `reconstruction` [b, 3, h, w] in about [-1, 1]; `mean` and `logvar` [b, c, h/f, w/f] of the raw latents.
    """

    reconstruction: Tensor
    mean: Tensor
    logvar: Tensor


class AutoencoderForTraining(nn.Module):
    """Encoder, draw and decoder behind one `forward`, because data-parallel wrappers see only that."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, image: Tensor, noise: Tensor) -> Reconstruction:
        """Reconstruct pictures through latents drawn with the given noise.

        Args:
            image: [b, 3, h, w] in [-1, 1].
            noise: [b, c, h/f, w/f], standard normal; zeros decode the mean.

        Raises:
            UserError: the picture's sides do not divide by the factor.
        """
        _require_multiple(self.vae, image)
        posterior = self.vae.encode(image, return_dict=False)[0]
        z = sample_latents(posterior.mean, posterior.std, noise)
        # Copies of the two views: FSDP watches what a network returns, and warns of views.
        return Reconstruction(_decode_raw(self.vae, z), posterior.mean.clone(), posterior.logvar.clone())

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the decoder's last convolution, where the adversarial weight is balanced."""
        weight = self.vae.decoder.conv_out.weight
        assert isinstance(weight, nn.Parameter)
        return weight


def noise_shape(vae: AutoencoderKL, image: Tensor) -> tuple[int, int, int, int]:
    """Shape (b, c, h/f, w/f) of the latents of pictures [b, 3, h, w]."""
    return (
        image.shape[0],
        vae.config["latent_channels"],
        image.shape[-2] // factor(vae),
        image.shape[-1] // factor(vae),
    )
