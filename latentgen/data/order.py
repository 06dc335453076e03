"""Position in the run -> example number: a stateless shuffle.

Epoch e visits every example once, in the order of a keyed permutation of 0 .. n-1. The permutation is computed, not
stored: a four-round Feistel network over the next power of four, walked until it lands below n (cycle walking).
So it needs no memory, and a run resumes at any position without replaying.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from latentgen.core.rand import seed_of

_ROUNDS = 4


def _mix(x: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 applied to x xor key: every input bit reaches every output bit."""
    x = x ^ np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(values: NDArray[np.int64], n: int, *key: int | str) -> NDArray[np.int64]:
    """Images of `values` (each in 0 .. n-1) under the permutation of 0 .. n-1 named by `key`."""
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    half, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    keys = [seed_of(*key, round_) for round_ in range(_ROUNDS)]
    result = values.astype(np.uint64)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right, round_key) & mask)
        result[outside] = (left << half) | right
        outside[outside] = result[outside] >= n
    return result.astype(np.int64)


def examples_at(positions: range, n: int, seed: int, stage: str) -> tuple[int, ...]:
    """Which example stands at each of `positions` of an endless run over n examples.

    Args:
        positions: half-open range counted from the start of the run, over the global batch.
        n: number of examples; each epoch is its own permutation of them.
    """
    at = np.arange(positions.start, positions.stop, dtype=np.int64)
    result = np.empty_like(at)
    for epoch in np.unique(at // n):
        here = at // n == epoch
        result[here] = permute(at[here] % n, n, seed, stage, "order", int(epoch))
    return tuple(int(i) for i in result)
