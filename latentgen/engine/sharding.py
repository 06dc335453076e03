"""FSDP2: networks cut over the processes by torch's own `fully_shard` (arXiv 2304.11277), on GPUs and on the CPU alike.

Every process keeps its rows of each parameter, gradient, moment and average; a group of layers is put together while
it computes. accelerate's own FSDP2 is not asked: it takes one network only, and on the CPU it is silently DDP.
Whoever calls `whole` or `assemble` must do so in all processes at once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from latentgen.core.errors import UserError


@dataclass(frozen=True)
class Sharding:
    """How to shard.

    Args:
        min_parameters: of a group that is put together, and freed again, as one.
        reshard_after_forward: free the groups between forward and backward; False is faster and takes more memory.
    """

    min_parameters: int = 1_000_000
    reshard_after_forward: bool = True


def shard(network: nn.Module, sharding: Sharding, device: torch.device) -> None:
    """Cut the parameters of `network`, in place, along their first dimension over all processes.

    Rank 0's weights and buffers count. Scalars cannot be cut: they stay whole, and their gradients are averaged.
    Buffers that training changes are not made to agree later.
    """
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # fully_shard takes no other
    for value in (*network.parameters(), *network.buffers()):
        distributed.broadcast(value.detach(), 0)
    scalars = {p for p in network.parameters() if p.ndim == 0}
    for scalar in scalars:
        if scalar.requires_grad:
            scalar.register_hook(_mean)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for group in groups(network, sharding.min_parameters):
        fully_shard(group, mesh=mesh, reshard_after_forward=sharding.reshard_after_forward, ignored_params=scalars)
    # The rest stays together until the backward pass: a loss may look at the gradient of the last layer's weight.
    fully_shard(network, mesh=mesh, reshard_after_forward=False, ignored_params=scalars)
    assert all(isinstance(p, DTensor) or p in scalars for p in network.parameters())


def groups(network: nn.Module, min_parameters: int) -> list[nn.Module]:
    """The inner modules to put together as one, inner before outer, each with so many parameters of its own or more.

    Only members of lists and sequences are taken: they are sure to be called, and it is the call that gathers them.
    """
    found: list[nn.Module] = []
    taken: set[nn.Parameter] = set()

    def visit(module: nn.Module, member: bool) -> None:
        for child in module.children():
            visit(child, isinstance(module, nn.ModuleList | nn.Sequential))
        own = {p for p in module.parameters() if p.ndim > 0 and p not in taken}
        large = own and sum(p.numel() for p in own) >= min_parameters
        if member and large and not isinstance(module, nn.ModuleList):
            found.append(module)
            taken.update(own)

    visit(network, False)
    return found


def _mean(gradient: Tensor) -> Tensor:
    total = gradient.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def here(value: Tensor) -> Tensor:
    """This process's part of a tensor; one that is not cut, as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def local(network: nn.Module) -> list[Tensor]:
    """This process's part of each parameter."""
    if isinstance(network, FSDPModule):
        network.reshard()  # after a forward pass without a backward one the outermost group is still whole
    return [here(p) for p in network.parameters()]


def cut(value: Tensor, like: Tensor) -> Tensor:
    """This process's part, cut like `like`, of a `value` that is whole or is just that part; uncut if `like` is."""
    if not isinstance(like, DTensor):
        return value
    if value.shape == like.shape:
        return distribute_tensor(value.detach(), like.device_mesh, like.placements, src_data_rank=None)
    here = value.detach().to(like.device)
    return DTensor.from_local(
        here, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def rows(value: Tensor) -> range | None:
    """Which rows of the whole tensor this process has; None when it has all."""
    if not isinstance(value, DTensor):
        return None
    total, mesh = value.shape[0], value.device_mesh
    share = -(-total // mesh.size())
    start = min(mesh.get_local_rank() * share, total)
    found = range(start, min(start + share, total))
    assert len(found) == value.to_local().shape[0], "rows are cut as torch.chunk does"
    return found


@torch.no_grad()
def whole(value: Tensor) -> Tensor:
    """The tensor put together from all processes' parts; one that is not cut, as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gather(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The whole tensors, those that were cut on the CPU; {} for a process that does not `keep` them."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        together = whole(value)
        if keep:
            found[name] = together.cpu() if isinstance(value, DTensor) else together
    return found


@torch.no_grad()
def load(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy into a network's `own` tensors, which may be cut, those of `state`, which are whole or this process's parts.

    Raises:
        UserError: they are not of the same names and shapes.
    """
    new = {name: cut(value, own[name]) for name, value in state.items() if name in own}
    wrong = sorted(own.keys() ^ state.keys()) or [name for name in own if new[name].shape != own[name].shape]
    if wrong:
        raise UserError(
            f"what was saved is not what this run trains ({', '.join(wrong[:3])}): the networks, or what is frozen of "
            "them, have changed; go on with the version and the recipe that saved it, or choose another name="
        )
    for name, value in own.items():
        value.copy_(new[name])


def rebuilt(module: nn.Module, parameters: Iterable[Tensor]) -> nn.Module:
    """A copy of `module` with these frozen parameters in the place of its own; shared ones stay shared.

    Args:
        parameters: `nn.Parameter` among them are taken as they are.
    """
    memo: dict[int, Any] = {}
    for old, new in zip(module.parameters(), parameters, strict=True):
        memo[id(old)] = new if isinstance(new, nn.Parameter) else nn.Parameter(new.detach(), requires_grad=False)
    return copy.deepcopy(module, memo)


def assemble(modules: Mapping[str, nn.Module], keep: bool) -> dict[str, nn.Module]:
    """The modules with whole parameters, themselves if nothing is cut; {} for a process that does not `keep` them."""
    found: dict[str, nn.Module] = {}
    for name, module in modules.items():
        parts = list(module.parameters())
        if not any(isinstance(p, DTensor) for p in parts):
            found[name] = module
        elif keep:
            found[name] = rebuilt(module, [whole(p) for p in parts])
        else:
            for part in parts:
                whole(part)
    return found
