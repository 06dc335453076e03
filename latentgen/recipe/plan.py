"""What a recipe will cost, before anything is trained: parameters, steps, FLOPs, disk."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from latentgen.core.log import counted
from latentgen.data.frame import Shape
from latentgen.data.sources.base import shape_counts
from latentgen.engine.muon import matrices_of, orthogonalised
from latentgen.formats.model import Model
from latentgen.formats.model_folder import load_model
from latentgen.models.autoencoder import AutoencoderForTraining, decode, factor
from latentgen.models.clip import ClipForTraining
from latentgen.models.context import Context, size_count
from latentgen.models.late_interaction import late_similarity
from latentgen.models.text import encode_tokens, prompt_length
from latentgen.models.unet import count_parameters, predict
from latentgen.recipe import build, sources
from latentgen.recipe.conditions import starting_model
from latentgen.recipe.load import dump_recipe
from latentgen.recipe.memory import plan_memory
from latentgen.recipe.presets import filled
from latentgen.recipe.prior import class_folder, keeps
from latentgen.recipe.schema import Recipe
from latentgen.recipe.sizes import sizes_of, tell

PROBE = 2
"""Examples of the counted forward pass; FLOPs are proportional to it."""


@dataclass(frozen=True)
class StagePlan:
    """One stage: `steps` of `global_batch`, each costing `flops_per_step`; `disk` bytes of checkpoints and results."""

    name: str
    parameters: int
    steps: int
    global_batch: int
    flops_per_step: float
    disk: int

    @property
    def flops(self) -> float:
        return self.steps * self.flops_per_step


@dataclass(frozen=True)
class Plan:
    """All that a recipe will do."""

    stages: tuple[StagePlan, ...]
    cache_flops: float
    cache_disk: int
    prior_flops: float = 0.0
    prior_disk: int = 0

    @property
    def flops(self) -> float:
        """FLOPs of training, caching and class pictures, as torch's FlopCounterMode counts them (multiply and add are
        two).

        Left out: the critic and the perceptual network, previews, validation.
        """
        return sum(stage.flops for stage in self.stages) + self.cache_flops + self.prior_flops

    @property
    def disk(self) -> int:
        return sum(stage.disk for stage in self.stages) + self.cache_disk + self.prior_disk

    def table(self) -> str:
        """The plan for a reader."""
        lines = [f"{'stage':<8}{'parameters':>12}{'steps':>8}{'batch':>7}{'FLOP/step':>12}{'FLOP':>12}{'disk MiB':>10}"]
        for s in self.stages:
            lines.append(
                f"{s.name:<8}{counted(s.parameters):>12}{s.steps:>8}{s.global_batch:>7}"
                f"{s.flops_per_step:>12.2e}{s.flops:>12.2e}{s.disk / 2**20:>10.0f}"
            )
        if self.prior_flops:
            lines.append(f"{'prior':<8}{'':>39}{self.prior_flops:>12.2e}{self.prior_disk / 2**20:>10.0f}")
        lines.append(f"{'caches':<8}{'':>39}{self.cache_flops:>12.2e}{self.cache_disk / 2**20:>10.0f}")
        lines.append(f"{'total':<8}{'':>39}{self.flops:>12.2e}{self.disk / 2**20:>10.0f}")
        return "\n".join(lines)


def flops_of(run: Callable[[], object]) -> float:
    """FLOPs of what `run` computes, by torch's own counter; on meta tensors nothing is really computed."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def _training_flops(module: nn.Module, *inputs: Tensor, **named: Tensor) -> float:
    """FLOPs of one forward and backward pass of one example."""

    def run() -> None:
        out = module(*inputs, **named)
        parts = _tensors(out if isinstance(out, tuple) else out.sample)
        sum((part.float().sum() for part in parts), torch.zeros((), device="meta")).backward()

    return flops_of(run) / PROBE


def make_plan(recipe: Recipe, shapes: Mapping[Shape, int] | None = None) -> Plan:
    """Count a recipe's cost on meta tensors.

    Args:
        shapes: how many examples of each shape are trained on, where they have been counted already.

    Raises:
        UserError: the recipe's parts do not fit together, or a `from:` folder or the data are missing.
    """
    if shapes is None:
        shapes = mixed_shapes(recipe, shape_counts(sources.examples(recipe).training))
    examples = sum(shapes.values())
    side, stages, prior_flops = recipe.data.resolution, [], 0.0
    with torch.device("meta"):
        vae, model = _vae(recipe), None
        image = torch.empty(PROBE, 3, side, side)
        if recipe.autoencoder.source is None:
            flops = _mean(shapes, partial(_vae_flops, recipe, vae))
            stages.append(_stage(recipe, "vae", vae, flops))
        context, text_flops = _text(recipe, image, stages)
        control: ControlNetModel | None = None
        if recipe.unet.source is None:
            unet = build.new_unet(recipe, vae, context.states.shape[-1])
        else:
            model = _existing(recipe.unet.source)
            build.require_fit(recipe, model, vae, context.states.shape[-1])
            model = starting_model(recipe, replace(model, unet=_on_meta(model.unet)))
            unet, control = model.unet, model.control
            if context.pooled is not None:
                context = context._replace(sizes=torch.empty(PROBE, size_count(unet, context.pooled.shape[-1])))
        build.check_shapes(recipe, shapes, vae, unet)
        latents, made = _latents(vae, (side, side)), _made(recipe)
        once = _prediction_flops(unet, latents, context) if made or keeps(recipe) else 0.0
        if made:
            decoded = flops_of(lambda: decode(vae, latents)) / PROBE
            guided = 1 if recipe.preview.guidance_scale == 1 else 2
            prior_flops = made * (recipe.preview.num_inference_steps * guided * once + decoded)
        encode = _mean(shapes, lambda shape: flops_of(lambda: vae.encode(torch.empty(PROBE, 3, *shape))) / PROBE)
        flops = _mean(
            shapes, lambda s: _unet_flops(unet, control, _latents(vae, s), context, torch.empty(PROBE, 3, *s))
        )
        if unet.config["in_channels"] > latents.shape[1]:
            flops += encode  # of the masked picture, anew in every step
        if not recipe.data.keeps_latents():
            flops += encode
        if keeps(recipe):
            flops += once / 2  # class pictures are half of the examples
        stages.append(_stage(recipe, "unet", unet if control is None else control, flops))
    captions = examples * (recipe.data.captions or 4)  # an upper guess: equal captions are cached once
    pictures = examples * (1 + recipe.data.flip) if recipe.data.keeps_latents() else 0
    values = pictures * 2 * _mean(shapes, lambda shape: _latents(vae, shape)[0].numel())
    disk = 2 * (round(values) + captions * context.states[0].numel())
    cost = pictures * encode + captions * text_flops
    return Plan(tuple(stages), cost, disk, prior_flops, made * 3 * side * side)


def mixed_shapes(recipe: Recipe, own: Mapping[Shape, int]) -> dict[Shape, int]:
    """How many examples of each shape are trained on, class pictures included, where there are `own` others."""
    prior, side = recipe.finetune.prior if recipe.finetune is not None else None, recipe.data.resolution
    if prior is None:
        return dict(own)
    beside = {(side, side): prior.pictures} if prior.path is None else shape_counts(class_folder(recipe))
    return dict(Counter(own) + Counter(beside))


def _mean(shapes: Mapping[Shape, int], of: Callable[[Shape], float]) -> float:
    """The mean over all examples of what depends on their shape; upright or lying is the same."""
    counts: Counter[Shape] = Counter()
    for (height, width), count in shapes.items():
        counts[min(height, width), max(height, width)] += count
    if len(counts) == 1:
        return of(*counts)
    return sum(count * of(shape) for shape, count in counts.items()) / sum(counts.values())


def _latents(vae: AutoencoderKL, shape: Shape) -> Tensor:
    times = factor(vae)
    return torch.empty(PROBE, vae.config["latent_channels"], shape[0] // times, shape[1] // times)


def _made(recipe: Recipe) -> int:
    """How many class pictures are made (where they are not there already)."""
    prior = recipe.finetune.prior if recipe.finetune is not None else None
    return prior.pictures if prior is not None and prior.path is None else 0


def _channels(unet: UNet2DConditionModel, latents: Tensor) -> Tensor | None:
    """What the U-Net is shown beside latents."""
    more = unet.config["in_channels"] - latents.shape[1]
    return torch.empty(PROBE, more, *latents.shape[2:]) if more else None


def _prediction_flops(unet: UNet2DConditionModel, latents: Tensor, context: Context) -> float:
    """FLOPs of one prediction of one example."""
    networks, channels = {"unet": unet.eval()}, _channels(unet, latents)
    return flops_of(lambda: predict(networks, latents, torch.empty(PROBE), context, channels=channels)) / PROBE


def _unet_flops(
    unet: UNet2DConditionModel, control: ControlNetModel | None, latents: Tensor, context: Context, image: Tensor
) -> float:
    """FLOPs of one forward and backward pass of one example; beside a ControlNet the U-Net only passes gradients on."""
    networks = {"unet": unet.train().requires_grad_(control is None), "control": control}
    channels = _channels(unet, latents)
    shown = None if control is None else image
    context = context.each(Tensor.detach)  # no gradient goes into text: its states are cached

    def run() -> None:
        predict(networks, latents, torch.empty(PROBE), context, channels=channels, control=shown).sum().backward()

    return flops_of(run) / PROBE


def _existing(folder: str) -> Model:
    """Weights are read on the CPU: libraries refuse to read them on the meta device."""
    with torch.device("cpu"):
        return load_model(Path(folder))


def _on_meta(network: nn.Module) -> Any:
    return network.to("meta")


def _tensors(out: Any) -> list[Tensor]:
    """All that a network gives, out of tuples in tuples; what it leaves out is None."""
    if isinstance(out, tuple):
        return [tensor for part in out for tensor in _tensors(part)]
    return [] if out is None else [out]


def _late_flops(recipe: Recipe, places_of_each: int) -> float:
    """FLOPs of comparing every word with every place of every picture of a batch, which grows with its square."""
    t, batch = recipe.text_encoder, recipe.stage_train("clip").global_batch
    places = torch.empty(batch, places_of_each, t.embed_dim, requires_grad=True)
    true = torch.empty(batch, t.context_length, t.embed_dim, requires_grad=True)
    false = torch.empty(batch, t.contrasts, t.context_length, t.embed_dim, requires_grad=True)

    def compare() -> None:  # what `late_loss` compares, in all processes together
        for words in (true, false):
            late_similarity(places, words, torch.empty(words.shape[:-1])).sum().backward()

    return flops_of(compare)


def _stage(recipe: Recipe, name: str, module: nn.Module, flops: float, shared: float = 0.0) -> StagePlan:
    """`flops` of one example, `shared` of a whole batch besides."""
    train, parameters = recipe.stage_train(name), count_parameters(module)
    if train.optimizer == "muon":
        matrices = [weight.detach().flatten(1) for weight in matrices_of([module])]
        update = flops_of(lambda: [orthogonalised(matrix, matrix.dtype) for matrix in matrices])
    else:
        update = 0.0
    # Weights, their average and Adam's two moments, in float32; one checkpoint more than is kept exists while saving.
    kept = train.keep_last + train.keep_best + (train.steps // train.keep_every if train.keep_every else 0)
    states = (kept + 1) * (1 if train.rollback_every is None else 2)  # the good state is in a checkpoint, too
    disk = 4 * parameters * (4 * states + 2)
    lengths = len(train.ema_lengths)  # each is in the checkpoints, and in the snapshots
    snapshots = math.ceil(train.steps / build.loop_settings(recipe, name).snapshot_every())
    disk += lengths * parameters * (4 * states + (4 if train.ema_precision == "fp32" else 2) * snapshots)
    return StagePlan(
        name, parameters, train.steps, train.global_batch, flops * train.global_batch + shared + update, disk
    )


def _vae(recipe: Recipe) -> AutoencoderKL:
    if recipe.autoencoder.source is not None:
        return _on_meta(_existing(recipe.autoencoder.source).vae)
    return build.new_vae(recipe)


def _vae_flops(recipe: Recipe, vae: AutoencoderKL, shape: Shape) -> float:
    """FLOPs of one example, averaged over the steps that show patches and those that show whole pictures."""
    a, trained, steps = recipe.autoencoder, AutoencoderForTraining(vae), recipe.stage_train("vae").steps

    def of(shown: Shape) -> float:
        return _training_flops(trained, torch.empty(PROBE, 3, *shown), _latents(vae, shown))

    if a.patch is None:
        return of(shape)
    patches = min(a.patch_steps if a.patch_steps is not None else steps, steps) / steps
    return patches * of((a.patch, a.patch)) + (1 - patches) * of(shape)


def _text(recipe: Recipe, image: Tensor, stages: list[StagePlan]) -> tuple[Context, float]:
    """What the U-Net reads of text, without sizes, and FLOPs of one; plans the CLIP stage when it is trained."""
    if recipe.text_encoder.source is not None:
        towers = _existing(recipe.text_encoder.source).towers
        for tower in towers:
            _on_meta(tower.encoder)
        tokens = torch.zeros(PROBE, prompt_length(towers, recipe.text_encoder.chunks), dtype=torch.long, device="meta")
        context: list[Context] = []
        flops = flops_of(lambda: context.append(encode_tokens(towers, [tokens] * len(towers)))) / PROBE
        return context[0], flops
    t = recipe.text_encoder
    clip = build.new_clip(recipe, t.vocab_size, t.vocab_size - 1)
    tokens = torch.zeros(PROBE, t.context_length, dtype=torch.long)
    shown = tokens.repeat(1 + t.contrasts, 1)
    flops = _training_flops(ClipForTraining(clip, late=t.late > 0), image, shown)
    stages.append(_stage(recipe, "clip", clip, flops, _late_flops(recipe, clip.shape.places) if t.late else 0.0))
    states = torch.empty(PROBE, t.chunks * t.context_length, t.width)
    return Context(states), t.chunks * flops_of(lambda: clip.encode_text(tokens)) / PROBE


def describe(recipe: Recipe) -> str:
    """The resolved recipe and its plan, as `--dry-run` prints them.

    Raises:
        UserError: a mistake that can be found without training.
    """
    training = sources.examples(recipe).training
    recipe = filled(recipe, len(training))
    build.check(recipe, processes=1)
    tell(sizes_of(training, recipe.data), recipe.data)
    shapes = mixed_shapes(recipe, shape_counts(training))
    return f"{dump_recipe(recipe)}\n{make_plan(recipe, shapes).table()}\n\n{plan_memory(recipe, shapes)}"
