"""Text to image: requests in, pictures out.

A picture depends on the weights and on its own request, not on the batch it happens to be drawn in: its noise comes
from its own generator, and the batch only shares the forward passes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from PIL import Image
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.diffusion import lookup
from latentgen.diffusion.guidance import CFG, batched, bind
from latentgen.diffusion.parameterization import X0, Denoiser, Eps, Flow, Parameterization, V, denoiser
from latentgen.diffusion.samplers import find_sampler
from latentgen.diffusion.schedules import SCHEDULES
from latentgen.formats.model_folder import Model
from latentgen.models.autoencoder import decode, factor
from latentgen.models.text import encode_text
from latentgen.pipelines.pictures import to_pictures


@dataclass(frozen=True)
class Request:
    """One picture, asked for completely.

    Args:
        prompt: what to draw.
        negative_prompt: what to stay away from; takes the place of the empty caption in guidance.
        seed: the picture's own seed.
        num_inference_steps: sampling steps, at least 1.
        guidance_scale: 1 draws from the model as it is; more follows the prompt harder.
        sampler: a name of `diffusion.samplers`.
        schedule: a name of `diffusion.schedules`; None is what the model's process was made for.
        height, width: pixels, multiples of the autoencoder's factor.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    num_inference_steps: int = 20
    guidance_scale: float = 4.0
    sampler: str = "dpmpp_2m"
    schedule: str | None = None
    height: int = 64
    width: int = 64


def check(request: Request, model: Model) -> None:
    """Raise `UserError` for a request the model cannot draw."""
    times = factor(model.vae)
    for name, side in (("height", request.height), ("width", request.width)):
        if side < times or side % times:
            raise UserError(f"--{name} {side}: must be a multiple of {times}, the model's latent factor")
    if request.num_inference_steps < 1:
        raise UserError(f"--steps {request.num_inference_steps}: the number of sampling steps must be at least 1")
    if not 0 <= request.guidance_scale < float("inf"):
        raise UserError(f"--guidance-scale {request.guidance_scale}: must not be negative, nor infinite")
    find_sampler(request.sampler)
    _sigmas(request, model)


@torch.no_grad()
def generate(
    model: Model, requests: Sequence[Request], *, batch_size: int = 8, on_step: Callable[[int], object] | None = None
) -> Iterator[Image.Image]:
    """Draw the requests, in their order.

    Args:
        batch_size: pictures drawn together; neighbours with equal settings share a batch.
        on_step: called after every sampling step with the number of pictures that took it.

    Raises:
        UserError: a request that the model cannot draw; nothing has been drawn then.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: must be at least 1")
    for request in requests:
        check(request, model)
    for _, alike in groupby(requests, key=_settings):
        group = list(alike)
        for at in range(0, len(group), batch_size):
            batch = group[at : at + batch_size]
            yield from to_pictures(decode(model.vae, _latents(model, batch, on_step)))


def _sigmas(request: Request, model: Model) -> Tensor:
    """The noise levels `[n + 1]` that the request visits; by default those the model's process was made for."""
    parameterization = model.parameterization()
    if request.schedule is None and isinstance(parameterization, Flow):
        shift = float(model.schedule.get("shift", 1.0))
        return SCHEDULES["flow"](request.num_inference_steps, parameterization, shift=shift)
    schedule = lookup(SCHEDULES, request.schedule or usual_schedule(parameterization), "schedule")
    return schedule(request.num_inference_steps, parameterization)


def usual_schedule(parameterization: Parameterization) -> str:
    """Karras' levels, which put the steps where the picture is decided; the exported scheduler says the same.

    A table that ends in nothing but noise begins at a level that no power of levels leads down from: it takes its own
    times, evenly.
    """
    endless = isinstance(parameterization, Eps | V | X0) and parameterization.table.zero_terminal_snr
    return "trailing" if endless else "karras"


def _settings(request: Request) -> Request:
    return dataclasses.replace(request, prompt="", negative_prompt="", seed=0)


def start_noise(request: Request, channels: int, times: int) -> Tensor:
    """The picture's own standard normal noise `[1, c, h, w]`, drawn on the CPU whatever the device."""
    own = torch.Generator().manual_seed(request.seed)
    return torch.randn(1, channels, request.height // times, request.width // times, generator=own)


def _latents(model: Model, batch: list[Request], on_step: Callable[[int], object] | None) -> Tensor:
    """Sample the latents `[b, c, h, w]` of requests with equal settings."""
    first, device = batch[0], model.unet.device
    sigmas = _sigmas(first, model)
    noise = torch.cat([start_noise(r, model.vae.config["latent_channels"], factor(model.vae)) for r in batch])
    # Noise alone, as k-diffusion and diffusers start: the data's share of the spread is 0.2 percent at sigma_max 14.6.
    x = float(sigmas[0]) * noise.to(device)
    denoise = _denoiser(model, batch, model.parameterization())
    report = None if on_step is None else lambda i, x, x0_hat: on_step(len(batch))
    latents = find_sampler(first.sampler)(denoise, x, sigmas, on_step=report)
    return latents.to(model.vae.dtype)


def _denoiser(model: Model, batch: list[Request], parameterization: Parameterization) -> Denoiser:
    """Bind the batch's prompts and guidance: cond and uncond run in one forward pass."""
    states = {
        "cond": encode_text(model.text_encoder, model.tokenizer, [r.prompt for r in batch]),
        "uncond": encode_text(model.text_encoder, model.tokenizer, [r.negative_prompt for r in batch]),
    }

    def denoise_kinds(x: Tensor, sigma: Tensor, kinds: tuple[str, ...]) -> Tensor:
        context = torch.cat([states[kind] for kind in kinds]).to(model.unet.dtype)

        def network(x_in: Tensor, c_noise: Tensor) -> Tensor:
            return model.unet(x_in.to(model.unet.dtype), c_noise, encoder_hidden_states=context, return_dict=False)[0]

        return denoiser(parameterization, network)(x, sigma)

    return bind(CFG(batch[0].guidance_scale), batched(denoise_kinds))


def parameters_line(request: Request, model_name: str, model_hash: str) -> str:
    """The text that image viewers and other tools read back: prompt, negative prompt, settings."""
    negative = f"\nNegative prompt: {request.negative_prompt}" if request.negative_prompt else ""
    settings = (
        f"Steps: {request.num_inference_steps}, Sampler: {request.sampler}, CFG scale: {request.guidance_scale:g}, "
        f"Seed: {request.seed}, Size: {request.width}x{request.height}"
    )
    return f"{request.prompt}{negative}\n{settings}, Model hash: {model_hash[:10]}, Model: {model_name}"
