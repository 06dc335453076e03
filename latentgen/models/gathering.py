"""Rows of all processes together, with their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from latentgen.core.processes import rank_and_world


def gather_rows(rows: Tensor) -> Tensor:
    """`rows` [b, ...] of every process, in rank order; b equal on all. One process's own, as they are."""
    if rank_and_world()[1] == 1:
        return rows
    gathered = _AllGather.apply(rows)
    assert isinstance(gathered, Tensor)
    return gathered


class _AllGather(torch.autograd.Function):
    """The gradient is summed over the processes and cut back to one's own rows.

    `torch.distributed.nn.all_gather`, which open_clip calls, does the same but is deprecated.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = rows.shape[0]
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        start = distributed.get_rank() * ctx.count
        return total[start : start + ctx.count]
