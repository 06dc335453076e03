"""Text to image: requests in, pictures out.

A picture depends on the weights and on its own request, not on the batch it happens to be drawn in: its noise comes
from its own generator, and the batch only shares the forward passes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.diffusion.brownian import brownian_noise
from latentgen.diffusion.guidance import canonical as canonical_guidance
from latentgen.diffusion.noise import student
from latentgen.diffusion.parameterization import EDM, Denoiser, Flow
from latentgen.diffusion.samplers import canonical, find_sampler, resolve
from latentgen.diffusion.samplers.single import ddpm
from latentgen.diffusion.schedules import find_schedule
from latentgen.diffusion.variational import LogVariances
from latentgen.diffusion.wrappers import masked
from latentgen.formats.fitted_schedules import Fitted, find_fitted
from latentgen.formats.model import Model
from latentgen.formats.scheduler import usual_schedule
from latentgen.models.autoencoder import decode, factor
from latentgen.pipelines.control import check_control, control_of
from latentgen.pipelines.editing import check_edit, given, steps_left, strength_of
from latentgen.pipelines.guiding import Wish, check_guidance, check_negative_prompt, guided, split_prompt, weak_model
from latentgen.pipelines.pictures import to_pictures
from latentgen.pipelines.prompts import check_chunks, chunks_of, cut_remarks, longest

FITTED = "fitted"
"""The schedule that `latentgen fit-schedule` found for the model, the sampler and the number of steps."""


@dataclass(frozen=True)
class Request:
    """One picture, asked for completely.

    Args:
        prompt: what to draw.
        negative_prompt: what to stay away from; takes the place of the empty caption in guidance.
        seed: the picture's own seed.
        num_inference_steps: sampling steps, at least 1.
        guidance_scale: 1 draws from the model as it is; more follows the prompt harder.
        guidance: how, beyond plain cfg: `NAME[,key=value]...` of `diffusion.guidance` each, such as
            "interval,low=0.3,high=6"; in any order.
        sampler: `NAME[,key=value]...`, a name of `diffusion.samplers` or what other tools call it, which may say the
            schedule too; such as "ddim,eta=0.5".
        schedule: a name of `diffusion.schedules` with its knobs, such as "karras,rho=5", or "fitted"; None is what the
            model's process was made for.
        height, width: pixels, multiples of the autoencoder's factor.
        image: file of a picture to start from; None starts from noise.
        mask: file of a picture, white where `image` is to be drawn anew, black where it stays; None is all white.
        strength: how much of the process is gone through, above 0 (keeps nearly all of `image`) up to 1 (keeps
            nothing of it where it is drawn); None is 1 with a mask and 0.8 without.
        control: file of a picture that the model's ControlNet is shown; it needs one, and no other model takes one.
        control_scale: how much of what the ControlNet says is added; 0 draws as without.
        control_start, control_end: shares of the steps from which and until which it counts.
        control_edges: it is shown the edges found in `control`.
        chunks: texts that are too long for the text encoder are read in at most so many pieces; None: in as many as
            they take, up to `models.chunks.MAX_CHUNKS`.
        emphasis: brackets say how much words count, as in "a (red:1.3) circle" (`models.emphasis`).
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    num_inference_steps: int = 20
    guidance_scale: float = 4.0
    guidance: tuple[str, ...] = ()
    sampler: str = "dpmpp_2m"
    schedule: str | None = None
    height: int = 64
    width: int = 64
    image: str | None = None
    mask: str | None = None
    strength: float | None = None
    control: str | None = None
    control_scale: float = 1.0
    control_start: float = 0.0
    control_end: float = 1.0
    control_edges: bool = False
    chunks: int | None = None
    emphasis: bool = True


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
    if not -(2**63) <= request.seed < 2**64:
        raise UserError(f"--seed {request.seed}: choose one of 64 bits, such as 0 to {2**63 - 1}")
    check_negative_prompt(request.guidance, request.negative_prompt)
    check_chunks(request)
    own_steps = find_sampler(request.sampler).own_steps
    check_edit(request, own_steps)
    check_control(request, model, own_steps)
    check_guidance(_wish(request, _sigmas(request, model)), model)
    if _augmented_dim(model) is not None and find_sampler(request.sampler).noise:
        raise UserError(f"--sampler {request.sampler}: it adds normal noise, which is not PFGM++'s; choose heun")


def spread(request: Request, prompts: Sequence[str], num: int) -> list[Request]:
    """`num` pictures of each prompt, whose seeds count up from the request's."""
    seeds = range(request.seed, request.seed + num)
    return [dataclasses.replace(request, prompt=prompt, seed=seed) for prompt in prompts for seed in seeds]


def steps_of(requests: Sequence[Request]) -> int | None:
    """How many steps `generate` will report of these; None where only drawing them can tell."""
    if any(find_sampler(request.sampler).own_steps for request in requests):
        return None
    return sum(max(1, int(strength_of(request) * request.num_inference_steps)) for request in requests)


@torch.no_grad()
def generate(
    model: Model, requests: Sequence[Request], *, batch_size: int = 8, on_step: Callable[[int], object] | None = None
) -> Iterator[Image.Image]:
    """Draw the requests, in their order.

    Args:
        batch_size: pictures drawn together; neighbours with equal settings share a batch.
        on_step: called after every sampling step with the number of pictures that took it.

    Raises:
        UserError: a request that the model cannot draw, and nothing has been drawn then; or a picture comes out that is
            not finite.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: must be at least 1")
    for request in requests:
        check(request, model)
    weak = {guidance: weak_model(guidance, model) for guidance in dict.fromkeys(r.guidance for r in requests)}
    for _, alike in groupby(requests, key=lambda request: _settings(request, model)):
        group = list(alike)
        for at in range(0, len(group), batch_size):
            batch = group[at : at + batch_size]
            latents = _latents(model, weak[batch[0].guidance], batch, on_step)
            _require_finite(latents, "the U-Net", model.unet.dtype)
            pictures = decode(model.vae, latents)
            _require_finite(pictures, "the autoencoder", model.vae.dtype)
            yield from to_pictures(pictures)


def _require_finite(values: Tensor, network: str, dtype: torch.dtype) -> None:
    """Raise `UserError` in place of a black picture."""
    if bool(values.isfinite().all()):
        return
    if dtype == torch.float32:
        raise UserError(f"{network} gives numbers that are not finite; its weights are broken, fetch the model again")
    name = str(dtype).removeprefix("torch.")
    raise UserError(
        f"{network} gives numbers that are not finite in {name}: say --dtype bf16, or fp32; where that needs too much "
        "memory, use a model whose autoencoder was made for fp16"
    )


def _sigmas(request: Request, model: Model) -> Tensor:
    """The noise levels `[n + 1]` that the request visits; by default those the model's process was made for."""
    if request.schedule == FITTED:
        _, implied = resolve(request.sampler)
        if implied is not None:
            raise UserError(f"--sampler {request.sampler!r} means schedule {implied!r}: leave out --schedule fitted.")
        return _fitted(request, model).sigmas
    parameterization = model.parameterization()
    _, name = resolve(request.sampler, request.schedule)
    if name is None and find_sampler(request.sampler).own_steps:
        return torch.tensor([parameterization.sigma_max, parameterization.sigma_min, 0.0])
    flow = isinstance(parameterization, Flow)
    make = find_schedule(request.schedule or name or ("flow" if flow else usual_schedule(parameterization)))
    if name in (None, "flow") and flow:  # the model's own shift, unless the user set one
        make = partial(make, **{"shift": float(model.schedule.get("shift", 1.0)), **make.keywords})
    return make(request.num_inference_steps, parameterization)


def _fitted(request: Request, model: Model) -> Fitted:
    sampler, guidance = canonical(request.sampler), canonical_guidance(request.guidance)
    return find_fitted(model.metadata, sampler, request.num_inference_steps, request.guidance_scale, guidance)


def remarks(request: Request, model: Model) -> list[str]:
    """What to know before drawing: that words are cut; that the fitted schedule was fitted with other guidance."""
    found = cut_remarks(request, model)
    if request.schedule != FITTED:
        return found
    levels, wanted = _fitted(request, model), canonical_guidance(request.guidance)
    if (levels.guidance_scale, levels.guidance) != (request.guidance_scale, wanted):
        fitted, asked = "; ".join(levels.guidance), "; ".join(wanted)
        found.append(
            f"--schedule fitted: fitted with {fitted} of scale {levels.guidance_scale:g}, not with {asked} of scale "
            f"{request.guidance_scale:g}; `latentgen fit-schedule` with this guidance may find a better one"
        )
    return found


def _settings(request: Request, model: Model) -> tuple[Request, tuple[float, ...], int]:
    """What the pictures of a batch have in common: all but their words and seeds, the weights of composed words, and
    the pieces that words are read in, so that no picture depends on the length of another's words."""
    _, weights = split_prompt(request.prompt, request.guidance)
    plain = dataclasses.replace(request, prompt="", negative_prompt="", seed=0)
    return plain, weights, chunks_of(request, model)


def _wish(request: Request, sigmas: Tensor) -> Wish:
    _, weights = split_prompt(request.prompt, request.guidance)
    size = (request.height, request.width)
    return Wish(
        *(request.guidance, request.guidance_scale, request.sampler, tuple(sigmas.tolist()), weights, size),
        emphasis=request.emphasis,
    )


def start_noise(request: Request, channels: int, times: int, augmented_dim: float | None = None) -> Tensor:
    """The picture's own noise `[1, c, h, w]`, drawn on the CPU whatever the device: standard normal, or PFGM++'s."""
    own = torch.Generator().manual_seed(request.seed)
    noise = torch.randn(1, channels, request.height // times, request.width // times, generator=own)
    return noise if augmented_dim is None else student(noise, torch.rand(1, generator=own), augmented_dim)


def _augmented_dim(model: Model) -> float | None:
    """The dimension D of a PFGM++ model, None for others."""
    parameterization = model.parameterization()
    return parameterization.augmented_dim if isinstance(parameterization, EDM) else None


def _latents(model: Model, weak: Model | None, batch: list[Request], on_step: Callable[[int], object] | None) -> Tensor:
    """Sample the latents `[b, c, h, w]` of requests with equal settings."""
    ready = prepare(model, batch, weak)
    report = None if on_step is None else lambda i, x, x0_hat: on_step(len(batch))
    own_noise = brownian_noise([r.seed for r in batch], ready.x)
    method = find_sampler(batch[0].sampler)
    learned = method.run is ddpm and not method.knobs  # whoever asks for a fixed variance gets it
    knobs = {"log_variance": ready.log_variance} if learned else {}
    latents = method(ready.denoise, ready.x, ready.sigmas, noise=own_noise, on_step=report, **knobs)
    return latents.to(model.vae.dtype)


class Prepared(NamedTuple):
    """What a sampler needs: x `[b, c, h, w]` at the first level, levels `sigmas` `[n + 1]`, the variance if learned."""

    denoise: Denoiser
    x: Tensor
    sigmas: Tensor
    log_variance: LogVariances | None


def prepare(model: Model, batch: Sequence[Request], weak: Model | None = None) -> Prepared:
    """Words, noise and levels of requests with equal settings, for ONE sampling call; `weak` is for autoguidance."""
    first, channels, times = batch[0], model.latent_channels, factor(model.vae)
    sigmas = steps_left(first, _sigmas(first, model))
    edit = given(model, batch)
    noise = torch.cat([start_noise(r, channels, times, _augmented_dim(model)) for r in batch])
    # Noise alone, as k-diffusion and diffusers start: the data's share of the spread is 0.2 percent at sigma_max 14.6.
    x = float(sigmas[0]) * noise.to(model.unet.device)
    if edit.latents is not None and strength_of(first) < 1:
        x = x + edit.latents
    prompts = [split_prompt(r.prompt, r.guidance)[0] for r in batch]
    negative, control = [r.negative_prompt for r in batch], control_of(model, batch, sigmas)
    wish = dataclasses.replace(_wish(first, sigmas), chunks=longest(batch, model))
    denoise, log_variance = guided(model, weak, wish, prompts, negative, edit.channels, control)
    if edit.mask is not None and edit.latents is not None:
        denoise = masked(denoise, edit.latents, edit.mask)
    return Prepared(denoise, x, sigmas, log_variance)


def parameters_line(request: Request, model_name: str, model_hash: str) -> str:
    """The text that image viewers and other tools read back: prompt, negative prompt, settings."""
    negative = f"\nNegative prompt: {request.negative_prompt}" if request.negative_prompt else ""

    def whole(text: str) -> str:
        return f'"{text}"' if "," in text else text  # because other tools split at commas

    schedule = f"Schedule type: {whole(request.schedule)}, " if request.schedule is not None else ""
    settings = (
        f"Steps: {request.num_inference_steps}, Sampler: {whole(request.sampler)}, {schedule}"
        f"CFG scale: {request.guidance_scale:g}, Seed: {request.seed}, Size: {request.width}x{request.height}"
    )
    if request.guidance:
        settings += f', Guidance: "{"; ".join(request.guidance)}"'
    if request.control is not None:
        settings += f", Control: {whole(Path(request.control).name)}, Control scale: {request.control_scale:g}"
    return f"{request.prompt}{negative}\n{settings}, Model hash: {model_hash[:10]}, Model: {model_name}"
