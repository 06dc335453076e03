"""The networks as they were before training, which say what pictures of the class are to be predicted as.

The model that training starts from is asked what it predicts of the very input that the trained one sees, so that the
two differ only where training has changed something: no noise is learned, and what is already right is left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from latentgen.models.adapters import adapter_parameters, switched_off


class Original:
    """`networks` before they are trained: those with adapters without them, of the others that are trained a copy.

    Args:
        networks: by name, as they are now; not yet wrapped, and not yet trained.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self._adapted = {name: network for name, network in networks.items() if adapter_parameters(network)}
        self._copied = {
            name: copy.deepcopy(network).eval().requires_grad_(False)
            for name, network in networks.items()
            if name not in self._adapted and any(parameter.requires_grad for parameter in network.parameters())
        }
        self._networks = {**networks, **self._copied}

    def copies(self) -> tuple[nn.Module, ...]:
        """The networks that are here beside those in training."""
        return tuple(self._copied.values())

    @contextmanager
    def networks(self) -> Iterator[dict[str, nn.Module]]:
        """The networks, which compute without gradients and as they were inside the block."""
        with torch.no_grad(), switched_off(self._adapted.values()):
            yield dict(self._networks)
