"""Randomness as a function: every draw is f(seed, name, step, position in the global batch), never a stream.

A run that is stopped, or spread over other processes, or cut into other micro-batches sees the same draws, because
nothing is remembered between them. Draws are made on the CPU so that they do not depend on the device either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from `parts`, the same on every machine and in every Python process."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `seed_of(*parts)`."""
    return torch.Generator().manual_seed(seed_of(*parts))


@dataclass(frozen=True)
class Draw:
    """The random numbers of one training step, restricted to `rows` of the global batch.

    Args:
        seed: the run's seed.
        stage: name of the stage ("vae", "clip", "unet"): stages do not share draws.
        step: number of the optimizer step, from 0.
        global_batch: examples in the whole step, over all processes and micro-batches.
        rows: the half-open range of positions in the global batch that the caller holds.
        indices: example number at each of those positions.
    """

    seed: int
    stage: str
    step: int
    global_batch: int
    rows: range
    indices: tuple[int, ...] = ()

    def _generator(self, name: str) -> torch.Generator:
        return generator(self.seed, self.stage, name, self.step)

    def _mine(self, whole: Tensor) -> Tensor:
        return whole[self.rows.start : self.rows.stop]

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Standard normal noise `[rows, *shape]`, float32."""
        return self._mine(torch.randn(self.global_batch, *shape, generator=self._generator(name)))

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform numbers in [0, 1), `[rows, *shape]`, float32."""
        return self._mine(torch.rand(self.global_batch, *shape, generator=self._generator(name)))

    def permutation(self, name: str) -> Tensor:
        """This holder's part, `[rows]` int64, of one random permutation of 0 .. global_batch - 1."""
        return self._mine(torch.randperm(self.global_batch, generator=self._generator(name)))

    def integers(self, name: str, high: int) -> Tensor:
        """Uniform integers in 0 .. high - 1, `[rows]` int64."""
        return self._mine(torch.randint(high, (self.global_batch,), generator=self._generator(name)))
