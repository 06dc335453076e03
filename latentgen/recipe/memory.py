"""What of a GPU's memory the U-Net's stage will need, before there is one: counted on the meta device.

Its parts: what the run keeps there all the time (weights, averages, the optimizer's moments), and the most of what
comes and goes beside it: the activations and gradients of a step, the update, or the drawing of a preview.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentgen.data.frame import Shape
from latentgen.engine.ema import Ema
from latentgen.engine.footprint import PROBES, Allocated, Growth, LikeCuda, autocast, growth, storage_bytes
from latentgen.engine.guard import parts_of
from latentgen.engine.muon import matrices_of
from latentgen.formats.model import Model
from latentgen.formats.model_folder import load_model
from latentgen.models.autoencoder import decode, encode_moments, factor
from latentgen.models.clip import to_transformers
from latentgen.models.context import Context
from latentgen.models.text import Tower, encode_tokens, pooled_width, prompt_length, states_width, train_tokenizer
from latentgen.models.tokens import put
from latentgen.models.unet import predict
from latentgen.recipe import build
from latentgen.recipe.finetune import Training, prepare, runs_text
from latentgen.recipe.prior import keeps
from latentgen.recipe.process import process
from latentgen.recipe.schema import Preview, Recipe, Train
from latentgen.tasks.original import Original

GIB = 2**30
CARDS = (8, 12, 16, 24, 80)
"""Memory of usual cards, in GiB."""
LIBRARIES = GIB
"""Allowed for what torch does not allocate (the CUDA context) and for what kernels use inside (cuDNN, cuBLAS)."""
SPLINTERS = 0.05
"""Share of what comes and goes, allowed for what the allocator cannot use again."""
TOGETHER = 8
"""Previews drawn together."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU of one process.

    Args:
        weights: of every network, trained and frozen, by its name.
        trained: how much of these is trained.
        optimizer: its moments.
        averages: of what is trained.
        buckets: in which processes exchange gradients.
        alone: what comes and goes in a step of a single micro-batch, its gradients included.
        further: the same beside the gradients of micro-batches before it.
        update: what moving the averages takes for a moment.
        drawing: what a preview takes.
    """

    weights: Mapping[str, int]
    trained: int
    optimizer: int
    averages: int
    buckets: int
    alone: Growth
    further: Growth
    update: int
    drawing: int

    @property
    def standing(self) -> int:
        """What is there all the time."""
        return sum(self.weights.values()) + self.optimizer + self.averages + self.buckets

    def passing(self, micro_batch: int, parts: int = 1) -> int:
        """The most of what comes and goes, gradients included, in steps of `parts` micro-batches."""
        step = self.alone(micro_batch) if parts == 1 else self.trained + self.further(micro_batch)
        return max(step, self.trained + self.update, self.trained + self.drawing)

    def total(self, micro_batch: int, parts: int = 1) -> int:
        """All of it, with what is allowed for libraries and splinters."""
        passing = self.passing(micro_batch, parts)
        return self.standing + passing + int(SPLINTERS * passing) + LIBRARIES

    def largest(self, capacity: int) -> int:
        """The most examples of a micro-batch, one of several, that fit into `capacity` bytes; 0 where one does not."""
        low, high = 0, 1 << 16
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.total(middle, 2) <= capacity else (low, middle - 1)
        return low


@dataclass(frozen=True)
class Setting:
    """What memory depends on beside the networks.

    Args:
        resolution: side of the square pictures that previews draw.
        train: the settings of the loop.
        preview: how previews are drawn.
        processes: how many train together.
        keeps: whether what the networks predicted before training is asked for in every step.
        shape: height and width of the largest pictures that are trained on; None where they are such squares.
        live: whether pictures are encoded in every step.
    """

    resolution: int
    train: Train = field(default_factory=Train)
    preview: Preview = field(default_factory=Preview)
    processes: int = 1
    keeps: bool = False
    shape: Shape | None = None
    live: bool = False

    @property
    def square(self) -> Shape:
        """Of previews."""
        return self.resolution, self.resolution

    @property
    def dtype(self) -> torch.dtype | None:
        """Of autocast; None without."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.train.precision)


def plan_memory(recipe: Recipe, shapes: Iterable[Shape] = ()) -> str:
    """The table for a recipe's U-Net stage.

    Args:
        shapes: of the pictures; the largest decides. () says that all are squares of `data.resolution`.

    Raises:
        UserError: the recipe's parts do not fit together, or a `from:` folder is missing.
    """
    training, train = training_on_meta(recipe), recipe.train
    processes = train.processes or 1
    share = max(1, train.global_batch // processes)
    micro_batch = share if train.micro_batch in (None, "auto") else min(share, int(train.micro_batch))
    setting = Setting(
        recipe.data.resolution,
        train,
        recipe.preview,
        processes=processes,
        keeps=keeps(recipe),
        shape=max(shapes, key=math.prod, default=None),
        live=not recipe.data.keeps_latents(),
    )
    return memory_table(*memory_of(training, setting), micro_batch, share // micro_batch)


def training_on_meta(recipe: Recipe) -> Training:
    """What the U-Net's stage of a recipe trains, as `prepare` gives it, without any numbers."""
    parts = (recipe.autoencoder.source, recipe.text_encoder.source, recipe.unet.source)
    loaded = {source: load_model(Path(source)) for source in dict.fromkeys(parts) if source is not None}
    for model in loaded.values():
        for network in model.networks().values():
            network.to("meta")
    vae_from, text_from, unet_from = (None if source is None else loaded[source] for source in parts)
    with torch.device("meta"):
        vae = build.new_vae(recipe) if vae_from is None else vae_from.vae
        towers = (_new_tower(recipe),) if text_from is None else text_from.towers
        if unet_from is None:
            prediction, schedule = process(recipe)
            unet = build.new_unet(recipe, vae, states_width(towers))
        else:
            build.require_fit(recipe, unet_from, vae, states_width(towers))
            prediction, schedule, unet = unet_from.prediction, unet_from.schedule, unet_from.unet
        chunks = recipe.text_encoder.chunks
        model = Model(vae=vae, towers=towers, unet=unet, prediction=prediction, schedule=schedule, chunks=chunks)
        model.require_fit("autoencoder, text_encoder and unet")
        return prepare(recipe, model)


def _new_tower(recipe: Recipe) -> Tower:
    t = recipe.text_encoder
    with torch.device("cpu"):
        tokenizer = train_tokenizer(["any words"], 514, t.context_length)
    clip = build.new_clip(recipe, t.vocab_size, t.vocab_size - 1)
    return Tower("text_encoder", to_transformers(clip, bos_token_id=0, pad_token_id=1), tokenizer)


def memory_of(training: Training, setting: Setting) -> tuple[Memory, Memory]:
    """Count what training takes, without and with gradient checkpointing of the U-Net.

    Args:
        training: on the meta device; its networks are left as they were, but for gradients and the way of
            checkpointing.
    """
    networks, train = training.model.networks(), setting.train
    named = {name: storage_bytes([*n.parameters(), *n.buffers()]) for name, n in networks.items()}
    trained = [networks[name] for name in training.trains]
    changing = [p for network in trained for p in network.parameters() if p.requires_grad]
    if setting.keeps:
        copied = Original(networks).copies()
        named |= {"as before": storage_bytes(t for n in copied for t in (*n.parameters(), *n.buffers()))}
    gradients = storage_bytes(changing)
    kept = 1 + len(train.ema_lengths) if train.ema_device is None else 0
    whole = Memory(
        weights=named,
        trained=gradients,
        optimizer=optimizer_bytes(train.optimizer, trained),
        averages=kept * sum(_average(network) for network in trained),
        buckets=gradients if setting.processes > 1 else 0,
        alone=Growth(()),
        further=Growth(()),
        update=max((storage_bytes(changing[part]) for part in parts_of(changing)), default=0) if kept else 0,
        drawing=_drawing(training, setting),
    )
    steps = (_growths(training, setting, checkpointing=again) for again in (False, True))
    plain, again = (replace(whole, alone=alone, further=further) for alone, further in steps)
    return plain, again


def _average(network: nn.Module) -> int:
    """Of one average, what it does not share with the network."""
    average = Ema(network, 0.0).averaged
    own = [tensor for each in (average.parameters(), average.buffers()) for tensor in each]
    shared = {id(p) for p in network.parameters()}
    return storage_bytes(tensor for tensor in own if id(tensor) not in shared)


def optimizer_bytes(kind: str, modules: list[nn.Module]) -> int:
    """Of the moments of what is trained of these.

    Those of AdamW are two float32 numbers for each. bitsandbytes' are two bytes, and two float32 numbers for each block
    of 256; small tensors, of fewer than 4096, keep theirs in float32 (its documentation, "8-bit optimizers"). Muon has
    one momentum of each matrix.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    if kind == "adamw8bit":
        return sum(2 * p.numel() + 8 * -(-p.numel() // 256) if p.numel() >= 4096 else 8 * p.numel() for p in parameters)
    matrices = sum(p.numel() for p in matrices_of(modules)) if kind == "muon" else 0
    return 8 * sum(p.numel() for p in parameters) - 4 * matrices


def _growths(training: Training, setting: Setting, *, checkpointing: bool) -> tuple[Growth, Growth]:
    """Of a step's first micro-batch, whose gradients come to be, and of one that adds to them."""
    runs = [_step(training, setting, examples, checkpointing) for examples in PROBES]
    (first, further), (first_of_more, further_of_more) = runs
    return growth(first, first_of_more), growth(further, further_of_more)


def _step(training: Training, setting: Setting, examples: int, checkpointing: bool) -> tuple[list[int], list[int]]:
    """What is there beside the weights, from moment to moment: with new gradients, and without them."""
    model = training.model
    networks = model.networks()
    for name, network in networks.items():
        network.train(name in training.trains)
    if checkpointing:
        _checkpoint(training, setting.dtype)
    try:
        with LikeCuda(), Allocated() as seen:
            torch.autograd.backward(_loss(training, setting, examples))
        gradients = [p.grad for network in networks.values() for p in network.parameters()]
        return seen.history, seen.beside(grad for grad in gradients if grad is not None)
    finally:
        for each in filter(None, (model.unet, model.control)):
            each.disable_gradient_checkpointing()
        for network in networks.values():
            network.zero_grad(set_to_none=True)
            network.eval()


def _checkpoint(training: Training, dtype: torch.dtype | None) -> None:
    """As `models.unet.checkpoint_activations`; what is computed again must be computed as the first time."""
    for name, network in (("unet", training.model.unet), ("control", training.model.control)):
        if network is not None:
            like = partial(LikeCuda, dtype if name in training.trains else None)
            again = partial(checkpoint, use_reentrant=False, context_fn=lambda like=like: (nullcontext(), like()))
            network.enable_gradient_checkpointing(again)


_empty = partial(torch.empty, device="meta")


def _loss(training: Training, setting: Setting, examples: int) -> Tensor:
    """What `tasks.diffusion` computes through the networks; all else of a step is no larger than a few latents."""
    model = training.model
    networks: dict[str, Any] = {
        name: autocast(network, setting.dtype) if name in training.trains else network
        for name, network in model.networks().items()
    }
    shown = _shown(model, setting.shape or setting.square, examples, live=setting.live)
    context = _context(training, networks, examples)
    out = predict(networks, shown.latents, _empty(examples), context, channels=shown.channels, control=shown.control)
    return out.float().square().mean()


class _Shown(NamedTuple):
    """What the U-Net is shown beside words."""

    latents: Tensor
    channels: Tensor | None
    control: Tensor | None


@torch.no_grad()
def _shown(model: Model, shape: Shape, examples: int, *, live: bool = False) -> _Shown:
    """Noisy latents, encoded each time if `live`; for an inpainting network the mask and the surroundings, which always
    are."""
    channels = None
    height, width = (side // factor(model.vae) for side in shape)
    latents = _empty(examples, model.latent_channels, height, width)
    if live:
        latents, _ = encode_moments(model.vae, _empty(examples, 3, *shape))
    if model.inpaints:
        mean, _ = encode_moments(model.vae, _empty(examples, 3, *shape))
        channels = torch.cat([_empty(examples, 1, height, width), mean], dim=1)
    control = None if model.control is None else _empty(examples, 3, *shape)
    return _Shown(latents, channels, control)


def _context(training: Training, networks: Mapping[str, Any], examples: int) -> Context:
    """What the U-Net reads: from a cache, or encoded in the step where a text encoder or words of it are trained."""
    model = training.model
    towers, sizes = model.towers, _empty(examples, model.sizes) if model.sizes else None
    length, pooled = prompt_length(towers, model.chunks), pooled_width(towers)
    if not runs_text(training):
        whole = _empty(examples, pooled) if pooled else None
        return Context(_empty(examples, length, states_width(towers)), whole, sizes)
    if model.tokens is not None:
        put(networks["tokens"](), {tower.name: tower.encoder for tower in towers})
    ids = torch.zeros(examples, length, dtype=torch.long, device="meta")
    encoders = [networks[tower.name] for tower in towers]
    return encode_tokens(towers, [ids] * len(towers), encoders)._replace(sizes=sizes)


def _drawing(training: Training, setting: Setting) -> int:
    """The most that a preview takes: adapters are added to weights of which a copy is kept; then the U-Net runs for all
    pictures together, and the autoencoder for some."""
    model, preview = training.model, setting.preview
    pictures = min(TOGETHER, len(preview.prompts) * preview.num)
    adapted = storage_bytes(
        parameter
        for network in model.networks().values()
        for module in network.modules()
        if isinstance(module, BaseTunerLayer)
        for parameter in module.get_base_layer().parameters()
    )
    rows = pictures * (1 if preview.guidance_scale == 1 else 2)
    plain = Training(model, (), {})

    def denoise() -> None:
        shown, context = _shown(model, setting.square, rows), _context(plain, model.networks(), rows)
        predict(model.networks(), shown.latents, _empty(rows), context, channels=shown.channels, control=shown.control)

    def show() -> None:
        decode(model.vae, _shown(model, setting.square, pictures).latents)

    return max(2 * adapted, adapted + max(_peak(denoise), _peak(show)))


@torch.no_grad()
def _peak(run: Callable[[], None]) -> int:
    with LikeCuda(), Allocated() as seen:
        run()
    return seen.peak


def memory_table(without: Memory, checkpointed: Memory, micro_batch: int, parts: int) -> str:
    """For a reader, in GiB, without and with gradient checkpointing; and the largest micro-batch of usual cards."""
    both, last = (without, checkpointed), f"a step of {parts} x {micro_batch} examples, or a preview"
    rows = [(f"weights: {name}", [m.weights[name] for m in both]) for name in without.weights]
    rows += [("optimizer", [m.optimizer for m in both]), ("averages", [m.averages for m in both])]
    if without.buckets:
        rows.append(("exchange of gradients", [m.buckets for m in both]))
    passing = [m.passing(micro_batch, parts) for m in both]
    totals = [m.total(micro_batch, parts) for m in both]
    rows.append((last, passing))
    allowed = [total - m.standing - most for m, total, most in zip(both, totals, passing, strict=True)]
    rows += [("libraries and splinters", allowed), ("total", totals)]
    lines = [f"{'memory of a GPU, GiB':<48}{'plain':>12}{'checkpointed':>14}"]
    lines += [f"{name:<48}{values[0] / GIB:>12.2f}{values[1] / GIB:>14.2f}" for name, values in rows]
    for card in CARDS:
        fits = [str(m.largest(card * GIB) or "none") for m in both]
        lines.append(f"{f'largest micro-batch in {card} GiB':<48}{fits[0]:>12}{fits[1]:>14}")
    return "\n".join(lines)
