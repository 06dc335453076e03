"""Models of which a part is being learned, as they will be when they are opened from their files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from latentgen.formats.lora.apply import merged
from latentgen.formats.lora.file import LoraFile, trained_lora
from latentgen.formats.model import Model
from latentgen.models.adapters import adapter_parameters, switched_off


def adapters_of(averaged: Mapping[str, nn.Module]) -> LoraFile | None:
    """The adapters of these networks as a file would have them; None where none has any."""
    adapted = {name: network for name, network in averaged.items() if adapter_parameters(network)}
    return trained_lora(adapted) if adapted else None


@contextmanager
def drawn(model: Model, averaged: Mapping[str, nn.Module]) -> Iterator[Model]:
    """`model` with the averaged networks, to draw with inside the block.

    Adapters are added to the weights they sit on, as whoever opens their file adds them, so that previews are the
    pictures that users will get. Those weights are shared with the networks in training: they are given back bit for
    bit, and nothing trains inside the block.
    """
    file, whole = adapters_of(averaged), model.with_networks(averaged)
    if file is None:
        yield whole
        return
    networks = {name: averaged[name] for name in file.modules}
    with switched_off(networks.values()), merged(networks, file):
        yield whole
