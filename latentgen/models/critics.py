"""Judges of the autoencoder's pictures: a patch discriminator with hinge losses and a perceptual distance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.nn import functional

from latentgen.core.errors import UserError
from latentgen.core.processes import rank_and_world

MAX_ADAPTIVE_WEIGHT = 1e4
ADAPTIVE_DELTA = 1e-4
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VGG_TAPS = (3, 8, 15, 22, 29)  # the last rectifier before each pooling of VGG-16, and of the last block
# arXiv 1409.1556, table 1, column D: blocks of (convolutions, width), with a pooling between blocks.
VGG_BLOCKS = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))


class PatchCritic(nn.Module):
    """A convolutional discriminator that scores overlapping patches (arXiv 1611.07004 section 3.2.2).

    Group normalisation in place of batch normalisation: a picture's score depends neither on its batch nor on the
    number of processes.
    """

    def __init__(self, channels: int = 64, layers: int = 3, in_channels: int = 3, norm_groups: int = 8) -> None:
        """Make the network.

        Args:
            channels: width of the first convolution; it doubles with each layer, up to 8 times.
            layers: convolutions with stride 2; patches of 34 pixels with 2, 70 with 3.
            in_channels: channels of the pictures.
            norm_groups: groups of each normalisation.

        Raises:
            UserError: no layers, or `norm_groups` does not divide `channels`.
        """
        super().__init__()
        if layers < 1 or channels < 1 or norm_groups < 1 or channels % norm_groups:
            raise UserError(
                f"critic: layers {layers} must be 1 or more, and norm_groups {norm_groups} divide channels {channels}"
            )
        widths = [channels * min(2**level, 8) for level in range(layers + 1)]
        body: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, layers + 1):
            stride = 2 if level < layers else 1
            body += [
                nn.Conv2d(widths[level - 1], widths[level], 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(norm_groups, widths[level]),
                nn.LeakyReLU(0.2),
            ]
        body.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.body = nn.Sequential(*body)

    def forward(self, image: Tensor) -> Tensor:
        """Scores [b, 1, h', w'] of the patches of pictures [b, c, h, w] in [-1, 1]; higher is more real."""
        return self.body(image)


def hinge_critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """What the critic minimises, a scalar: scores of real patches above 1, of made ones below -1 (arXiv 1705.02894)."""
    return 0.5 * (functional.relu(1.0 - real).mean() + functional.relu(1.0 + fake).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """What the autoencoder minimises, a scalar: minus the mean score of its pictures (arXiv 1705.02894)."""
    return -fake.mean()


def adaptive_weight(reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: Tensor) -> Tensor:
    """Weight of the adversarial loss that balances both gradients at the decoder's last layer (arXiv 2012.09841 eq. 7).

    `|grad reconstruction| / (|grad adversarial| + 1e-4)`, at most 1e4. With several processes both gradients are
    averaged first, so that every process uses the weight of the whole batch.

    Args:
        reconstruction_loss: scalar; its graph is kept.
        generator_loss: scalar; its graph is kept.
        last_layer: the weight with respect to which both gradients are taken.

    Returns:
        A scalar without gradient.
    """
    (reconstruction,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (adversarial,) = torch.autograd.grad(generator_loss, last_layer, retain_graph=True)
    _, world = rank_and_world()
    if world > 1:
        both = torch.stack([reconstruction, adversarial])
        distributed.all_reduce(both)
        reconstruction, adversarial = (both / world).unbind()
    weight = reconstruction.float().norm() / (adversarial.float().norm() + ADAPTIVE_DELTA)
    return weight.clamp(max=MAX_ADAPTIVE_WEIGHT).detach()


class Perceptual(nn.Module):
    """Distance between pictures in the features of VGG-16, in the manner of LPIPS (arXiv 1801.03924 section 3).

    Features of five depths are scaled to length 1 at each place, and their squared differences are averaged over places
    and added up. Unlike LPIPS there are no learned linear heads: all channels weigh the same, so the values
    are not comparable with published LPIPS numbers. The network is frozen.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: str | Path) -> None:
        """Make the network.

        Args:
            weights: a safetensors file with torchvision's VGG-16 names ("features.0.weight", ...), or "imagenet" for
                torchvision's own weights, which are downloaded once.

        Raises:
            UserError: the file is missing or does not hold the weights, or the download fails.
        """
        super().__init__()
        self.features = _vgg_features()
        self.features.load_state_dict(_vgg_weights(weights))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Perceptual:
        """Stay in evaluation mode whatever the module around it does."""
        del mode
        return super().train(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Distance [b] in [0, 10] of pictures [b, 3, h, w] in [-1, 1], sides of 16 pixels or more; 0 where equal."""
        total = first.new_zeros(first.shape[0])
        a, b = ((image * 0.5 + 0.5 - self.mean) / self.std for image in (first, second))
        for index, layer in enumerate(self.features):
            a, b = layer(a), layer(b)
            if index in VGG_TAPS:
                total = total + (_unit(a) - _unit(b)).square().sum(dim=1).mean(dim=(1, 2))
        return total


def _unit(features: Tensor) -> Tensor:
    # The small number inside the root keeps the gradient finite where all channels are zero.
    return features / (features.square().sum(dim=1, keepdim=True) + 1e-10).sqrt()


def _vgg_features() -> nn.Sequential:
    """The convolutions of VGG-16 in torchvision's numbering, without its last pooling and its classifier."""
    layers: list[nn.Module] = []
    before = 3
    for convolutions, width in VGG_BLOCKS:
        if layers:
            layers.append(nn.MaxPool2d(2, 2))
        for _ in range(convolutions):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            before = width
    return nn.Sequential(*layers)


def _vgg_weights(source: str | Path) -> dict[str, Tensor]:
    if source == "imagenet":
        state = _download_imagenet()
    elif Path(source).is_file():
        try:
            state = load_file(source)
        except Exception as error:  # safetensors has its own error class
            raise UserError(f"perceptual: {source} is not a whole safetensors file: {error}") from error
    else:
        raise UserError(f'perceptual: no weights at {source}; give a safetensors file of VGG-16 or "imagenet"')
    named = {
        name.removeprefix("features."): value for name, value in state.items() if not name.startswith("classifier")
    }
    wanted = _vgg_features().state_dict()
    wrong = sorted(name for name in wanted if name not in named or named[name].shape != wanted[name].shape)
    if wrong:
        raise UserError(f"perceptual: {source} is no VGG-16, features.{wrong[0]} is missing or has another shape")
    return {name: named[name] for name in wanted}


def _download_imagenet() -> dict[str, Any]:
    from torchvision.models import VGG16_Weights

    try:
        state = VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except OSError as error:
        raise UserError(
            f"perceptual: torchvision cannot download its VGG-16 weights ({error}); give a safetensors file instead"
        ) from error
    return dict(state)
