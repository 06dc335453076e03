"""Training the U-Net on latents and text states, as a rule cached ones; fine-tuning is this task from other weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from latentgen.core.rand import Draw
from latentgen.data.fetch import from_bytes
from latentgen.diffusion.forward import diffuse
from latentgen.diffusion.log_variance import LogVariance
from latentgen.diffusion.losses import Loss, mse
from latentgen.diffusion.noise import offset, perturbed, pyramid, pyramid_sizes, student
from latentgen.diffusion.noise_levels import importance, stratified, uniform
from latentgen.diffusion.noise_tables import NoiseTable
from latentgen.diffusion.parameterization import EDM, X0, Eps, Parameterization, V, per_example, to_x0
from latentgen.diffusion.variational import bound_term, interpolated_log_variance
from latentgen.engine.task import Phase
from latentgen.formats.model import Model
from latentgen.models.autoencoder import encode_moments, latents_of, sample_latents
from latentgen.models.context import Context, context_of, zero
from latentgen.models.text import encode_tokens
from latentgen.models.tokens import put
from latentgen.models.unet import attention_kernel, predict
from latentgen.pipelines.control import shown_to_it
from latentgen.pipelines.editing import hole_of, pixels
from latentgen.pipelines.generate import Request, generate
from latentgen.pipelines.pictures import grid, save_png
from latentgen.tasks.adapting import drawn
from latentgen.tasks.original import Original

LEVELS = 4
"""Parts of the noise levels whose errors are logged apart; each holds as many training examples."""

HOLE = np.array([255, 0, 160], dtype=np.uint8)
"""Colour of what is to be drawn anew, in previews."""

LEARNED_SCALE = 0.01
"""Of the gradient that teaches where losses are large: nothing to Adam, and the network is not clipped for it."""


@dataclass(frozen=True)
class Objective:
    """What the network is taught.

    Args:
        parameterization: what it predicts.
        density: (u `[b]` in (0, 1), parameterization) -> sigma `[b]`; None draws levels as often as their loss is
            large, which is learned along.
        weight: (sigma `[b]`, parameterization) -> weight `[b]` of each example's loss.
        posterior: "sample" learns draws from the autoencoder's posterior, "mean" its means.
        balanced: every level's weighted error is divided by its own mean, learned along.
        loss: (prediction, target `[b, c, h, w]`, fraction of the process's time, sigma `[b]`) -> `[b]`.
        vlb_weight: of the variational bound, which teaches the variance where the network has channels for it.
        offset_noise, pyramid_discount, input_perturbation: strengths of the kinds in `diffusion.noise`; 0 is none.
        mask_floor: what a pixel counts where the batch's mask is black, or darker than this.
    """

    parameterization: Parameterization
    density: Callable[[Tensor, Parameterization], Tensor] | None
    weight: Callable[[Tensor, Parameterization], Tensor]
    posterior: str = "sample"
    balanced: bool = False
    loss: Loss = mse
    vlb_weight: float = 0.001
    offset_noise: float = 0.0
    pyramid_discount: float = 0.0
    input_perturbation: float = 0.0
    mask_floor: float = 0.0


@dataclass(frozen=True)
class Noised:
    """One batch's draws.

    Args:
        x0, noise: `[b, c, h, w]`; `noise` is what the target speaks of.
        x: `[b, c, h, w]`, what the network is shown, before its scaling.
        sigma: `[b]`.
        share: `[b]`, what each example counts where its level was drawn more often than others (else 1).
        quantile: `[b]` in [0, 1], where sigma stands among the levels drawn.
        context: what the network reads of the captions.
        channels: `[b, k, h, w]`, shown beside x: mask and surroundings, to an inpainting network; None for others.
        control: `[b, 3, H, W]` in [0, 1], what a ControlNet is shown; None without one.
        pixels: `[b, 1, h, w]` in [0, 1], what each pixel of the latents counts in the loss; None where all count.
    """

    x0: Tensor
    noise: Tensor
    x: Tensor
    sigma: Tensor
    share: Tensor
    quantile: Tensor
    context: Context
    channels: Tensor | None = None
    control: Tensor | None = None
    pixels: Tensor | None = None


Networks = Mapping[str, Any]
"""The networks of a model by their names, wrapped, averaged or as they are."""


class DiffusionTask:
    """Teach the U-Net of `model`, or other networks of it through the U-Net's error, to denoise its latents.

    Args:
        model: the networks; those that are not trained take part as they are.
        trains: names of the networks that are trained, as `Model.networks` names them; of these what requires
            gradients.
        rates: of some of them the factor on the learning rate.
        previews: pictures drawn at every preview.
        columns: how many of them share a prompt and so a row.
        kernel: attention kernel while training, as `models.unet.attention_kernel` names them.
        dtype: what the U-Net computes in, which decides the kernel that "auto" takes.
        keeps: whether examples that the batch marks `kept` are to be predicted as they are before training.
    """

    name = "unet"

    def __init__(
        self,
        model: Model,
        objective: Objective,
        previews: Sequence[Request],
        *,
        columns: int,
        trains: Sequence[str] = ("unet",),
        rates: Mapping[str, float] | None = None,
        kernel: str = "auto",
        dtype: torch.dtype = torch.float32,
        keeps: bool = False,
    ) -> None:
        self.model, self.objective, self.previews, self.columns = model, objective, previews, columns
        self.kernel, self.dtype, self.rates = kernel, dtype, dict(rates or {})
        self._frozen = model.networks()
        self.original = Original(self._frozen) if keeps else None
        self.modules: dict[str, nn.Module] = {name: self._frozen.pop(name) for name in trains}
        self.averaged: tuple[str, ...] = tuple(trains)
        if objective.balanced or objective.density is None:
            self.modules["log_variance"] = LogVariance()

    def phases(self) -> tuple[Phase, ...]:
        """One optimizer for all that is trained."""
        words = ("tokens",) if "tokens" in self.modules else ()
        return (Phase("unet", tuple(self.modules), rates=self.rates, no_decay=words),)

    def _networks(self) -> Networks:
        return {**self._frozen, **self.modules}

    def _device(self) -> torch.device:
        return next(self.model.unet.parameters()).device  # the library's own property walks through all modules

    def draws(self, batch: Any, draw: Draw) -> Noised:
        """The random part of a step, a function of the step, the position in the global batch and, where levels are
        drawn by their loss, of what has been learned of it."""
        u = stratified(draw.uniform("level"), draw.permutation("stratum"), draw.global_batch)
        sigma, share = self._levels(u)
        if "weight" in batch:
            share = share * batch["weight"].to(share.device)
        return self._noised(self._networks(), batch, draw, u, sigma, share)

    def _noised(self, networks: Networks, batch: Any, draw: Draw, u: Tensor, sigma: Tensor, share: Tensor) -> Noised:
        device = self._device()
        z, std = self._moments(networks, batch)
        shape = z.shape[1:]
        if self.objective.posterior == "sample":
            z = sample_latents(z, std, draw.normal("posterior", shape).to(z.device))
        x0 = latents_of(self.model.vae, z).to(device)
        noise = self._noise(draw, shape)
        shown = noise
        if self.objective.input_perturbation > 0:
            shown = perturbed(noise, draw.normal("perturbation", shape), self.objective.input_perturbation)
        x = diffuse(x0, shown.to(device), sigma)
        return Noised(
            *(x0, noise.to(device), x, sigma, share, u.to(device), self._context(networks, batch)),
            channels=self._channels(networks, batch),
            control=batch["control"].to(device) if "control" in batch else None,
            pixels=self._pixels(batch, shape[1], shape[2]),
        )

    @torch.no_grad()
    def _moments(self, networks: Networks, batch: Any) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of raw latents `[b, c, h, w]`: cached, or of pictures that are encoded here."""
        if "mean" in batch:
            return batch["mean"], batch["std"]
        device = self._device()
        with torch.autocast(device.type, enabled=False):  # as for the cache: in half precision some VAEs overflow
            return encode_moments(networks["vae"], from_bytes(batch["image"].to(device)))

    def _pixels(self, batch: Any, height: int, width: int) -> Tensor | None:
        """What each pixel of the latents counts: the mean of the mask over the pixels that it stands for."""
        if "loss_mask" not in batch:
            return None
        mask = batch["loss_mask"].to(self._device()).float() / 255
        return functional.adaptive_avg_pool2d(mask, (height, width)).clamp_min(self.objective.mask_floor)

    def _context(self, networks: Networks, batch: Any) -> Context:
        """What the U-Net reads of the captions: cached, or encoded here where a text encoder is trained."""
        device = self._device()
        if "context" in batch:
            return context_of(batch, device)
        towers = self.model.towers
        encoders = [networks[tower.name] for tower in towers]
        if "tokens" in networks:
            put(networks["tokens"](), networks)
        context = encode_tokens(towers, [batch[tower.name].to(device) for tower in towers], encoders)
        if self.model.zero_empty:
            context = zero(context, batch["empty"].to(device))
        return context._replace(sizes=batch["sizes"].to(device)) if "sizes" in batch else context

    @torch.no_grad()
    def _channels(self, networks: Networks, batch: Any) -> Tensor | None:
        """The mask, in latents, and the latents of the picture outside of it, for an inpainting network."""
        if "mask" not in batch:
            return None
        device, mask = self._device(), batch["mask"]
        mean, _ = encode_moments(networks["vae"], (from_bytes(batch["image"]) * (1 - mask)).to(device))
        outside = latents_of(self.model.vae, mean)
        return torch.cat([functional.interpolate(mask.to(device), outside.shape[2:], mode="nearest"), outside], dim=1)

    def _levels(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """sigma `[b]`, and what each example counts `[b]`, on the network's device."""
        p, device = self.objective.parameterization, self._device()
        if self.objective.density is not None:
            sigma = self.objective.density(u, p).to(device)
            return sigma, torch.ones_like(sigma)
        with torch.no_grad():
            return importance(u.to(device), p, self.modules["log_variance"])

    def _noise(self, draw: Draw, shape: torch.Size) -> Tensor:
        """The noise of this objective `[b, c, h, w]`, on the CPU."""
        o, noise = self.objective, draw.normal("noise", shape)
        if o.pyramid_discount > 0:
            sizes = pyramid_sizes(shape[1], shape[2])
            coarser = [draw.normal(f"pyramid {i}", (shape[0], *size)) for i, size in enumerate(sizes)]
            noise = pyramid(noise, coarser, o.pyramid_discount)
        if o.offset_noise > 0:
            noise = offset(noise, draw.normal("offset", (shape[0], 1, 1)), o.offset_noise)
        if isinstance(o.parameterization, EDM) and o.parameterization.augmented_dim is not None:
            noise = student(noise, draw.uniform("radius"), o.parameterization.augmented_dim)
        return noise

    def losses(self, phase: str, batch: Any, draw: Draw) -> dict[str, Tensor]:
        """Means over the batch.

        `loss`: what is minimised; `error`: the squared error of the prediction without weights and masks, and of it
        `error/1` to `error/4`, the quarters of the noise levels from the cleanest to the noisiest; `vlb`, where the
        variance is learned: the variational bound's terms summed over all times, in bits per dimension, without masks.
        """
        d, p, o = self.draws(batch, draw), self.objective.parameterization, self.objective
        target = p.target(d.x0, d.noise, d.sigma)
        if self.original is not None:
            target = self._as_before(self.original, batch, d, target)
        error, each, out = self._errors(self._networks(), d, target, training=True)
        loss = each * d.share
        if "log_variance" in self.modules:
            u = self.modules["log_variance"](d.sigma)
            if o.balanced:
                loss = d.share * (each * torch.exp(-u) + u)
            else:  # learned beside the network: its gradient is added, its value is not
                learned = LEARNED_SCALE * (each.detach() * torch.exp(-u) + u)
                loss = loss + learned - learned.detach()
        values = {"error": error.mean(), **_by_level(error, d.quantile)}
        if self.model.learned_variance:
            vlb = _vlb(p, out[:, : d.x.shape[1]].detach(), out[:, d.x.shape[1] :], d) * d.share
            loss, values["vlb"] = loss + o.vlb_weight * vlb, vlb.mean()
        return {"loss": loss.mean(), **values}

    def _as_before(self, original: Original, batch: Any, d: Noised, target: Tensor) -> Tensor:
        """`target`, but of the examples that are kept what the model predicted of them before it was trained."""
        rows = batch["kept"].nonzero()[:, 0]
        some = rows if len(rows) else torch.arange(1)  # all processes ask, because cut networks meet to be asked
        with original.networks() as networks:
            context = self._context(networks, {name: value[some] for name, value in batch.items()})
            chosen = some.to(target.device)
            channels = None if d.channels is None else d.channels[chosen]
            out = self._predict(
                networks, replace(d, x=d.x[chosen], sigma=d.sigma[chosen], context=context, channels=channels)
            )
        return target.index_copy(0, chosen, out[:, : target.shape[1]]) if len(rows) else target

    def _predict(self, networks: Networks, d: Noised, *, training: bool = False) -> Tensor:
        """All that the U-Net gives, in float32."""
        c = self.objective.parameterization.scalings(d.sigma)
        with attention_kernel(self.kernel, device=d.x.device, dtype=self.dtype, training=training):
            x_in = per_example(c.c_in, d.x) * d.x
            return predict(networks, x_in, c.c_noise, d.context, channels=d.channels, control=d.control).float()

    def _errors(
        self, networks: Networks, d: Noised, target: Tensor, *, training: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of each example `[b]` the squared error and the weighted loss; and all that the network gives."""
        p, o = self.objective.parameterization, self.objective
        out = self._predict(networks, d, training=training)
        prediction = out[:, : d.x.shape[1]]
        fraction = p.fraction_of_sigma(d.sigma)
        error = mse(prediction, target, fraction, d.sigma)
        plain = o.loss is mse and d.pixels is None
        each = (error if plain else o.loss(prediction, target, fraction, d.sigma, d.pixels)) * o.weight(d.sigma, p)
        return error, each, out

    @torch.no_grad()
    def measure(self, averaged: Mapping[str, nn.Module], batch: Any, draw: Draw) -> dict[str, Tensor]:
        """Of each example `[b]`: `loss`, weighted but for what is learned along, and `error`, the plain squared error.

        `draw.step` is the part of the noise levels, from the cleanest 0 to `LEVELS` - 1; in each the examples' levels
        are stratified. They are drawn as training draws them, or uniformly where that is learned.
        """
        o, device = self.objective, self._device()
        u = stratified(draw.uniform("level"), draw.permutation("stratum"), draw.global_batch)
        u = (draw.step + u) / LEVELS
        sigma = (o.density or uniform)(u, o.parameterization).to(device)
        networks = {**self._frozen, **averaged}
        d = self._noised(networks, batch, draw, u, sigma, torch.ones_like(sigma))
        target = o.parameterization.target(d.x0, d.noise, d.sigma)
        error, each, _ = self._errors(networks, d, target, training=False)
        return {"loss": each, "error": error}

    def preview(self, averaged: Mapping[str, nn.Module], step: int, folder: Path) -> dict[str, float]:
        """Draw the preview requests with the averaged networks; what a row begins from stands at its end."""
        with drawn(self.model, averaged) as model:
            pictures = list(generate(model, self.previews))
        rows = [pictures[at : at + self.columns] for at in range(0, len(pictures), self.columns)]
        shown = [[*row, *_given(first)] for row, first in zip(rows, self.previews[:: self.columns], strict=True)]
        prompts = [request.prompt for request in self.previews[:: self.columns]]
        columns = len(shown[0])
        sheet = grid(list(chain.from_iterable(shown)), columns, prompts, scale=max(1, 128 // pictures[0].width))
        layout = {"captions": prompts, "columns": columns}
        save_png(sheet, folder / f"{step:08d}.png", recipe=layout)
        return {}


def _given(request: Request) -> list[Image.Image]:
    """The pictures that a request begins from: its image, coloured where it is drawn anew, and what it follows."""
    found = []
    if request.image is not None:
        picture = pixels("--image", request.image, request)
        if request.mask is not None:
            picture = np.where(hole_of(request)[..., None], HOLE, picture)
        found.append(Image.fromarray(picture))
    if request.control is not None:
        found.append(Image.fromarray(shown_to_it(request)))
    return found


def _by_level(error: Tensor, quantile: Tensor) -> dict[str, Tensor]:
    """The mean error of each part of the noise levels, as means over the batch.

    A part holds 1 / LEVELS of the global batch, because levels are stratified: the mean over the batch of LEVELS times
    the error of its members is their mean, however the batch is cut, and no counts have to be carried along. (It is
    exact where LEVELS divides the global batch, and right on average where it does not.)
    """
    part = (quantile * LEVELS).long().clamp(max=LEVELS - 1)
    return {f"error/{k + 1}": LEVELS * (error.detach() * (part == k)).mean() for k in range(LEVELS)}


def _vlb(p: Parameterization, prediction: Tensor, head: Tensor, d: Noised) -> Tensor:
    """T times one term of the variational bound, from each example's time to the one before. `[b]`, bits per dimension.

    Where times are drawn uniformly its mean is the sum of all T terms (arXiv 2102.09672, eq. 4 and 16, lambda = 0.001).
    Another density weighs the terms, but each has its own optimum of the variance, which stays where it is. The mean is
    not taught by it, as in the paper.
    """
    assert isinstance(p, Eps | V | X0)
    table: NoiseTable = p.table
    t = table.t_of_sigma(d.sigma)
    below = torch.where(t >= 1, table.sigma_of_t(t - 1), torch.zeros_like(t))
    spread = interpolated_log_variance(head, d.sigma, below)
    x0_hat = to_x0(p, prediction, d.x, d.sigma)
    return table.num_timesteps * bound_term(d.x0, d.x, x0_hat, spread, d.sigma, below)
