"""Which tensor of which module a key of a LoRA file is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from latentgen.formats.lora.layouts import LAYOUTS, Layout
from latentgen.models.deltas import Factors, missing

Shapes = Mapping[str, Mapping[str, torch.Size]]
"""For each network ("unet", "text_encoder", "text_encoder_2"): its modules, and the shapes of their weights."""


class Slot(NamedTuple):
    """A network, a module of it, and the tensor: "lora.down" and so on, "alpha" or "magnitude"."""

    network: str
    module: str
    tensor: str


def recognised(keys: Iterable[str], shapes: Shapes) -> tuple[str, dict[str, Slot]]:
    """The layout in which most keys name modules of the networks, and what those keys are."""
    keys = list(keys)
    found: dict[str, dict[str, Slot]] = {}
    for name, layout in LAYOUTS.items():
        table = _table(layout, shapes)
        found[name] = {key: slot for key in keys if (slot := _slot(key, layout, table)) is not None}
    best = max(found, key=lambda name: len(found[name]))
    return best, found[best]


def grouped(slots: Mapping[str, Slot]) -> dict[tuple[str, str], dict[str, str]]:
    """For each network and module, its tensors and their keys; of two keys for one tensor, the first."""
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for key, (network, module, tensor) in slots.items():
        groups.setdefault((network, module), {}).setdefault(tensor, key)
    return groups


def flaw(names: Iterable[str]) -> str | None:
    """What is wrong with the tensors of a module, named as in a `Slot`; None where they make factors."""
    names = set(names)
    kinds = sorted({name.split(".")[0] for name in names if "." in name})
    if len(kinds) != 1:
        return f"belongs to {' and '.join(kinds) or 'no'} factors"
    lacking = missing(kinds[0], {name.split(".")[1] for name in names if "." in name})
    return None if lacking is None else f"has no {lacking} of {kinds[0]} beside it"


def assembled(named: Mapping[str, Tensor], layout: str) -> Factors:
    """The factors that a module's tensors make; there is no `flaw` in their names."""
    (kind,) = {name.split(".")[0] for name in named if "." in name}
    tensors = {name.split(".")[1]: value for name, value in named.items() if "." in name}
    alpha, magnitude = named.get("alpha"), named.get("magnitude")
    if magnitude is not None and LAYOUTS[layout].magnitude_of_outputs:
        magnitude = magnitude.reshape(-1, *[1] * (tensors["down"].dim() - 1))
    return Factors(kind, tensors, None if alpha is None else alpha.reshape(()), magnitude)


def spelled(keys: Iterable[str]) -> str:
    """The layout that most keys have the prefix and a suffix of, whatever they name between; "" where none has."""
    keys = list(keys)
    counts = {name: sum(_has_affixes(key, layout) for key in keys) for name, layout in LAYOUTS.items()}
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else ""


def _table(layout: Layout, shapes: Shapes) -> dict[str, dict[str, str]]:
    """For each network, names in this layout to modules."""
    tables: dict[str, dict[str, str]] = {}
    for network, modules in shapes.items():
        table = tables.setdefault(network, {})
        for path, names in layout.names(network, list(modules)).items():
            for name in names:
                assert table.get(name, path) == path, f"{name} names two modules"
                table[name] = path
    return tables


def _slot(key: str, layout: Layout, table: Mapping[str, Mapping[str, str]]) -> Slot | None:
    for prefix, only in layout.prefixes:
        if not key.startswith(prefix):
            continue
        for tensor, spellings in layout.suffixes.items():
            for spelling in spellings:
                if not key.endswith(spelling):
                    continue
                name = key[len(prefix) : len(key) - len(spelling)]
                for network in table if only is None else (only,):
                    if name in table.get(network, {}):
                        return Slot(network, table[network][name], tensor)
    return None


def _has_affixes(key: str, layout: Layout) -> bool:
    if not any(prefix and key.startswith(prefix) for prefix, _ in layout.prefixes):
        return False
    return any(key.endswith(spelling) for spellings in layout.suffixes.values() for spelling in spellings)
