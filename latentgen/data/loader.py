"""Step number -> micro-batches, by torch's DataLoader. It has no state: everything follows from the step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset

from latentgen.core.errors import UserError
from latentgen.core.rand import Draw
from latentgen.data.order import Order

Batch = dict[str, Any]


@dataclass(frozen=True)
class Cut:
    """How a global batch is cut over processes and micro-batches.

    Args:
        global_batch: examples a step.
        micro_batch: examples of one forward pass; None means the process's whole share.
        rank, world: this process and how many there are.
    """

    global_batch: int
    micro_batch: int | None = None
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.global_batch % self.world:
            raise UserError(
                f"train.global_batch: {self.global_batch} does not divide over {self.world} processes; "
                "choose a multiple"
            )
        share = self.global_batch // self.world
        if self.micro_batch is not None and share % self.micro_batch:
            raise UserError(
                f"train.micro_batch: {self.micro_batch} does not divide the {share} examples each process has a step"
            )

    def rows(self) -> list[range]:
        """This process's micro-batches, as ranges of positions in the global batch."""
        share = self.global_batch // self.world
        size = self.micro_batch or share
        start = self.rank * share
        return [range(at, at + size) for at in range(start, start + share, size)]


class _MicroBatches(Dataset[tuple[Draw, Batch]]):
    """Item k is micro-batch k % per_step of step k // per_step."""

    def __init__(
        self, fetch: Callable[[Draw], Batch], order: Order, seed: int, stage: str, cut: Cut, steps: int
    ) -> None:
        self.fetch, self.order, self.seed, self.stage = fetch, order, seed, stage
        self.cut, self.steps = cut, steps
        self.rows = cut.rows()

    def __len__(self) -> int:
        return self.steps * len(self.rows)

    def draw(self, item: int) -> Draw:
        step, part = divmod(item, len(self.rows))
        rows, first = self.rows[part], step * self.cut.global_batch
        indices = self.order.at(range(first + rows.start, first + rows.stop), self.seed, self.stage)
        return Draw(self.seed, self.stage, step, self.cut.global_batch, rows, indices)

    def __getitem__(self, item: int) -> tuple[Draw, Batch | UserError]:
        draw = self.draw(item)
        try:
            return draw, self.fetch(draw)
        except UserError as error:  # raised again by the main process: a worker would wrap it in its own traceback
            return draw, error


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Who asks a whole process group to stop wants the step finished, for which the main process needs its workers.

    It ends them itself; with SIGTERM where they do not heed it, which therefore counts the second time.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.name != "nt":
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


@dataclass(frozen=True)
class Loader:
    """The data of one stage.

    Args:
        fetch: makes the batch of one `Draw` (whose `indices` name the examples); a pure function, picklable
            when `workers` > 0.
        order: which examples stand where in the run, a `Source.order` of the cut's global batch.
        workers: processes that run `fetch` ahead of time.
    """

    fetch: Callable[[Draw], Batch]
    order: Order
    seed: int
    stage: str
    cut: Cut
    steps: int
    workers: int = 0

    def iterate(self, start: int) -> Iterator[tuple[int, list[tuple[Draw, Batch]]]]:
        """Yield (step, micro-batches) from step `start` to the last."""
        items = _MicroBatches(self.fetch, self.order, self.seed, self.stage, self.cut, self.steps)
        parts = len(items.rows)
        loader = DataLoader(
            items,
            batch_size=None,
            sampler=range(start * parts, len(items)),
            num_workers=self.workers,
            prefetch_factor=2 if self.workers else None,
            worker_init_fn=_leave_signals_to_the_main_process,
        )
        pending: list[tuple[Draw, Batch]] = []
        for draw, batch in loader:
            if isinstance(batch, UserError):
                raise batch
            pending.append((draw, batch))
            if len(pending) == parts:
                yield pending[0][0].step, pending
                pending = []
