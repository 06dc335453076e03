"""Which process this is, of how many."""

from __future__ import annotations

from torch import distributed


def rank_and_world() -> tuple[int, int]:
    """This process's number, and how many there are: (0, 1) where nothing is distributed."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
