"""What the loop knows of a task and its data: modules, phases, losses, batches. Nothing of pictures or captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from latentgen.core.rand import Draw

MicroBatches = list[tuple[Draw, Any]]


class StepData(Protocol):
    """Where batches come from: (step, micro-batches) from any step on."""

    def iterate(self, start: int) -> Iterator[tuple[int, MicroBatches]]:
        """Yield from step `start` to the last."""
        ...


@dataclass(frozen=True)
class Phase:
    """One optimizer of a step.

    Args:
        name: passed to `Task.losses`, and names the optimizer in checkpoints.
        trains: names of the modules whose parameters it updates, those that require gradients before training.
        start: first step at which the phase runs (an adversarial phase starts late).
        rates: module -> factor on the scheduled learning rate, which the log has; 1 where nothing is said.
        no_decay: modules of which nothing decays: learned tokens, adapters.
    """

    name: str
    trains: tuple[str, ...]
    start: int = 0
    rates: Mapping[str, float] = field(default_factory=dict)
    no_decay: tuple[str, ...] = ()


class Task(Protocol):
    """What can be trained. A task has no loop of its own.

    `modules` holds every trained network by name; the loop replaces each by its distributed wrapper, so `losses` must
    call them through this mapping and by `forward`. `averaged` names the modules of which an EMA is kept, and which
    FSDP cuts.

    Parameters that do not require gradients are frozen: they are in no checkpoint, and averages share them.
    """

    name: str
    modules: dict[str, nn.Module]
    averaged: tuple[str, ...]

    def phases(self) -> tuple[Phase, ...]:
        """The phases of a step, in order."""
        ...

    def losses(self, phase: str, batch: Any, draw: Draw) -> dict[str, Tensor]:
        """Scalars of one micro-batch; "loss" is minimised, the rest are logged. Means over the batch."""
        ...

    def preview(self, averaged: Mapping[str, nn.Module], step: int, folder: Path) -> dict[str, float]:
        """Draw pictures into `folder` with the averaged modules; return measurements to log."""
        ...
