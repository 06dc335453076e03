"""Training the autoencoder: reconstruction + KL, then optionally a perceptual and an adversarial loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from latentgen.core.files import write_folder, write_json
from latentgen.core.rand import Draw
from latentgen.core.tensors import require_finite
from latentgen.data.fetch import from_bytes, to_tensor
from latentgen.data.sources.base import Source
from latentgen.engine.task import Phase
from latentgen.models.autoencoder import (
    AutoencoderForTraining,
    Reconstruction,
    encode_moments,
    fold_whitening,
    kl_divergence,
    noise_shape,
    sample_latents,
)
from latentgen.models.critics import (
    PatchCritic,
    Perceptual,
    adaptive_weight,
    hinge_critic_loss,
    hinge_generator_loss,
)
from latentgen.models.quality import psnr, ssim
from latentgen.pipelines.pictures import grid, save_png, to_pictures


@dataclass(frozen=True)
class VaeLosses:
    """Weights of the terms of the loss (arXiv 2112.10752, appendix G). Zero leaves a term out."""

    pixel: str = "l1"
    kl: float = 1e-6
    perceptual: float = 0.0
    perceptual_weights: str | None = None
    critic: float = 0.0
    critic_start: int = 0
    critic_channels: int = 32


SHOWN = 8
"""Held-out pictures in a preview."""

PIXEL_LOSSES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "l1": lambda error: error.abs().mean(),
    "l2": lambda error: error.square().mean(),
    "l1_l2": lambda error: 0.5 * error.abs().mean() + error.square().mean(),
}


class VaeTask:
    """Teach an AutoencoderKL to compress the data.

    Args:
        vae: the network.
        held_out: pictures, uint8 `[h, w, 3]` of any shapes, on which PSNR and SSIM are measured.
    """

    name = "vae"

    def __init__(self, vae: AutoencoderKL, losses: VaeLosses, held_out: Sequence[NDArray[np.uint8]]) -> None:
        self.vae, self.weights, self.held_out = vae, losses, tuple(held_out)
        # On the CPU the narrow full-size convolutions run several times faster in this layout.
        trained = AutoencoderForTraining(vae).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.modules: dict[str, nn.Module] = {"vae": trained}
        self.averaged: tuple[str, ...] = ("vae",)
        self._trained = trained
        self._critic = PatchCritic(losses.critic_channels)
        if losses.critic > 0:
            self.modules["critic"] = self._critic
        self._perceptual = Perceptual(losses.perceptual_weights or "imagenet") if losses.perceptual > 0 else None

    def phases(self) -> tuple[Phase, ...]:
        """The autoencoder, and from `critic_start` on its critic."""
        if self.weights.critic > 0:
            return Phase("vae", ("vae",)), Phase("critic", ("critic",), start=self.weights.critic_start)
        return (Phase("vae", ("vae",)),)

    def losses(self, phase: str, batch: Any, draw: Draw) -> dict[str, Tensor]:
        """Means over the batch: `loss`, and its parts `pixel`, `kl`, `perceptual`, `adversarial`."""
        image = from_bytes(batch["image"].to(self.vae.device))
        if phase == "critic":
            with torch.no_grad():
                fake = self._reconstruct(image, draw).reconstruction
            self._critic.requires_grad_(True)
            critic = self.modules["critic"]
            return {"loss": hinge_critic_loss(critic(image), critic(fake))}
        out = self._reconstruct(image, draw)
        error = out.reconstruction - image
        pixel = PIXEL_LOSSES[self.weights.pixel](error)
        kl = kl_divergence(out.mean, out.logvar)
        parts = {"pixel": pixel, "kl": kl}
        reconstruction = pixel
        if self._perceptual is not None:
            parts["perceptual"] = self._perceptual.to(image.device)(out.reconstruction, image).mean()
            reconstruction = reconstruction + self.weights.perceptual * parts["perceptual"]
        loss = reconstruction + self.weights.kl * kl
        if self.weights.critic > 0 and draw.step >= self.weights.critic_start:
            # The critic judges here and learns in its own phase; called bare, no wrapper waits for its gradients.
            parts["adversarial"] = hinge_generator_loss(self._critic.requires_grad_(False)(out.reconstruction))
            balance = adaptive_weight(reconstruction, parts["adversarial"], self._trained.last_layer)
            loss = loss + self.weights.critic * balance * parts["adversarial"]
        return {"loss": loss, **parts}

    def _reconstruct(self, image: Tensor, draw: Draw) -> Reconstruction:
        shape = noise_shape(self.vae, image)[1:]
        return self.modules["vae"](image, draw.normal("posterior", shape).to(image.device))

    @torch.no_grad()
    def measure(self, averaged: Mapping[str, nn.Module], batch: Any, draw: Draw) -> dict[str, Tensor]:
        """Of each picture `[b]`: `loss`, the training loss without the critic, which changes; and of it `pixel`."""
        image = from_bytes(batch["image"].to(self.vae.device))
        noise = draw.normal("posterior", noise_shape(self.vae, image)[1:]).to(image.device)
        out = averaged["vae"](image, noise)
        pixel = torch.stack([PIXEL_LOSSES[self.weights.pixel](error) for error in out.reconstruction - image])
        kl = torch.stack([kl_divergence(*each) for each in zip(out.mean, out.logvar, strict=True)])
        loss = pixel + self.weights.kl * kl
        if self._perceptual is not None:
            distance = self._perceptual.to(image.device)(out.reconstruction, image)
            loss = loss + self.weights.perceptual * distance
        return {"loss": loss, "pixel": pixel}

    @torch.no_grad()
    def preview(self, averaged: Mapping[str, nn.Module], step: int, folder: Path) -> dict[str, float]:
        """Held-out pictures above their reconstructions; PSNR in dB and SSIM over all of them."""
        quality = torch.zeros(2, len(self.held_out), dtype=torch.float64)
        shown = min(SHOWN, len(self.held_out))
        pictures: dict[int, Image.Image] = {}
        for numbers in by_shape([picture.shape[:2] for picture in self.held_out]):
            image = to_tensor([self.held_out[i] for i in numbers]).to(self.vae.device)
            again = self._again(averaged["vae"], image)
            quality[:, numbers] = torch.stack([psnr(image, again).double().cpu(), ssim(image, again)])
            for row, i in enumerate(numbers):
                if i < shown:
                    pictures[i], pictures[shown + i] = to_pictures(torch.stack([image[row], again[row]]))
        rows = ("held-out pictures", "reconstructed")
        layout = {"captions": rows, "columns": shown}
        sheet = grid([pictures[i] for i in range(2 * shown)], shown, rows, scale=2)
        save_png(sheet, folder / f"{step:08d}.png", recipe=layout)
        return dict(zip(("psnr", "ssim"), quality.mean(dim=1).tolist(), strict=True))

    def _again(self, vae: nn.Module, image: Tensor) -> Tensor:
        parts = [vae(x, torch.zeros(noise_shape(self.vae, x), device=x.device)) for x in image.split(16)]
        return torch.cat([part.reconstruction for part in parts]).clamp(-1, 1)


def by_shape(shapes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Numbers of those of each shape, in their order."""
    found: dict[tuple[int, ...], list[int]] = {}
    for number, shape in enumerate(shapes):
        found.setdefault(shape, []).append(number)
    return list(found.values())


@torch.no_grad()
def latent_statistics(vae: AutoencoderKL, source: Source, seed: int, pictures: int = 2048) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `[c]` of the raw latents over about `pictures` evenly spread examples, in float64.

    They are those of draws from the posterior, also where diffusion will learn its means: a channel that the KL term
    has switched off has means near 0 and draws of width 1, and must not be blown up to the size of the others.
    """
    count, total, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    draws = torch.Generator().manual_seed(seed)
    chosen = range(0, len(source), max(1, len(source) // pictures))
    groups = by_shape([source.shape(i) for i in chosen])
    for part in (group[at : at + 32] for group in groups for at in range(0, len(group), 32)):
        image = to_tensor([source.image(chosen[number]) for number in part])
        mean, std = encode_moments(vae, image.to(vae.device))
        noise = torch.randn(mean.shape, generator=draws).to(mean.device)
        z = sample_latents(mean, std, noise).cpu().double()
        count += z.numel() // z.shape[1]
        total = total + z.sum(dim=(0, 2, 3))
        squares = squares + z.square().sum(dim=(0, 2, 3))
    mean = total / count
    return mean, (squares / count - mean.square()).clamp_min(0).sqrt()


def finish_vae(averaged: nn.Module, source: Source, seed: int, folder: Path) -> None:
    """Whiten the trained autoencoder on the data and write it, in diffusers' layout, to `folder`.

    The measured mean and standard deviation are folded into its weights and kept in `latent_statistics.json`.
    """
    assert isinstance(averaged, AutoencoderForTraining)
    vae = copy.deepcopy(averaged.vae).cpu()  # not every device has float64
    mean, std = latent_statistics(vae, source, seed)
    fold_whitening(vae, mean, std)
    require_finite(vae.state_dict(), "the whitened autoencoder")

    def fill(aside: Path) -> None:
        vae.save_pretrained(aside)
        write_json(aside / "latent_statistics.json", {"mean": mean.tolist(), "std": std.tolist()})

    write_folder(folder, fill)
