"""A toy whose steps can be made to go wrong in every way, and a loop of it; for the tests of the guard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import toy_settings
from accelerate import Accelerator
from torch import Tensor, nn

from latentgen.core.rand import Draw
from latentgen.data.loader import Cut, Loader
from latentgen.data.order import Shuffled
from latentgen.engine.loop import Loop
from latentgen.engine.settings import StagePaths
from latentgen.engine.sharding import Sharding
from latentgen.engine.task import MicroBatches, Phase

STEPS, BATCH = 8, 8
SETTINGS = replace(
    toy_settings.SETTINGS, learning_rate=0.02, ema_lengths=(0.1,), ema_snapshots=toy_settings.NEVER, log_every=4
)


@dataclass(frozen=True)
class Fault:
    """What goes wrong at a step.

    Args:
        what: "loss" of a phase, "gradient" of its first parameter, "batch" (one example of the data), or "weight".
        value: put there, or what it is multiplied by.
        row: of the global batch, in whose micro-batch and process it happens; a weight goes wrong in all.
    """

    what: str
    step: int
    value: float = float("nan")
    phase: str = "net"
    row: int = 1


class Faulty:
    """A network with matrices large enough for Muon; a critic of it, which starts at step 2.

    Args:
        norm: with statistics of batches, which several processes do not share.
    """

    name = "toy"

    def __init__(self, *faults: Fault, norm: bool = True) -> None:
        torch.manual_seed(0)
        middle = nn.BatchNorm1d(16, momentum=0.5) if norm else nn.Identity()
        layers = nn.Linear(6, 16), middle, nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 3)
        self.modules: dict[str, nn.Module] = {"net": nn.Sequential(*layers), "critic": nn.Linear(3, 1)}
        self.plain = dict(self.modules)
        self.averaged: tuple[str, ...] = ("net",)
        self.faults = faults

    def phases(self) -> tuple[Phase, ...]:
        return Phase("net", ("net",)), Phase("critic", ("critic",), start=2)

    def at(self, what: str, phase: str, draw: Draw) -> Iterator[Fault]:
        here = (f for f in self.faults if f.what == "weight" or f.row in draw.rows)
        return (f for f in here if (f.what, f.step, f.phase) == (what, draw.step, phase))

    def losses(self, phase: str, batch: Any, draw: Draw) -> dict[str, Tensor]:
        x = batch["x"]
        for fault in self.at("weight", phase, draw):
            with torch.no_grad():
                for p in self.plain[phase].parameters():
                    p.mul_(fault.value)
        for fault in self.at("batch", phase, draw):
            x[fault.row - draw.rows.start, 2] = fault.value  # where the guard finds it again
        out = self.modules["net"](x)
        if phase == "critic":
            loss = (self.modules["critic"](out.detach()) - 1).square().mean()
        else:
            loss = (out - batch["y"]).square().mean() - 0.1 * self.modules["critic"](out).mean()
        for fault in self.at("loss", phase, draw):
            loss = loss * fault.value
        for fault in self.at("gradient", phase, draw):
            out = next(self.plain[phase].parameters())
            extra = (out * 0).sum()
            extra.register_hook(lambda g, f=fault: g * f.value)
            loss = loss + extra
        return {"loss": loss, "size": batch["x"].abs().mean().nan_to_num()}

    def preview(self, averaged: Mapping[str, nn.Module], step: int, folder: Path) -> dict[str, float]:
        return {}


def fetch(draw: Draw) -> dict[str, Tensor]:
    return {"x": draw.normal("x", (6,)), "y": draw.normal("y", (3,))}


def data(accelerator: Accelerator, steps: int = STEPS, micro: int | None = None) -> Loader:
    cut = Cut(BATCH, micro, accelerator.process_index, accelerator.num_processes)
    return Loader(fetch, Shuffled(40), 0, "toy", cut, steps)


def faulty_loop(
    folder: Path,
    accelerator: Accelerator,
    *faults: Fault,
    micro: int | None = None,
    shards: Sharding | None = None,
    norm: bool = True,
    on_preview: Callable[[], None] = lambda: None,
    **changes: Any,
) -> Loop:
    settings = replace(SETTINGS, **changes)
    paths = StagePaths(folder / "c", folder / "s", folder / "m.jsonl", folder / "tb", folder / "e")
    task = Faulty(*faults, norm=norm)
    return Loop(
        task, data(accelerator, settings.steps, micro), settings, accelerator, paths, shards, on_preview=on_preview
    )


def leave_out(loop: Loop, steps: set[int]) -> None:
    """Let the loop do nothing at all in these steps."""
    plain = loop.step

    def step(number: int, micro_batches: MicroBatches) -> None:
        if number not in steps:
            plain(number, micro_batches)

    loop.step = step  # type: ignore[assignment, method-assign]


def state(loop: Loop) -> dict[str, Tensor]:
    """All that is saved, by group and name."""
    groups = loop.state.snapshot(0).tensors
    return {f"{group}/{key}": value.clone() for group, tensors in groups.items() for key, value in tensors.items()}


def lines(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "m.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k != "steps_per_second"} for x in found if kind in (None, x["kind"])]
