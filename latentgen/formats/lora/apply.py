"""LoRA files put into the weights of networks, and taken out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from latentgen.core.errors import UserError
from latentgen.core.tensors import require_finite
from latentgen.formats.lora.file import LoraFile
from latentgen.models.adapters import adaptable
from latentgen.models.deltas import delta, fits

Weight = float | Mapping[str, float]
"""How strong: one number, or one for each network; networks that are not named have 1."""


def merge(networks: Mapping[str, nn.Module], file: LoraFile, weight: Weight = 1.0) -> None:
    """Add `weight` times the change that `file` makes, in place.

    The sum is computed in float32 and stored in the network's own type. DoRA too is weighted by its change: 0 is the
    network as it was, 1 what was trained. Where the weight is 0 no tensor is touched.

    Args:
        networks: by "unet", "text_encoder", "text_encoder_2".
        file: what it has for networks that are not here must have weight 0.
        weight: of the change; negative takes it away.

    Raises:
        UserError: a module is missing or has another shape; nothing is changed then.
        FloatingPointError: a sum is not finite in the network's type; nothing is changed then.
    """
    for parameter, new in _sums(networks, file, weight):
        with torch.no_grad():
            parameter.copy_(new)


def unmerge(networks: Mapping[str, nn.Module], file: LoraFile, weight: Weight = 1.0) -> None:
    """Subtract what `merge` added. The last bits differ from before: `merged` gives those back.

    Raises:
        UserError: the file has DoRA, whose change cannot be told from the sum; or as `merge`.
        FloatingPointError: as `merge`.
    """
    nonlinear = [f"{name} {path}" for name, own in file.modules.items() for path, f in own.items() if not f.linear]
    if nonlinear:
        raise UserError(
            f"DoRA cannot be subtracted ({len(nonlinear)} modules, the first is {nonlinear[0]}); load the model again"
        )
    minus = {name: -_weight_of(name, weight) for name in file.modules}
    merge(networks, file, minus)


@contextmanager
def merged(networks: Mapping[str, nn.Module], file: LoraFile, weight: Weight = 1.0) -> Iterator[None]:
    """Merged inside the block; afterwards the weights are what they were, bit for bit.

    Needs memory for a second copy of the weights that are changed.

    Raises:
        UserError, FloatingPointError: as `merge`.
    """
    sums = _sums(networks, file, weight)
    kept = [(parameter, parameter.detach().clone()) for parameter, _ in sums]
    try:
        with torch.no_grad():
            for parameter, new in sums:
                parameter.copy_(new)
        del sums
        yield
    finally:
        with torch.no_grad():
            for parameter, old in kept:
                parameter.copy_(old)


def _weight_of(network: str, weight: Weight) -> float:
    return weight.get(network, 1.0) if isinstance(weight, Mapping) else weight


def _sums(networks: Mapping[str, nn.Module], file: LoraFile, weight: Weight) -> list[tuple[Tensor, Tensor]]:
    """The weights to change, and what they become; everything is checked before anything is computed."""
    found = [
        (name, path, strength)
        for name, own in file.modules.items()
        if (strength := _weight_of(name, weight)) != 0
        for path in own
    ]
    for name in dict.fromkeys(name for name, *_ in found):
        if name not in networks:
            raise UserError(f"the LoRA changes {name}, which the model has not; give {name} the weight 0")
    modules = {name: adaptable(networks[name]) for name in {name for name, *_ in found}}
    for name, path, _ in found:
        if path not in modules[name] or not fits(file.modules[name][path], modules[name][path].weight.shape):
            raise UserError(f"the LoRA does not fit the model: {name} {path}; it was made for another one")
    sums: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for name, path, strength in found:
            parameter = modules[name][path].weight
            change = strength * delta(file.modules[name][path], parameter)
            sums.append((parameter, (parameter.to(change.dtype) + change).to(parameter.dtype)))
    named = {f"{name} {path}": new for (name, path, _), (_, new) in zip(found, sums, strict=True)}
    require_finite(named, "the merged model")
    return sums
