"""From the recipe's plain values to sources, networks and objectives: the one place that knows both."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from latentgen.core.errors import UserError
from latentgen.core.rand import seed_of
from latentgen.data.frame import Shape
from latentgen.data.loader import Cut
from latentgen.diffusion import lookup
from latentgen.diffusion.guidance import build as build_guidance
from latentgen.diffusion.guidance import parse
from latentgen.diffusion.losses import LOSSES, WEIGHTS
from latentgen.diffusion.noise_levels import DENSITIES
from latentgen.diffusion.parameterization import EDM
from latentgen.diffusion.samplers import find_sampler, resolve
from latentgen.engine.settings import LoopSettings
from latentgen.engine.trackers import check_trackers
from latentgen.formats.model import Model
from latentgen.formats.model_folder import load_metadata, load_model
from latentgen.models.autoencoder import Vae, build_autoencoder, factor, initialise
from latentgen.models.clip import Clip, ClipShape, build_clip
from latentgen.models.text import Tower, states_width
from latentgen.models.unet import build_unet
from latentgen.pipelines.generate import FITTED, Request, spread
from latentgen.pipelines.guiding import check_negative_prompt, split_prompt
from latentgen.recipe.process import check_objective, check_process, process
from latentgen.recipe.schema import Autoencoder, Recipe, TextEncoder, UNet
from latentgen.recipe.schema_data import Data
from latentgen.recipe.schema_finetune import Prior
from latentgen.tasks.diffusion import LEVELS, Objective
from latentgen.tasks.vae import VaeLosses

logger = logging.getLogger(__name__)


def check(recipe: Recipe, processes: int) -> None:
    """Raise `UserError` for mistakes that would otherwise show only when their stage begins."""
    own = {"vae": recipe.autoencoder.source, "clip": recipe.text_encoder.source, "unet": None}
    for stage in (stage for stage, source in own.items() if source is None):
        cut(recipe, stage, world=processes)
    check_trackers(recipe.train.trackers)
    if recipe.train.rollback_every is not None and recipe.train.spikes is None:
        raise UserError("train.rollback_every: it is spikes that a run goes back for; give train.spikes a number")
    check_process(recipe)
    _check_previews(recipe)
    _warn_of_ignored_data(recipe.data)
    for section in ("autoencoder", "text_encoder", "unet"):
        _warn_of_ignored(section, getattr(recipe, section))
    if recipe.text_encoder.contrasts and recipe.text_encoder.source is None and recipe.data.source != "shapes":
        logger.warning("text_encoder.contrasts is ignored: no captions are known to be false of a picture in a folder")
    prior = recipe.finetune.prior if recipe.finetune is not None else None
    if prior is not None and prior.path is not None and prior.pictures != Prior(prompt=prior.prompt).pictures:
        logger.warning("finetune.prior.pictures is ignored: all pictures of finetune.prior.path are used")
    if recipe.data.caption is not None and recipe.data.source == "shapes":
        logger.warning("data.caption is ignored: the pictures of data.source shapes have captions")
    validation = recipe.data.validation
    if validation is not None and recipe.data.source == "folder" and not Path(validation).is_dir():
        raise UserError(f"{validation}: no such folder; check data.validation")


def _check_previews(recipe: Recipe) -> None:
    """Raise `UserError` for previews that no model could draw; the rest is checked when there is one."""
    p = recipe.preview
    if p.schedule == FITTED:
        raise UserError("preview.schedule: fitted: a schedule is fitted to a finished model; choose another, or null")
    resolve(p.sampler, p.schedule)
    adds_noise = find_sampler(p.sampler).noise
    if adds_noise and recipe.unet.source is None and recipe.diffusion.augmented_dim is not None:
        raise UserError(f"preview.sampler: {p.sampler} adds normal noise, which is not PFGM++'s; choose heun")
    check_negative_prompt(p.guidance, p.negative_prompt)
    levels = range(p.num_inference_steps, -1, -1)
    prior = recipe.finetune.prior if recipe.finetune is not None else None
    made = prior.prompts() if prior is not None and prior.path is None else ()
    for prompt in (*p.prompts, *made):
        _, weights = split_prompt(prompt, p.guidance)
        build_guidance(parse(p.guidance), p.guidance_scale, p.sampler, levels, weights)


def _warn_of_ignored(name: str, section: Autoencoder | TextEncoder | UNet) -> None:
    """A network taken `from` a folder is as it is there: say which settings therefore have no effect."""
    if section.source is None:
        return
    plain = type(section).model_validate({"from": section.source})
    kept = {"source", "chunks", "posterior", "attention_kernel", "gradient_checkpointing"}
    changed = [key for key in type(section).model_fields if getattr(section, key) != getattr(plain, key)]
    for key in changed:
        if key not in kept:
            logger.warning("%s.%s is ignored, because %s.from is given", name, key, name)


_STORED = frozenset({"folder", "table", "shards", "datasets"})
_ACTS_ON: dict[str, frozenset[str]] = {
    "path": _STORED,
    "validation": _STORED,
    "split": _STORED - {"table"} | {"shapes"},  # reading shards warns of it, with what to do
    "subset": frozenset({"datasets"}),
    "streaming": frozenset({"datasets"}),
    "image_column": frozenset({"table", "datasets"}),
    "caption_columns": _STORED,
    "max_upscale": _STORED,
    "background": _STORED,
    "max_pixels": _STORED,
    "broken_share": _STORED,
    "size": frozenset({"shapes"}),
    "window": _STORED - {"folder"},
    "local": _STORED - {"folder"},
    "local_gib": frozenset({"shards"}),
}
"""Settings that not every source has a use for, and the sources that do."""


def _warn_of_ignored_data(data: Data) -> None:
    """Say which settings have no effect on the data that are there."""
    sources, plain = {part.source for part in data.parts()}, Data()
    for key, those in _ACTS_ON.items():
        if getattr(data, key) == getattr(plain, key):
            continue
        if data.source == "mixture" and key in ("path", "split", "validation"):
            logger.warning("data.%s is ignored: the parts of data.mixture have their own", key)
        elif not sources & those:
            logger.warning("data.%s is ignored with data.source: %s", key, data.source)
    if sources == {"shapes"}:
        for key in ("crop", "buckets", "mask"):
            if getattr(data, key) != getattr(plain, key):
                logger.warning("data.%s is ignored: the pictures of data.source shapes are whole squares", key)
    if data.buckets is None and data.bucket_step != plain.bucket_step:
        logger.warning("data.bucket_step is ignored without data.buckets")
    if data.mask is None and data.mask_floor != plain.mask_floor:
        logger.warning("data.mask_floor is ignored without data.mask")


def check_shapes(recipe: Recipe, shapes: Iterable[Shape], vae: Vae, unet: UNet2DConditionModel) -> None:
    """Raise `UserError` for shapes of pictures that the networks or their training cannot take."""
    a, data = recipe.autoencoder, recipe.data
    if data.buckets is None:
        return
    levels = 2 ** (len(unet.config["block_out_channels"]) - 1)
    if data.bucket_step % (factor(vae) * levels):
        raise UserError(
            f"data.bucket_step: {data.bucket_step} is not a multiple of {factor(vae) * levels}, what the autoencoder "
            f"({factor(vae)}) and the U-Net ({levels}) reduce pictures by; choose one"
        )
    least = min(min(shape) for shape in shapes)
    if a.source is None and a.patch is not None and a.patch > least:
        raise UserError(f"autoencoder.patch: {a.patch} is larger than {least}, the smallest side of data.buckets")
    if a.source is None and a.critic_weight > 0 and a.patch is None and least < 24:
        raise UserError(
            f"autoencoder.critic_weight: the critic needs pictures of 24 pixels or more, and the smallest side of "
            f"data.buckets is {least}; raise data.resolution, or lower data.buckets"
        )


def seeded(recipe: Recipe, stage: str) -> None:
    """Make the next network's random weights a function of the seed and the stage alone."""
    torch.manual_seed(seed_of(recipe.seed, stage, "init"))


def new_vae(recipe: Recipe) -> AutoencoderKL:
    """The autoencoder the recipe describes, with random weights."""
    a = recipe.autoencoder
    seeded(recipe, "vae")
    vae = build_autoencoder(
        resolution=recipe.data.resolution,
        latent_channels=a.latent_channels,
        channels=a.channels,
        layers_per_block=a.layers_per_block,
        norm_groups=a.norm_groups,
        mid_attention=a.mid_attention,
    )
    initialise(vae, a.initialise)
    return vae


def vae_losses(recipe: Recipe) -> VaeLosses:
    """The terms of the autoencoder's loss."""
    a = recipe.autoencoder
    return VaeLosses(
        pixel=a.loss,
        kl=a.kl_weight,
        perceptual=a.perceptual_weight,
        perceptual_weights=a.perceptual_weights,
        critic=a.critic_weight,
        critic_start=a.critic_start,
        critic_channels=a.critic_channels,
    )


def new_clip(recipe: Recipe, vocab_size: int, eos_token_id: int) -> Clip:
    """The two towers the recipe describes, with random weights, for a tokenizer of `vocab_size` tokens."""
    t = recipe.text_encoder
    seeded(recipe, "clip")
    return build_clip(
        ClipShape(
            image_size=recipe.data.resolution,
            vision=t.image.kind,
            patch_size=t.image.patch,
            vision_width=t.image.width,
            vision_layers=t.image.layers,
            vision_heads=t.image.heads,
            text_width=t.width,
            text_layers=t.layers,
            text_heads=t.heads,
            context_length=t.context_length,
            vocab_size=vocab_size,
            eos_token_id=eos_token_id,
            embed_dim=t.embed_dim,
        )
    )


def new_unet(recipe: Recipe, vae: Vae, context_dim: int) -> UNet2DConditionModel:
    """The denoising network the recipe describes, with random weights."""
    u = recipe.unet
    seeded(recipe, "unet")
    times = factor(vae)
    if recipe.data.resolution % times:
        raise UserError(f"data.resolution: {recipe.data.resolution} is not a multiple of {times}, the VAE's reduction")
    return build_unet(
        latent_size=recipe.data.resolution // times,
        latent_channels=vae.config["latent_channels"],
        channels=u.channels,
        layers_per_block=u.layers_per_block,
        attention=u.attention,
        heads=u.heads,
        context_dim=context_dim,
        transformer_layers=u.transformer_layers,
        norm_groups=u.norm_groups,
        dropout=u.dropout,
        pooled_text=u.pooled_text,
        time_scale_shift=u.time_scale_shift,
        learned_variance=recipe.diffusion.learned_variance,
    )


def new_model(recipe: Recipe, vae: Vae, towers: tuple[Tower, ...], zero_empty: bool = False) -> Model:
    """The whole model at the start of the U-Net stage: `unet.from`'s network and process, or new ones.

    Args:
        zero_empty: of the model that the text encoders come from.

    Raises:
        UserError: `unet.from` does not fit the VAE or the text encoder, or predicts something else than asked.
    """
    chunks = recipe.text_encoder.chunks
    if recipe.unet.source is None:
        prediction, schedule = process(recipe)
        unet = new_unet(recipe, vae, states_width(towers))
    else:
        start = load_model(Path(recipe.unet.source))
        require_fit(recipe, start, vae, states_width(towers))
        unet, prediction, schedule = start.unet, start.prediction, start.schedule
        if chunks < start.chunks:
            logger.warning(
                "text_encoder.chunks: %d, but %s was trained with %d", chunks, recipe.unet.source, start.chunks
            )
    model = Model(
        vae=vae,
        towers=towers,
        unet=unet,
        prediction=prediction,
        schedule=schedule,
        zero_empty=zero_empty,
        chunks=chunks,
    )
    model.require_fit("autoencoder, text_encoder and unet")
    return model


def require_fit(recipe: Recipe, start: Model, vae: Vae, context_dim: int) -> None:
    """Raise `UserError` unless the U-Net of `unet.from` fits the other two networks and predicts what is asked for."""
    target = recipe.diffusion.target
    if target is not None and target != start.prediction:
        raise UserError(
            f"diffusion.target: {target}, but the network of unet.from ({recipe.unet.source}) predicts "
            f"{start.prediction}; leave diffusion.target out"
        )
    for part, wanted, found in (
        ("autoencoder", start.latent_channels, vae.config["latent_channels"]),
        ("text_encoder", start.unet.config["cross_attention_dim"], context_dim),
    ):
        if wanted != found:
            raise UserError(
                f"{part}: unet.from expects width {wanted}, this one gives {found}; use `{part}.from` alike"
            )


def objective(recipe: Recipe, model: Model) -> Objective:
    """Noise levels, noise, loss and its weights.

    Raises:
        UserError: the settings do not fit the model, which may come from `unet.from`.
    """
    d, p, density = recipe.diffusion, model.parameterization(), _density(recipe)
    if density is not None:
        ends = density(torch.arange(1, LEVELS) / LEVELS, p).tolist()
        logger.info("error/1 to error/%d are logged of noise levels parted at sigma %s", LEVELS, _numbers(ends))
    check_objective(d, model.learned_variance, isinstance(p, EDM) and p.augmented_dim is not None)
    weight: Callable = lookup(WEIGHTS, d.weight, "weight")
    if d.weight in ("min_snr", "soft_min_snr"):
        weight = partial(weight, gamma=d.min_snr_gamma)
    elif d.weight == "p2":
        weight = partial(weight, k=d.p2_k, gamma=d.p2_gamma)
    loss: Callable = lookup(LOSSES, d.loss, "loss")
    if d.loss == "huber":
        loss = partial(loss, c=d.huber_c, schedule=d.huber_schedule)
    return Objective(
        p,
        density,
        weight,
        posterior(recipe),
        d.balanced,
        loss=loss,
        vlb_weight=d.vlb_weight,
        offset_noise=d.offset_noise,
        pyramid_discount=d.pyramid_discount,
        input_perturbation=d.input_perturbation,
        mask_floor=recipe.data.mask_floor,
    )


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def _density(recipe: Recipe) -> Callable | None:
    """How training draws noise levels; None is by their loss."""
    d = recipe.diffusion
    if d.density == "importance":
        return None
    density: Callable = lookup(DENSITIES, d.density, "density")
    if d.density == "logit_normal":
        return partial(density, mean=d.density_mean, std=d.density_std)
    if d.density == "log_normal":
        return partial(density, p_mean=d.density_mean, p_std=d.density_std)
    if d.density == "cosine_interpolated":
        side = float(recipe.data.resolution)
        return partial(density, image_d=side, noise_d_low=d.density_low, noise_d_high=d.density_high or side)
    return density


def posterior(recipe: Recipe) -> str:
    """What diffusion learns of the autoencoder's posterior: "sample" or "mean".

    An autoencoder trained under a heavy KL term has draws that are mostly noise: a U-Net taught its means must not be
    taught its draws after that because a line is missing.
    """
    own, source = recipe.autoencoder.posterior, recipe.autoencoder.source
    if own is None and source is not None:
        own = load_metadata(Path(source)).get("recipe", {}).get("autoencoder", {}).get("posterior")
    return own or "sample"


def previews(recipe: Recipe) -> list[Request]:
    """The requests of a preview, `preview.num` of each prompt in a row."""
    p = recipe.preview
    return spread(request(recipe, "", p.seed), p.prompts, p.num)


def request(recipe: Recipe, prompt: str, seed: int) -> Request:
    """A picture as the recipe's `preview` section says, of the side that is trained."""
    p, side = recipe.preview, recipe.data.resolution
    return Request(
        prompt,
        negative_prompt=p.negative_prompt,
        seed=seed,
        num_inference_steps=p.num_inference_steps,
        guidance_scale=p.guidance_scale,
        guidance=p.guidance,
        sampler=p.sampler,
        schedule=p.schedule,
        height=side,
        width=side,
    )


def loop_settings(recipe: Recipe, stage: str) -> LoopSettings:
    """How the loop trains a stage."""
    train = recipe.stage_train(stage)
    names = LoopSettings.__dataclass_fields__.keys() - {"preview_every", "fit_micro_batch"}
    return LoopSettings(
        **{name: getattr(train, name) for name in names},
        preview_every=recipe.preview.every,
        fit_micro_batch=train.micro_batch == "auto",
    )


def cut(recipe: Recipe, stage: str, rank: int = 0, world: int = 1) -> Cut:
    """How a stage's global batch is spread."""
    train = recipe.stage_train(stage)
    return Cut(train.global_batch, None if train.micro_batch == "auto" else train.micro_batch, rank, world)
