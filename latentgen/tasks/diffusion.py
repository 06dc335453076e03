"""Training the U-Net on cached latents and text states; fine-tuning is this task from other weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from latentgen.core.rand import Draw
from latentgen.diffusion.log_variance import LogVariance
from latentgen.diffusion.losses import denoising_loss
from latentgen.diffusion.noise_levels import stratified
from latentgen.diffusion.parameterization import Parameterization, per_example
from latentgen.engine.task import Phase
from latentgen.formats.model_folder import Model
from latentgen.models.autoencoder import latents_of, sample_latents
from latentgen.models.unet import attention_kernel
from latentgen.pipelines.generate import Request, generate
from latentgen.pipelines.pictures import grid, save_png


@dataclass(frozen=True)
class Objective:
    """What the network is taught.

    Args:
        parameterization: what it predicts.
        density: (u `[b]` in (0, 1), parameterization) -> sigma `[b]`.
        weight: (sigma `[b]`, parameterization) -> weight `[b]` of each example's loss.
        posterior: "sample" learns draws from the autoencoder's posterior, "mean" its means.
        balanced: every level's weighted error is divided by its own mean, learned along.
    """

    parameterization: Parameterization
    density: Callable[[Tensor, Parameterization], Tensor]
    weight: Callable[[Tensor, Parameterization], Tensor]
    posterior: str = "sample"
    balanced: bool = False


@dataclass(frozen=True)
class Noised:
    """One batch's draws: `x0`, `noise` `[b, c, h, w]`, `sigma` `[b]`, `context` `[b, t, d]`."""

    x0: Tensor
    noise: Tensor
    sigma: Tensor
    context: Tensor


class DiffusionTask:
    """Teach the U-Net of `model` to denoise its latents.

    Args:
        model: the networks; only the U-Net is trained, the others draw previews.
        previews: pictures drawn at every preview.
        columns: how many of them share a prompt and so a row.
        kernel: attention kernel while training, as `models.unet.attention_kernel` names them.
        dtype: what the U-Net computes in, which decides the kernel that "auto" takes.
    """

    name = "unet"

    def __init__(
        self,
        model: Model,
        objective: Objective,
        previews: Sequence[Request],
        *,
        columns: int,
        kernel: str = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model, self.objective, self.previews, self.columns = model, objective, previews, columns
        self.kernel, self.dtype = kernel, dtype
        self.modules: dict[str, nn.Module] = {"unet": model.unet}
        self.averaged: tuple[str, ...] = ("unet",)
        if objective.balanced:
            self.modules["log_variance"] = LogVariance()

    def phases(self) -> tuple[Phase, ...]:
        """One optimizer for all that is trained."""
        return (Phase("unet", tuple(self.modules)),)

    def draws(self, batch: Any, draw: Draw) -> Noised:
        """The random part of a step, a pure function of the step and the position in the global batch."""
        device, shape = self.model.unet.device, batch["mean"].shape[1:]
        z = batch["mean"]
        if self.objective.posterior == "sample":
            z = sample_latents(z, batch["std"], draw.normal("posterior", shape))
        u = stratified(draw.uniform("level"), draw.permutation("stratum"), draw.global_batch)
        sigma = self.objective.density(u, self.objective.parameterization)
        noise = draw.normal("noise", shape)
        return Noised(
            latents_of(self.model.vae, z).to(device), noise.to(device), sigma.to(device), batch["context"].to(device)
        )

    def losses(self, phase: str, batch: Any, draw: Draw) -> dict[str, Tensor]:
        """`loss`: the weighted squared error of the prediction, or its likelihood; `error`: without weights."""
        d, p = self.draws(batch, draw), self.objective.parameterization
        c = p.scalings(d.sigma)
        x = d.x0 + per_example(d.sigma, d.noise) * d.noise
        unet = self.modules["unet"]
        with attention_kernel(self.kernel, device=x.device, dtype=self.dtype, training=True):
            x_in = per_example(c.c_in, x) * x
            prediction = unet(x_in, c.c_noise, encoder_hidden_states=d.context, return_dict=False)[0]
        target = p.target(d.x0, d.noise, d.sigma)
        error = denoising_loss(prediction.float(), target, torch.ones_like(d.sigma))
        weighted = error * self.objective.weight(d.sigma, p)
        if self.objective.balanced:
            u = self.modules["log_variance"](d.sigma)
            weighted = weighted * torch.exp(-u) + u
        return {"loss": weighted.mean(), "error": error.mean()}

    def preview(self, averaged: Mapping[str, nn.Module], step: int, folder: Path) -> dict[str, float]:
        """Draw the preview requests with the averaged U-Net."""
        unet = averaged["unet"]
        assert isinstance(unet, UNet2DConditionModel)
        pictures = list(generate(dataclasses.replace(self.model, unet=unet), self.previews))
        prompts = [request.prompt for request in self.previews[:: self.columns]]
        sheet = grid(pictures, self.columns, prompts, scale=max(1, 128 // pictures[0].width))
        save_png(sheet, folder / f"{step:08d}.png")
        return {}
