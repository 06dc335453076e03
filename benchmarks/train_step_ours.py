"""Runs our U-Net stage, with its caches or without any; for train_step.py."""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from train_step_pace import Pace

from latentgen.core.allocator import keep_memory
from latentgen.core.rand import Draw
from latentgen.data.captions import CachedWords
from latentgen.data.fetch import CachedBatches, to_tensor
from latentgen.data.loader import Cut, Loader
from latentgen.data.order import Shuffled
from latentgen.data.sources.base import Source
from latentgen.data.sources.folder import FolderSource
from latentgen.diffusion.parameterization import V
from latentgen.engine.ema import Ema
from latentgen.engine.guard import Guard
from latentgen.engine.loop import Loop
from latentgen.engine.meter import Meter
from latentgen.engine.settings import LoopSettings, StagePaths
from latentgen.engine.task import MicroBatches
from latentgen.engine.world import make_world
from latentgen.formats.model import Model
from latentgen.formats.model_folder import load_model
from latentgen.models.autoencoder import encode_moments
from latentgen.models.quick import quicken
from latentgen.models.text import encode_text
from latentgen.tasks.caching import Share, cache_latents, cache_text
from latentgen.tasks.diffusion import DiffusionTask, Objective

TIMES = 1000
SAVE = "a save, while training waits"


@dataclass(frozen=True)
class Uncached:
    """Pictures are decoded and encoded in every step, and so are captions: what our caches save."""

    model: Model
    source: Source

    @torch.no_grad()
    def __call__(self, draw: Draw) -> dict[str, Tensor]:
        image = to_tensor([self.source.image(i) for i in draw.indices]).to(self.model.vae.device)
        mean, std = encode_moments(self.model.vae, image)
        captions = [self.source.captions(i)[0] for i in draw.indices]
        return {
            "mean": mean.cpu(),
            "std": std.cpu(),
            "context": encode_text(self.model.towers, captions).states,
        }


def whole_times(u: Tensor, p: Any) -> Tensor:
    """Noise levels at whole times, as the other program draws them."""
    assert isinstance(p, V)
    return p.table.sigma_of_t((u * TIMES).floor().clamp(max=TIMES - 1))


def plain_weight(sigma: Tensor, p: Any) -> Tensor:
    """The plain mean squared error of the prediction."""
    return torch.ones_like(sigma)


class Quiet(DiffusionTask):
    """Without previews: the other program draws none."""

    def preview(self, averaged: Mapping[str, nn.Module], step: int, folder: Path) -> dict[str, float]:
        return {}


class Paced:
    """The data of a stage, whose consumer is done with a step when it asks for the next one."""

    def __init__(self, loader: Loader, done: Callable[[], None]) -> None:
        self.loader, self.done = loader, done

    def iterate(self, start: int) -> Iterator[tuple[int, MicroBatches]]:
        for step, parts in self.loader.iterate(start):
            yield step, parts
            self.done()


class Parts:
    """Time spent inside chosen functions; what one of them spends inside of another counts for the other alone."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.inside = clock, [0.0]
        self.seconds: dict[str, float] = defaultdict(float)

    def watch(self, owner: Any, name: str, label: str) -> None:
        plain = getattr(owner, name)

        def timed(*given: Any, **named: Any) -> Any:
            since = self.clock()
            self.inside.append(0.0)
            try:
                return plain(*given, **named)
            finally:
                whole = self.clock() - since
                self.seconds[label] += whole - self.inside.pop()
                self.inside[-1] += whole

        setattr(owner, name, timed)

    def watch_loop(self, loop: Loop) -> None:
        """The arithmetic of training, and what guards and measures it; what is left is the loop itself."""
        self.watch(loop.task, "losses", "draws, noising, forward pass, loss")
        self.watch(loop.accelerator, "backward", "backward pass")
        self.watch(loop.accelerator, "clip_grad_norm_", "norm of the gradient, clipping")
        for optimizer in loop.trained.optimizers.values():
            self.watch(optimizer, "step", "optimizer")
            self.watch(optimizer, "zero_grad", "freeing of gradients")
        self.watch(Ema, "update", "average of the weights")
        self.watch(CachedBatches, "__call__", "fetching of a batch")
        self.watch(loop, "_save", SAVE)
        for name in ("begin", "judge", "apply", "read"):
            self.watch(Guard, name, "guard")
        self.watch(Meter, "add", "means for the log")


def fetcher(model: Model, source: Source, caches: Path | None) -> Callable[[Draw], dict[str, Tensor]]:
    """Batches from the caches, filled here if they are not; or without any."""
    if caches is None:
        return Uncached(model, source)
    moments = cache_latents(model, source, caches, flip=False, share=Share())
    texts = cache_text(model, source, caches, captions=1, share=Share())
    return CachedBatches(moments, CachedWords(texts.parts(), texts.rows, 0.0))


def main() -> None:
    """Train until nobody asks for more."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "pictures", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("batch", "steps", "turn", "resolution"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--caches", type=Path)
    parser.add_argument("--save-every", type=int, default=10**9)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--losses", action="store_true", help="log every step")
    parser.add_argument("--parts", action="store_true", help="tell where the time goes, too")
    parser.add_argument("--gpu", action="store_true")
    options = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_flush_denormal(True)
    world = make_world(options.precision, None, None if options.gpu else "cpu")
    model = load_model(options.model, world.accelerator.device)
    source = FolderSource(path=str(options.pictures), split=None, resolution=options.resolution, crop="center")
    objective = Objective(model.parameterization(), whole_times, plain_weight)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    if not options.gpu:  # as a run does it
        keep_memory()
        if options.precision == "fp32":
            quicken(model.unet)
    task = Quiet(model, objective, [], columns=1, dtype=dtype)
    fetch = fetcher(model, source, options.caches)
    pace = Pace(options.turn, out, options.gpu)
    parts = Parts(pace.clock)
    metrics = options.out / "metrics.jsonl"

    def done() -> None:
        read = None
        if options.losses:
            lines = (json.loads(line) for line in metrics.read_text().splitlines())
            read = [line["loss"] for line in lines if line["kind"] == "train"][-1]
        elif (pace.count + 1) % pace.turn == 0:
            if options.gpu:
                torch.cuda.synchronize()
            pace.report(parts=dict(parts.seconds))
        pace.step(read)
        if pace.count % pace.turn == 0:  # what was before the first turn does not count either
            parts.seconds.clear()

    loader = Loader(fetch, Shuffled(len(source)), 0, task.name, Cut(options.batch), options.steps)
    settings = LoopSettings(
        steps=options.steps, optimizer="adamw", learning_rate=1e-4, schedule="constant", warmup_steps=0,
        final_learning_rate=0.0, weight_decay=0.0, beta1=0.9, beta2=0.999, grad_clip=1.0, ema_decay=0.9999,
        log_every=1 if options.losses else 10, save_every=options.save_every, keep_last=1, preview_every=10**9,
    )  # fmt: skip
    paths = StagePaths(options.out / "checkpoints", options.out / "samples", metrics, options.out / "tb")
    loop = Loop(task, Paced(loader, done), settings, world.accelerator, paths, world.sharding)
    if options.parts:
        parts.watch_loop(loop)
    loop.run()


if __name__ == "__main__":
    main()
