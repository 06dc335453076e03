"""What of a GPU's memory fine-tuning takes, for networks of Stable Diffusion 1.5's and SDXL's size.

The networks are built from their published shapes, on the meta device: nothing is downloaded, and no GPU is needed.

    python benchmarks/memory_table.py > benchmarks/results/memory.md                  the table (some minutes)
    python benchmarks/memory_table.py --check > benchmarks/results/memory-check.md    predicted against measured, on the
                                                                                      CPU, at reduced depth
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from latentgen.engine.ema import Ema
from latentgen.engine.optim import build_optimizer
from latentgen.formats.model import Model
from latentgen.models.adapters import AdapterSpec, add_adapters
from latentgen.models.context import Context
from latentgen.models.text import Tower, train_tokenizer
from latentgen.models.unet import checkpoint_activations, count_parameters, predict
from latentgen.recipe import build
from latentgen.recipe.finetune import Training
from latentgen.recipe.load import load_recipe
from latentgen.recipe.memory import CARDS, GIB, LIBRARIES, SPLINTERS, Memory, Setting, memory_of, optimizer_bytes
from latentgen.recipe.schema import Preview, Train

PUBLISHED = {
    "SD 1.5": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "SDXL": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}
"""Parameters of the models as they were published: what is built here must have as many."""

WORDS = 77
"""Tokens of a caption."""

STEPS = 4
"""Of each case that is measured."""

METHODS = ("full", "LoRA 16", "LoRA 16 + text", "ControlNet")
SIDES, PRECISIONS = (512, 1024), ("bf16", "fp32")


def autoencoder() -> AutoencoderKL:
    kind: Any = AutoencoderKL  # the library's annotations admit one level only
    return kind(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
    )


def text_config(width: int, layers: int, heads: int, projection: int, act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=projection,
        hidden_act=act,
        bos_token_id=0,
        eos_token_id=49407,
    )


def small_unet(layers: int = 2) -> UNet2DConditionModel:
    """Stable Diffusion 1.5's."""
    return UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, layers_per_block=layers
    )  # the library's own defaults are this model's


def large_unet(layers: int = 2, depth: tuple[int, int, int] = (1, 2, 10)) -> UNet2DConditionModel:
    """SDXL's."""
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=layers,
        transformer_layers_per_block=depth,  # type: ignore[arg-type]
        attention_head_dim=(5, 10, 20),  # type: ignore[arg-type]  # numbers of heads
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def model(family: str) -> Model:
    """A model of that size on the meta device."""
    words = train_tokenizer(["any words"], 514, WORDS)
    with torch.device("meta"):
        first = Tower("text_encoder", CLIPTextModel(text_config(768, 12, 12, 768, "quick_gelu")), words)
        towers, unet = (first,), small_unet() if family == "SD 1.5" else large_unet()
        if family == "SDXL":
            second = CLIPTextModelWithProjection(text_config(1280, 32, 20, 1280, "gelu"))
            towers = (first, Tower("text_encoder_2", second, words))
        made = Model(vae=autoencoder(), towers=towers, unet=unet, prediction="eps", schedule={})
    made.require_fit(family)
    for name, network in made.networks().items():
        found, wanted = count_parameters(network), PUBLISHED[family][name]
        assert found == wanted, f"{family}, {name}: {found} parameters, published are {wanted}"
    return made


def training(family: str, method: str) -> Training:
    """What a recipe with that method would train."""
    made = model(family)
    networks = made.networks()
    for network in networks.values():
        network.requires_grad_(False)
    with torch.device("meta"):
        if method == "full":
            made.unet.requires_grad_(True)
            return Training(made, ("unet",), {})
        if method == "ControlNet":
            control = ControlNetModel.from_unet(made.unet, load_weights_from_unet=False)
            return Training(replace(made, control=control), ("control",), {})
        texts = tuple(tower.name for tower in made.towers) if "text" in method else ()
        trains = ("unet", *texts)
        add_adapters({name: networks[name] for name in trains}, AdapterSpec(rank=16))
        return Training(made, trains, {})


def setting(side: int, precision: Any) -> Setting:
    return Setting(side, Train(precision=precision), Preview(prompts=("one", "two")))


def largest(memory: Memory) -> list[str]:
    return [str(memory.largest(card * GIB) or "-") for card in CARDS]


def frugal(memory: Memory, trained: Training) -> Memory:
    """The same with 8-bit AdamW, and averages in main memory."""
    networks = [trained.model.networks()[name] for name in trained.trains]
    return replace(memory, optimizer=optimizer_bytes("adamw8bit", networks), averages=0, update=0)


def table() -> None:
    print(HEAD)
    for family in PUBLISHED:
        counts = {name: count / 1e6 for name, count in PUBLISHED[family].items()}
        print(f"\n## {family}\n")
        print("Parameters: " + ", ".join(f"{name} {count:.1f} M" for name, count in counts.items()) + ".\n")
        cards = " | ".join(f"{card} GiB" for card in CARDS)
        print(f"| pixels | precision | trained | weights, moments, averages | 1 example | {cards} |")
        print("|" + "---|" * (5 + len(CARDS)))
        for side in SIDES:
            for precision in PRECISIONS:
                for method in METHODS:
                    lines(family, side, precision, method)


def lines(family: str, side: int, precision: str, method: str) -> None:
    """Rows of the table: each number without and with gradient checkpointing."""
    made = training(family, method)
    networks = nn.ModuleList([made.model.networks()[name] for name in made.trains])
    count = count_parameters(networks, trainable_only=True)
    both = [*memory_of(made, setting(side, precision))]
    kinds: list[tuple[str, list[Memory]]] = [(method, both)]
    if method == "full":
        kinds.append(("full, 8-bit, averages on the CPU", [frugal(memory, made) for memory in both]))
    for name, (plain, again) in kinds:
        fits = [f"{a} / {b}" if a != b else a for a, b in zip(largest(plain), largest(again), strict=True)]
        print(
            f"| {side} | {precision} | {name} ({count / 1e6:.1f} M) | {plain.standing / GIB:.1f} | "
            f"{plain.total(1, 2) / GIB:.1f} / {again.total(1, 2) / GIB:.1f} | {' | '.join(fits)} |",
            flush=True,
        )


HEAD = f"""\
# What fits into a GPU

Made by `benchmarks/memory_table.py`: networks of the published shapes on the meta device, where every storage of a
training step is counted as it comes and goes. Nothing here was measured on a GPU; how far such counts are from what is
measured on a CPU is in `memory-check.md`. In GiB, for one process without FSDP. *a / b*: without / with gradient
checkpointing. Under a card's size stands the largest micro-batch that fits, `-` where one example does not.

Counted is what a run keeps on the GPU: the weights of all networks in float32, VAE and text encoders too (latents and
text states are cached, but previews need both); of what is trained gradients, AdamW's moments and one average
(`train.ema_decay`); the most of what a step, the update of the averages or a preview of four pictures takes beside
these, whichever is largest; {LIBRARIES / GIB:g} GiB for CUDA and its libraries; and {SPLINTERS:.0%} of what comes and
goes for what the allocator cannot use again. Gradients of an earlier micro-batch are there while the next one is
computed, so that any `train.global_batch` fits that is a multiple of the micro-batch.

bf16 is autocast: weights stay in float32. A network that is not trained itself (the U-Net beside a ControlNet) is not
cast: it computes in float32.

`latentgen train --dry-run` prints the same for a recipe."""


def check() -> None:
    """Predicted peaks beside measured ones, each case in a process of its own."""
    print(CHECK_HEAD)
    for name in CASES:
        command = [sys.executable, __file__, "--case", name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        print(done.stdout.strip(), flush=True)


CHECK_HEAD = """\
# Predicted and measured

`benchmarks/memory_table.py --check`: four training steps (forward, backward, AdamW, average) on one CPU thread in
float32, each case in a fresh process. *allocator*: the most bytes alive in torch's CPU allocator, by its profiler, of
two steps. *process*: the most that the process's resident memory grew. Predicted is what the meta device says, without
the allowances for libraries and splinters. *loss*: of the first and of the last step, of the same examples and noise
from random weights; a case in which it does not fall is an error.

Nothing here was measured on a GPU.

| case | parameters | predicted MiB | allocator | error | process | error | loss |
|---|---|---|---|---|---|---|---|"""


def shapes_unet() -> UNet2DConditionModel:
    """The U-Net of configs/shapes.yaml."""
    recipe = load_recipe(Path(__file__).parents[1] / "configs" / "shapes.yaml")
    return build.new_unet(recipe, build.new_vae(recipe), recipe.text_encoder.width)


def shallow_sd() -> UNet2DConditionModel:
    """The first two of SD 1.5's four levels, with one block each where it has two."""
    return UNet2DConditionModel(
        sample_size=64,
        cross_attention_dim=768,
        attention_head_dim=8,
        layers_per_block=1,
        block_out_channels=(320, 640),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


@dataclass(frozen=True)
class Case:
    unet: Callable[[], UNet2DConditionModel]
    side: int
    examples: int
    method: str = "full"
    checkpointing: bool = False
    parts: int = 1


CASES = {
    "shapes U-Net, 64 px, 16 examples": Case(shapes_unet, 16, 16),
    "the same, checkpointed": Case(shapes_unet, 16, 16, checkpointing=True),
    "shapes U-Net, LoRA 16, 16 examples": Case(shapes_unet, 16, 16, method="LoRA 16"),
    "two levels of SD 1.5, 256 px, 1 example": Case(shallow_sd, 32, 1),
    "the same, 4 examples": Case(shallow_sd, 32, 4),
    "the same, 4 examples in 2 micro-batches": Case(shallow_sd, 32, 2, parts=2),
    "the same, 4 examples, checkpointed": Case(shallow_sd, 32, 4, checkpointing=True),
    "the same, LoRA 16, 4 examples": Case(shallow_sd, 32, 4, method="LoRA 16"),
    "the same, LoRA 16, 4 examples, checkpointed": Case(shallow_sd, 32, 4, method="LoRA 16", checkpointing=True),
    "SD 1.5 with one block a level, 128 px, 1 example, LoRA 16": Case(lambda: small_unet(1), 16, 1, "LoRA 16"),
    "SDXL with one block a level and one transformer layer, 128 px, 1 example, LoRA 16": Case(
        lambda: large_unet(1, (1, 1, 1)), 16, 1, "LoRA 16"
    ),
    "the same, checkpointed, 256 px": Case(lambda: large_unet(1, (1, 1, 1)), 32, 1, "LoRA 16", checkpointing=True),
}


def run_case(name: str) -> None:
    """Measure one case in this process, and print its row."""
    case = CASES[name]
    torch.set_num_threads(1)
    predicted = predicted_peak(case)
    with ResidentPeak() as resident:  # first: the profiler takes memory of its own
        losses = train_case(case)
    assert losses[-1] < losses[0], f"{name}: the loss does not fall: {losses}"
    allocated = allocator_peak(lambda: train_case(case, 2))  # the second has moments and an average
    with torch.device("meta"):
        count = count_parameters(prepared(case.unet(), case))
    numbers = [f"{count / 1e6:.0f} M", f"{predicted / 2**20:.0f}"]
    for measured in (allocated, resident.peak):
        numbers += [f"{measured / 2**20:.0f}", f"{predicted / measured - 1:+.1%}"]
    print(f"| {name} | {' | '.join(numbers)} | {losses[0]:.4f} to {losses[-1]:.4f} |")


def predicted_peak(case: Case) -> int:
    """Of the U-Net, its moments and its average, and of a step: what `train_case` makes."""
    with torch.device("meta"):
        unet = case.unet()
        made = replace(model("SDXL"), unet=unet) if _sized(unet) else around(unet)
        prepared(unet, case)
    found = memory_of(Training(made, ("unet",), {}), Setting(8 * case.side))[case.checkpointing]
    step = found.alone(case.examples) if case.parts == 1 else found.trained + found.further(case.examples)
    return found.weights["unet"] + found.optimizer + found.averages + step


def _sized(unet: UNet2DConditionModel) -> bool:
    """Whether it reads pooled text and the pictures' sizes, as SDXL's."""
    return unet.config["addition_embed_type"] == "text_time"


def around(unet: UNet2DConditionModel) -> Model:
    """A model with a very small autoencoder and text encoder, which a step does not run."""
    latents, width = unet.config["in_channels"], unet.config["cross_attention_dim"]
    kind: Any = AutoencoderKL  # the library's annotations admit one level only
    vae = kind(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        latent_channels=latents,
    )
    words = train_tokenizer(["any words"], 514, WORDS)
    tower = Tower("text_encoder", CLIPTextModel(text_config(width, 1, 2, width, "gelu")), words)
    return Model(vae=vae, towers=(tower,), unet=unet, prediction="eps", schedule={})


def prepared(unet: UNet2DConditionModel, case: Case) -> UNet2DConditionModel:
    if case.method != "full":
        add_adapters({"unet": unet}, AdapterSpec(rank=16))
    return unet


def train_case(case: Case, steps: int = STEPS) -> list[float]:
    """Steps with numbers, without what the CPU's own layouts would need (`models.quick`): the loss of each."""
    torch.manual_seed(0)
    unet = prepared(case.unet(), case).train()
    if case.checkpointing:
        checkpoint_activations(unet, "auto", dtype=torch.float32)
    optimizer = build_optimizer({"unet": unet}, kind="adamw", lr=1e-4, betas=(0.9, 0.99), weight_decay=0.01)
    average, losses = Ema(unet, 0.99), []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part in range(case.parts):
            loss = denoising_loss(unet, case.side, case.examples, part) / case.parts
            loss.backward()
            total += float(loss.detach())
            del loss
        optimizer.step()
        average.update(unet, step, torch.zeros(()))
        losses.append(total)
    return losses


def denoising_loss(unet: UNet2DConditionModel, side: int, examples: int, seed: int) -> Tensor:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    noise = draw(examples, unet.config["in_channels"], side, side)
    context = Context(draw(examples, WORDS, unet.config["cross_attention_dim"]))
    if _sized(unet):
        context = context._replace(pooled=draw(examples, 1280), sizes=torch.full((examples, 6), 8.0 * side))
    out = predict({"unet": unet}, 0.5 * draw(*noise.shape) + noise, torch.full((examples,), 500.0), context)
    return (out - noise).square().mean()


def allocator_peak(run: Callable[[], object]) -> int:
    """The most bytes alive in torch's CPU allocator while `run` runs, of those it allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    assert seen.profiler is not None
    result: Any = seen.profiler.kineto_results
    sizes = [event.nbytes() for event in result.events() if event.name() == "[memory]"]
    return int(max(np.cumsum(sizes)))


class ResidentPeak:
    """The most that this process's resident memory grows inside the block."""

    def __enter__(self) -> ResidentPeak:
        self._process, self._done = psutil.Process(), threading.Event()
        self._start, self.peak = self._process.memory_info().rss, 0
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, self._process.memory_info().rss - self._start)

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="predicted against measured peaks, on the CPU")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case:
        run_case(asked.case)
    elif asked.check:
        check()
    else:
        table()


if __name__ == "__main__":
    main()
