"""What the guard costs: the U-Net step of configs/quickstart.yaml with it, and with one that judges nothing.

    python benchmarks/guard.py [--pairs 60]

Both are taken in turns, in one process, on the same batch: with, without, without, with. A pair gives a ratio of CPU
times; reported are their median and its standard error. A step takes a thousand times longer than the guard,
and no two steps take equally long: so the guard's own calls are timed alone too, many of them, as a share of the
step's median. Printed, and written to benchmarks/results/guard.md and .json.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from latentgen.core.files import write_text
from latentgen.core.rand import Draw
from latentgen.data.loader import Loader
from latentgen.data.order import Shuffled
from latentgen.engine import ema
from latentgen.engine import step as stepping
from latentgen.engine.guard import Guard, lerp_unless
from latentgen.engine.loop import Loop
from latentgen.engine.settings import StagePaths
from latentgen.engine.task import MicroBatches
from latentgen.formats.model_folder import load_model
from latentgen.recipe import build
from latentgen.recipe.load import load_recipe
from latentgen.tasks.diffusion import DiffusionTask

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WARM_UP = 4


class Blind(Guard):
    """Says that every step is good, having looked at nothing."""

    def judge(self, *arguments: Any) -> Tensor:
        return self.skip

    def apply(self, optimizer: Any) -> None:
        optimizer.step()

    def end(self) -> None:
        return


def unet_stage(folder: Path, accelerator: Accelerator) -> Loop:
    """The stage as `latentgen train` would run it, on random latents and text states of the right size."""
    recipe = load_recipe(ROOT / "configs" / "quickstart.yaml", [f"autoencoder.from={ROOT / 'data' / 'shapes-model'}"])
    start = load_model(ROOT / "data" / "shapes-model")
    tokens, width = recipe.text_encoder.context_length, start.towers[0].encoder.config.hidden_size
    model = build.new_model(recipe, start.vae, start.towers)
    channels, side = model.unet.config["in_channels"], model.unet.config["sample_size"]

    def fetch(draw: Draw) -> dict[str, Tensor]:
        mean = draw.normal("mean", (channels, side, side))
        return {"mean": mean, "std": 0.1 * mean.abs(), "context": draw.normal("context", (tokens, width))}

    task = DiffusionTask(
        model,
        build.objective(recipe, model),
        [],
        columns=1,
        kernel=recipe.unet.attention_kernel,
        dtype=torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32,
    )
    settings = build.loop_settings(recipe, "unet")
    loader = Loader(fetch, Shuffled(1000), 0, "unet", build.cut(recipe, "unet"), settings.steps)
    paths = StagePaths(folder / "c", folder / "s", folder / "m.jsonl", folder / "tb", folder / "e")
    return Loop(task, loader, settings, accelerator, paths)


def seconds(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def compare(loop: Loop, pairs: int) -> tuple[list[float], list[float]]:
    """CPU seconds of steps with and without the guard, pair by pair."""
    batches = loop.data.iterate(0)
    guard, blind = loop.guard, Blind(loop.accelerator, loop.settings.bad_steps)
    unless, take_back = stepping._unless, stepping._take_back
    times: dict[bool, list[float]] = {True: [], False: []}

    def one(guarded: bool, number: int, parts: MicroBatches) -> None:
        loop.step.guard = guard if guarded else blind
        stepping._unless = unless if guarded else lambda skip, value: value
        stepping._take_back = take_back if guarded else lambda buffers, skip: None
        ema.lerp_unless = lerp_unless if guarded else lambda skip, *rest: torch._foreach_lerp_(*rest)

        def work() -> None:
            loop.step(number, parts)
            if guarded:  # as the loop does on a CPU after every step
                guard.read()

        times[guarded].append(seconds(work))

    for pair in range(-WARM_UP, pairs):
        for guarded in (True, False) if pair % 2 else (False, True):
            number, parts = next(batches)
            one(guarded, number, parts)
    stepping._unless, stepping._take_back, ema.lerp_unless = unless, take_back, lerp_unless
    return times[True][WARM_UP:], times[False][WARM_UP:]


def alone(loop: Loop, calls: int = 2000) -> float:
    """CPU seconds a step of all the guard's own work, without the step."""
    guard, parts = loop.guard, next(loop.data.iterate(0))[1]
    loss, norm = torch.tensor(0.5), torch.tensor(1.0)
    values = [torch.tensor(float(number)) for number in range(8)]

    def work() -> None:
        for number in range(calls):
            guard.begin()
            skip = guard.judge(number, "unet", ("loss",), [loss], norm, parts)
            for value in values:
                stepping._unless(skip, value)
            bool(guard.skip)
            guard.end()
            guard.read()

    return seconds(work) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description="what the guard costs")
    parser.add_argument("--pairs", type=int, default=60)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as folder:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        loop = unet_stage(Path(folder), accelerator)
        guarded, plain = compare(loop, arguments.pairs)
        own = alone(loop)
    ratios = sorted(a / b for a, b in zip(guarded, plain, strict=True))
    step, ratio = statistics.median(plain), statistics.median(ratios)
    quarters = statistics.quantiles(ratios, n=4)
    found = {
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads of the CPU, torch {torch.__version__}",
        "pairs": arguments.pairs,
        "step_cpu_seconds": step,
        "ratio_median": ratio,
        "ratio_quarters": [quarters[0], quarters[2]],
        # Of a median, from the distance of the quarters, as for a normal distribution.
        "ratio_standard_error": 1.253 * (quarters[2] - quarters[0]) / 1.349 / len(ratios) ** 0.5,
        "guard_cpu_seconds": own,
        "guard_share": own / step,
        "steps_skipped": loop.guard.total,
    }
    RESULTS.mkdir(exist_ok=True)
    write_text(RESULTS / "guard.json", json.dumps(found, indent=1) + "\n")
    text = (
        f"`python benchmarks/guard.py` on {found['hardware']}, "
        f"quickstart's U-Net step, {arguments.pairs} pairs in turns:\n\n"
        "| | |\n|---|---|\n"
        f"| a step without the guard, CPU time | {step:.3f} s |\n"
        f"| with / without, median of pairs | {ratio:.4f} ± {found['ratio_standard_error']:.4f} |\n"
        f"| half of the pairs are between | {quarters[0]:.3f} and {quarters[2]:.3f} |\n"
        f"| the guard's own calls alone | {own * 1e6:.0f} µs a step, {100 * own / step:.3f} % |\n"
    )
    write_text(RESULTS / "guard.md", text)
    print(text)


if __name__ == "__main__":
    main()
