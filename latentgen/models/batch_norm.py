"""Batch normalisation over the batch of ALL processes, so that a run is the same on any number of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn

from latentgen.core.processes import rank_and_world


class GlobalBatchNorm(nn.Module):
    """torch.nn.BatchNorm2d (arXiv 1502.03167) whose mean and variance are those of the global batch.

    torch's SyncBatchNorm does this on GPUs only. Every process must hold equally many examples, in one forward pass.
    The backward pass sums over the processes: right where each one's loss is that of the whole batch and gradients are
    averaged, as with `models.clip.contrastive_loss`.

    Args:
        channels: of the input `[b, channels, h, w]`.
        momentum: how far one batch moves the running statistics that evaluation uses, in (0, 1].
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[b, c, h, w]` per channel; in training by the batch, which also moves the running statistics."""
        # Rows of channels, a view where the layout is channels_last: sums over rows are many times faster on the CPU.
        rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        if self.training:
            mean, var = self._of_batch(rows.float())
        else:
            mean, var = self.running_mean, self.running_var
        scale = self.weight * torch.rsqrt(var + self.eps)
        out = torch.addcmul((self.bias - mean * scale).to(x.dtype), rows, scale.to(x.dtype))
        return out.view(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)

    def _of_batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance `[c]` over the rows of all processes."""
        count, moments = len(rows), torch.stack((rows.mean(0), rows.square().mean(0)))
        _, world = rank_and_world()
        if world > 1:
            count, moments = count * world, _sum(moments) / world
        mean, var = moments[0], (moments[1] - moments[0].square()).clamp_min(0)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / max(1, count - 1)), self.momentum)
        return mean, var


def replace_batch_norm(module: nn.Module) -> None:
    """Put a `GlobalBatchNorm` in the place of every BatchNorm2d inside `module`, with its weights."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            assert child.momentum is not None
            new = GlobalBatchNorm(child.num_features, child.momentum, child.eps)
            new.load_state_dict({key: value for key, value in child.state_dict().items() if key in new.state_dict()})
            setattr(module, name, new)
        else:
            replace_batch_norm(child)


class _Sum(torch.autograd.Function):
    """Sum over all processes; so is the gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total


def _sum(value: Tensor) -> Tensor:
    total = _Sum.apply(value)
    assert isinstance(total, Tensor)
    return total
