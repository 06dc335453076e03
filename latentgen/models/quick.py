"""A network laid out as this CPU computes it fastest. The same numbers, but for the rounding of sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def quicken(network: nn.Module) -> None:
    """Change a network in place for training on the CPU in float32; its parameters stay the same, with their names.

    Convolutions: channels come last. Linear layers: oneDNN multiplies, not MKL, which leaves the wide vectors of CPUs
    of other makers unused (with AVX-512 on a Zen 5 core 105 against 150 to 240 GFLOP/s). Only where there are such
    vectors. In bfloat16 there is nothing to gain: oneDNN does it all, and the layout is slower (a U-Net by 6 to 15 %).
    """
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # convolutions follow their weights
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return
    for parent in list(network.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear:
                setattr(parent, name, _quick(layer))


class QuickLinear(nn.Linear):
    """A linear layer by oneDNN, in float32 outside of autocast."""

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu" or input.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        return _Product.apply(input, self.weight, self.bias)


class _Product(torch.autograd.Function):
    """x [..., i], weight [o, i], bias [o] or None -> [..., o]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            _product(rows, weight.t()).view(x.shape) if for_x else None,
            _product(rows.t(), x.reshape(-1, x.shape[-1]).t()) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # What torch.compile calls for linear layers; there is no public name for it.
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def _quick(layer: nn.Linear) -> QuickLinear:
    """The same layer, with the same parameters."""
    made = QuickLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    made.weight, made.bias = layer.weight, layer.bias
    return made.train(layer.training)
