"""What of a network changes while it trains, told in one place: what requires gradients, and its buffers.

Checkpoints, good states, averages and their snapshots hold this alone. What is frozen, a base under adapters say, is as
it was where it came from: it costs them nothing, and nobody writes to it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from latentgen.engine import sharding


class Changing:
    """The names of what changes of `module`, found before it trains: a task may switch gradients off for a while.

    Attributes:
        parameters: those that require gradients, under all the names that one has.
        names: those and the persistent buffers, in the order of `state_dict`.
    """

    def __init__(self, module: nn.Module) -> None:
        parameters = dict(module.named_parameters(remove_duplicate=False))
        self.parameters = frozenset(name for name, p in parameters.items() if p.requires_grad)
        frozen = parameters.keys() - self.parameters
        self.names = tuple(name for name in module.state_dict() if name not in frozen)

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors themselves, of `module` or of a copy of it; either may be cut."""
        state = module.state_dict()
        return {name: state[name] for name in self.names}

    def local(self, module: nn.Module) -> list[Tensor]:
        """This process's part of each parameter that changes."""
        named = zip(module.named_parameters(), sharding.local(module), strict=True)
        return [part for (name, _), part in named if name in self.parameters]

    def copied(self, module: nn.Module, device: torch.device | None = None) -> nn.Module:
        """A copy of `module` in eval mode, which requires no gradients and shares the parameters that are frozen.

        Args:
            device: for what is copied; None leaves it where it is.
        """
        memo: dict[int, Any] = {id(buffer): buffer.detach().to(device, copy=True) for buffer in module.buffers()}
        for name, p in module.named_parameters():
            own = name in self.parameters
            memo[id(p)] = nn.Parameter(p.detach().to(device, copy=True), requires_grad=False) if own else p
        return copy.deepcopy(module, memo).eval()
