"""Copies in host memory: what the writer of a checkpoint reads while training changes the originals."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

ALIGNED = 64


class Staging:
    """One block of host memory, kept from save to save: fresh memory costs more time than the copy itself.

    On CUDA it is pinned, so that the copy runs at the speed of the bus.
    """

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)

    def copies(self, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Contiguous copies of all tensors, complete on return and valid until the next call."""
        tensors = [value for group in groups.values() for value in group.values()]
        size = sum(_room(value) for value in tensors)
        on_cuda = any(value.is_cuda for value in tensors)
        if self._block.numel() < size:
            self._block = torch.empty(size, dtype=torch.uint8, pin_memory=on_cuda)
        at, found = 0, {}
        for name, group in groups.items():
            found[name] = {}
            for key, value in group.items():
                part = self._block[at : at + value.numel() * value.itemsize]
                copy = part.view(value.dtype).view(value.shape)
                copy.copy_(value.detach(), non_blocking=True)
                found[name][key] = copy
                at += _room(value)
        if any(value.device.type != "cpu" for value in tensors):
            torch.accelerator.synchronize()
        return found


def _room(value: Tensor) -> int:
    return -(-value.numel() * value.itemsize // ALIGNED) * ALIGNED
