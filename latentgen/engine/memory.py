"""How many examples go through the networks at once: found before training, lowered when memory runs out.

Draws are functions of an example's position in the global batch, and a step's gradient is the mean over its examples:
cutting a step into smaller micro-batches changes neither, but for the rounding of a sum.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentgen.core.errors import UserError
from latentgen.engine.agreement import anywhere
from latentgen.engine.task import MicroBatches

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def cut_rows(micro_batches: MicroBatches, size: int | None) -> MicroBatches:
    """The same examples in micro-batches of `size`, which divides those given; None and larger sizes change nothing."""
    if size is None or all(len(draw.rows) <= size for draw, _ in micro_batches):
        return micro_batches
    parts: MicroBatches = []
    for draw, batch in micro_batches:
        rows = len(draw.rows)
        assert rows % size == 0, (rows, size)
        for at in range(0, rows, size):
            mine = slice(at, at + size)
            parts.append((replace(draw, rows=draw.rows[mine], indices=draw.indices[mine]), _slice(batch, mine, rows)))
    return parts


def _slice(batch: Any, mine: slice, rows: int) -> Any:
    """These rows of a batch: of its tensors and lists that have a row for each example; the rest is shared."""
    if isinstance(batch, dict):
        return {key: _slice(value, mine, rows) for key, value in batch.items()}
    if (
        isinstance(batch, Tensor | list | tuple)
        and (not isinstance(batch, Tensor) or batch.ndim)
        and len(batch) == rows
    ):
        return batch[mine]
    return batch


def smaller(rows: int) -> int:
    """The largest divisor of `rows` that is at most half of it.

    Raises:
        UserError: one example is too much already.
    """
    for size in range(rows // 2, 0, -1):
        if rows % size == 0:
            return size
    raise UserError(
        "train.micro_batch: memory runs out on a single example; set unet.gradient_checkpointing: true, "
        "or lower data.resolution"
    )


class Fitting:
    """Keeps a step within memory.

    `size` is the number of examples that go through at once, None for as many as the data brings. It is part of a
    checkpoint: a resumed run sums in the same order.

    Args:
        active: without it running out of memory is an error as usual (losses that compare a batch's examples with each
            other cannot be cut).
    """

    def __init__(self, accelerator: Accelerator, *, active: bool) -> None:
        self.accelerator, self.active = accelerator, active
        self.size: int | None = None

    def attempt(self, micro_batches: MicroBatches, work: Callable[[MicroBatches], Result]) -> Result:
        """`work` on the micro-batches, cut smaller and begun anew as often as memory runs out.

        `work` must leave nothing behind when it fails. With several processes the others are already waiting for this
        one's gradients, so there it is an error: `rehearse` is where they agree.

        Raises:
            UserError: memory runs out with a single example, or in one of several processes.
        """
        while True:
            parts = cut_rows(micro_batches, self.size)
            try:
                return work(parts)
            except torch.OutOfMemoryError:
                if not self.active:
                    raise
                rows = len(parts[0][0].rows)
            # Outside of the handler: the error's traceback holds the activations.
            size = smaller(rows)
            if self.accelerator.num_processes > 1:
                raise UserError(
                    f"memory ran out with {rows} examples at once; give train.micro_batch={size}: "
                    "the same command then continues from the last checkpoint"
                )
            self._lower(rows, size)

    def rehearse(self, micro_batches: MicroBatches, work: Callable[[MicroBatches], object]) -> None:
        """Find the size before training: `work` computes gradients and talks to no other process.

        All processes must call it; they go on with the smallest size that any of them needs.
        """
        while True:
            parts = cut_rows(micro_batches, self.size)
            rows, failed = len(parts[0][0].rows), False
            try:
                work(parts[:1])  # every micro-batch is of the same shape
            except torch.OutOfMemoryError:
                failed = True
            if not anywhere(self.accelerator, failed):
                return
            self._lower(rows, smaller(rows))

    def _lower(self, rows: int, size: int) -> None:
        logger.warning("memory ran out with %d examples at once: now %d at once, the same batch", rows, size)
        self.size = size
        gc.collect()
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()


def reserve(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """As much memory as the moments will take that the optimizer makes in its first step; free it by dropping it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p not in optimizer.state]
    return [torch.empty_like(p) for p in parameters for _ in range(2)]


class Untouched:
    """While entered, networks may be run in training mode; their buffers are as before afterwards, gradients none."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules

    def __enter__(self) -> None:
        self.before = [(buffer, buffer.clone()) for buffer in self._buffers()]

    def __exit__(self, *_: object) -> None:
        for buffer, value in self.before:
            buffer.copy_(value)
        for module in self.modules:
            module.zero_grad(set_to_none=True)

    def _buffers(self) -> Iterator[Tensor]:
        for module in self.modules:
            yield from module.buffers()
