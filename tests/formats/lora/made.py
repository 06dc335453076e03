"""Adapters with random weights, as a training run would leave them. Loaded by the tests of LoRA files."""

from __future__ import annotations

import copy
from typing import Any

import tiny
import torch

from latentgen.formats.lora.file import LoraFile, trained_lora
from latentgen.models.adapters import AdapterSpec, adapter_parameters, add_adapters

EVERYWHERE = ("attention", "feed_forward", "convolution")


def trained(kind: Any = "lora", family: str = "sd1", seed: int = 5, **settings: Any) -> tuple[Any, Any]:
    """The plain networks of a family, and equal ones with adapters that do something."""
    base = tiny.networks(family)
    networks = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    add_adapters(networks, AdapterSpec(**{"kind": kind, "rank": 3, "alpha": 2, "targets": EVERYWHERE, **settings}))
    for network in networks.values():
        with torch.no_grad():
            for name, value in adapter_parameters(network).items():
                noise = torch.randn(value.shape, generator=generator)
                value.copy_(value * (1 + 0.1 * noise) if "magnitude" in name else 0.3 * noise)
    return base, networks


def lora(kind: Any = "lora", family: str = "sd1", seed: int = 5, **settings: Any) -> tuple[Any, LoraFile]:
    """The plain networks of a family, and a file of adapters for them."""
    base, networks = trained(kind, family, seed, **settings)
    return base, trained_lora(networks)


def assert_same_file(one: LoraFile, other: LoraFile) -> None:
    """Every tensor of both is in the other, and equal bit for bit."""
    assert {name: set(own) for name, own in one.modules.items()} == {n: set(own) for n, own in other.modules.items()}
    for name, own in one.modules.items():
        for path, factors in own.items():
            left, right = factors.named(), other.modules[name][path].named()
            assert left.keys() == right.keys(), path
            for tensor, value in left.items():
                assert value.dtype == right[tensor].dtype, (path, tensor)
                assert torch.equal(value, right[tensor]), (path, tensor)
