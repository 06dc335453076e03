"""A tiny task and what two processes do with it: started by `test_sharding.py`, twice at once, as torchrun would.

Its arguments: a FOLDER and the optimizer's kind. FOLDER/begun holds a checkpoint of one process, half way.
Written: FOLDER/two, the same training sharded from its start; FOLDER/parts-RANK.json, how much of everything a process
has; FOLDER/kept, the checkpoint as it is after having been cut and put together; FOLDER/begun to its end;
FOLDER/again, `two` continued from half way.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from latentgen.core.rand import Draw
from latentgen.data.loader import Cut, Loader
from latentgen.data.order import Shuffled
from latentgen.engine.checkpoint import Keep
from latentgen.engine.loop import Loop
from latentgen.engine.saver import Saver
from latentgen.engine.settings import LoopSettings, StagePaths
from latentgen.engine.sharding import Sharding
from latentgen.engine.task import Phase
from latentgen.engine.validation import FixedExamples, Validation
from latentgen.engine.world import make_world

STEPS, BATCH, MICRO = 6, 8, 2
SETTINGS = LoopSettings(
    optimizer="adamw",
    steps=STEPS,
    learning_rate=0.02,
    schedule="cosine",
    warmup_steps=2,
    final_learning_rate=0.0,
    weight_decay=0.1,
    beta1=0.9,
    beta2=0.99,
    grad_clip=0.3,
    ema_decay=0.8,
    log_every=1,
    save_every=3,
    keep_last=9,
    preview_every=3,
    ema_lengths=(0.1,),
    ema_snapshots=3,
    ema_precision="fp32",
)


class Net(nn.Module):
    """A channels_last convolution, a list of blocks, rows that two processes cannot share evenly, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))
        self.conv = nn.Conv2d(2, 5, 3)
        self.blocks = nn.ModuleList([nn.Linear(45, 45), nn.Linear(45, 45)])
        self.last = nn.Linear(45, 1)
        self.register_buffer("shift", torch.full((45,), 0.1))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(1) + self.shift
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.last(x) * self.scale.exp()


class Toy:
    """Regression with a critic that has no average and starts late."""

    name = "toy"

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.modules: dict[str, nn.Module] = {"net": Net(), "critic": nn.Linear(1, 1)}
        self.averaged: tuple[str, ...] = ("net",)

    def phases(self) -> tuple[Phase, ...]:
        return Phase("net", ("net",)), Phase("critic", ("critic",), start=2)

    def losses(self, phase: str, batch: Any, draw: Draw) -> dict[str, Tensor]:
        out = self.modules["net"](batch["x"])
        if phase == "critic":
            return {"loss": (self.modules["critic"](out.detach()) - 1).square().mean()}
        return {"loss": (out - batch["y"]).square().mean() - 0.1 * self.modules["critic"](out).mean()}

    def measure(self, averaged: Mapping[str, nn.Module], batch: Any, draw: Draw) -> dict[str, Tensor]:
        wanted = batch["y"] + torch.tensor(draw.indices)[:, None]
        return {"loss": (averaged["net"](batch["x"]) - wanted).square().mean(dim=1)}

    def preview(self, averaged: Mapping[str, nn.Module], step: int, folder: Path) -> dict[str, float]:
        with torch.no_grad():
            return {"out": float(averaged["net"](torch.ones(1, 2, 5, 5)).sum())}


def fetch(draw: Draw) -> dict[str, Tensor]:
    return {"x": draw.normal("x", (2, 5, 5)), "y": draw.normal("y", (1,))}


def toy_loop(folder: Path, kind: str, accelerator: Accelerator, shards: Sharding | None = None) -> Loop:
    cut = Cut(BATCH, MICRO, accelerator.process_index, accelerator.num_processes)
    paths = StagePaths(folder / "c", folder / "s", folder / "m.jsonl", folder / "tb", folder / "e")
    task = Toy(accelerator.process_index)  # processes that do not even begin alike: the first one's weights count
    settings = replace(SETTINGS, optimizer=kind)
    # Five of each: two processes have three and two of them, in two batches and one.
    sets = [FixedExamples(fetch, tuple(range(first, first + 5))) for first in (0, 10)]
    validation = Validation(task.measure, *sets, seed=0, stage="toy", every=2, parts=2, batch=MICRO)
    loader = Loader(fetch, Shuffled(20), 0, "toy", cut, STEPS)
    return Loop(task, loader, settings, accelerator, paths, shards, validation)


def parts(loop: Loop) -> dict[str, list[int]]:
    """What of the network is cut: name -> elements here, elements in all. A whole tensor has -1 here."""
    net, optimizer = loop.trained.plain["net"], loop.trained.optimizers["net"].optimizer
    found: dict[str, Any] = {f"weight/{name}": p for name, p in net.named_parameters()}
    found |= {f"gradient/{name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    found |= {f"average/{name}": p for name, p in loop.trained.ema["net"].averaged.named_parameters()}
    found |= {f"length/{name}": p for name, p in loop.trained.lengths.averages["net-0.1"].averaged.named_parameters()}
    for name, p in net.named_parameters():
        found |= {f"{key}/{name}": value for key, value in optimizer.state[p].items() if key != "step"}
    return {
        name: [value.to_local().numel() if isinstance(value, DTensor) else -1, value.numel()]
        for name, value in found.items()
    }


def main(folder: Path, kind: str) -> None:
    world = make_world("fp32", processes=2, device="cpu")
    accelerator, rank = world.accelerator, world.accelerator.process_index

    loop = toy_loop(folder / "two", kind, accelerator, world.sharding)
    loop.run()
    grouped = [name for name, module in loop.trained.plain["net"].named_modules() if isinstance(module, FSDPModule)]
    (folder / f"parts-{rank}.json").write_text(json.dumps({"parts": parts(loop), "groups": grouped}))

    loop = toy_loop(folder / "begun", kind, accelerator, world.sharding)
    step = loop._restore()
    with Saver(folder / "kept", Keep(9), accelerator, sharded=True) as saver:
        saver.save(loop.state.snapshot(step))
    if rank == 0:
        shutil.copytree(folder / "two" / "c" / "00000003", folder / "again" / "c" / "00000003")
    accelerator.wait_for_everyone()
    for name in ("begun", "again"):
        toy_loop(folder / name, kind, accelerator, world.sharding).run()
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
