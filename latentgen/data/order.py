"""Position in the run -> example number: stateless orders.

Every order is a pure function of the seed, the stage and the position in the global batch's endless sequence: nothing
is remembered, so a run resumes at any position without replaying, and any number of processes and workers that share
the positions see the same examples. Epochs shuffle by keyed permutations that are computed, not stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from latentgen.core.rand import seed_of

_ROUNDS = 4
_KEPT = 8
"""Windows whose members are remembered, and blocks of permutations."""
_BLOCK = 1024
"""Neighbours that are permuted at once: sixty-four take nearly as long as a thousand."""


class Order(Protocol):
    """What stands where in an endless run."""

    def at(self, positions: range, seed: int, stage: str) -> tuple[int, ...]:
        """Example numbers at `positions`, counted from the start of the run over the global batch."""
        ...


def _mix(x: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 applied to x xor key: every input bit reaches every output bit."""
    x = x ^ np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(values: NDArray[np.int64], n: int, *key: int | str) -> NDArray[np.int64]:
    """Images of `values` (each in 0 .. n-1) under the permutation of 0 .. n-1 named by `key`.

    A four-round Feistel network over the next power of four, walked until it lands below n (cycle walking): no memory,
    at any n.
    """
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


def permuted(start: int, stop: int, n: int, *key: int | str) -> NDArray[np.int64]:
    """`permute` of start .. stop-1, for those who ask for one stretch after another."""
    blocks = range(start // _BLOCK, -(-stop // _BLOCK))
    parts = [_block(number, n, *key)[max(start - number * _BLOCK, 0) : stop - number * _BLOCK] for number in blocks]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


@lru_cache(maxsize=_KEPT)
def _block(number: int, n: int, *key: int | str) -> NDArray[np.int64]:
    made = permute(np.arange(number * _BLOCK, min((number + 1) * _BLOCK, n)), n, *key)
    made.flags.writeable = False
    return made


def _one(value: int, n: int, *key: int | str) -> int:
    return int(permute(np.array([value]), n, *key)[0])


@dataclass(frozen=True)
class Shuffled:
    """Every epoch is its own permutation of n examples."""

    n: int

    def at(self, positions: range, seed: int, stage: str) -> tuple[int, ...]:
        result: list[int] = []
        at = positions.start
        while at < positions.stop:
            epoch, inside = divmod(at, self.n)
            stop = min(self.n, inside + positions.stop - at)
            result += permuted(inside, stop, self.n, seed, stage, "order", epoch).tolist()
            at += stop - inside
        return tuple(result)


@dataclass(frozen=True)
class Windowed:
    """Examples that lie in groups (shards, row groups) which are cheap to read together: groups are shuffled, and
    examples within a window of `window` groups. Only a window's groups have to be at hand at a time.

    Args:
        groups: number of examples in each group; their numbers follow each other.
        window: groups shuffled together.
    """

    groups: tuple[int, ...]
    window: int = 4

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self.groups)]).astype(np.int64)

    def at(self, positions: range, seed: int, stage: str) -> tuple[int, ...]:
        n = int(self._starts[-1])
        result: list[int] = []
        at = positions.start
        while at < positions.stop:
            epoch, inside = divmod(at, n)
            members, ends = _windows(self, seed, stage, epoch)
            number = int(np.searchsorted(ends, inside, side="right"))
            first = int(ends[number - 1]) if number else 0
            stop = min(int(ends[number]), inside + positions.stop - at)
            size = int(ends[number]) - first
            places = permuted(inside - first, stop - first, size, seed, stage, "window", epoch, number)
            result += self.numbers(members[number], places)
            at += stop - inside
        return tuple(result)

    def numbers(self, groups: NDArray[np.int64], places: NDArray[np.int64]) -> list[int]:
        """Example numbers of the `places` in a window of these groups, one after the other."""
        sizes = np.asarray(self.groups)[groups]
        ends = np.cumsum(sizes)
        group = np.searchsorted(ends, places, side="right")
        return (self._starts[groups[group]] + places - (ends - sizes)[group]).tolist()

    def window_at(self, position: int, seed: int, stage: str) -> tuple[tuple[int, ...], int]:
        """The groups of the window in which a position lies, and the first position behind it."""
        epoch, inside = divmod(position, int(self._starts[-1]))
        members, ends = _windows(self, seed, stage, epoch)
        number = int(np.searchsorted(ends, inside, side="right"))
        return tuple(int(group) for group in members[number]), position - inside + int(ends[number])

    def among(self, examples: Sequence[int]) -> Windowed:
        """The order of these examples alone, ascending, which are numbered anew from 0."""
        return Windowed(_counts(self._starts, examples), self.window)


def _counts(starts: NDArray[np.int64], examples: Sequence[int]) -> tuple[int, ...]:
    """How many of these examples each group has."""
    group = np.searchsorted(starts, np.asarray(examples), side="right") - 1
    return tuple(np.bincount(group, minlength=len(starts) - 1).tolist())


@lru_cache(maxsize=_KEPT)
def _windows(order: Windowed, seed: int, stage: str, epoch: int) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
    """The groups of each window of an epoch, and after how many examples each ends."""
    count = len(order.groups)
    shuffled = permute(np.arange(count), count, seed, stage, "groups", epoch)
    members = [shuffled[at : at + order.window] for at in range(0, count, order.window)]
    sizes = np.asarray(order.groups)
    whole = [int(sizes[groups].sum()) for groups in members]
    kept = [(groups, size) for groups, size in zip(members, whole, strict=True) if size]
    return [groups for groups, _ in kept], np.cumsum([size for _, size in kept])


class ByShape:
    """Whole global batches of one shape each; batches of all shapes are shuffled together.

    An epoch shows every example: where the examples of a shape do not fill its last batch, it is filled with others of
    them, each epoch with other ones (with the same ones again where there are fewer than a batch).

    Args:
        shapes: `[n]` a number for each example's shape.
        batch: examples of a global batch; `at` takes positions counted in these.
        examples: `[n]` what to hand out for each; None is its own number.
    """

    def __init__(self, shapes: Sequence[int] | NDArray, batch: int, examples: NDArray[np.int64] | None = None) -> None:
        self.batch = batch
        numbers = np.asarray(shapes)
        self._members = [np.flatnonzero(numbers == shape) for shape in np.unique(numbers)]
        self._batches = np.cumsum([-(-len(members) // batch) for members in self._members])
        self._examples = examples

    @property
    def batches(self) -> int:
        """Global batches in an epoch."""
        return int(self._batches[-1])

    def at(self, positions: range, seed: int, stage: str) -> tuple[int, ...]:
        result: list[NDArray[np.int64]] = []
        at = positions.start
        while at < positions.stop:
            number, inside = divmod(at, self.batch)
            stop = min(self.batch, inside + positions.stop - at)
            result.append(self._rows(number, np.arange(inside, stop), seed, stage))
            at += stop - inside
        found = np.concatenate(result) if result else np.empty(0, dtype=np.int64)
        if self._examples is not None:
            found = self._examples[found]
        return tuple(int(i) for i in found)

    def _rows(self, number: int, rows: NDArray[np.int64], seed: int, stage: str) -> NDArray[np.int64]:
        """These rows of global batch `number`."""
        epoch, number = divmod(number, self.batches)
        number = _one(number, self.batches, seed, stage, "batches", epoch)
        shape = int(np.searchsorted(self._batches, number, side="right"))
        members = self._members[shape]
        first = number - (int(self._batches[shape - 1]) if shape else 0)
        # Past the last one the same permutation begins again: none stands twice in a batch that they can fill.
        slots = (first * self.batch + rows) % len(members)
        return members[permute(slots, len(members), seed, stage, "shape", shape, epoch)]


class WindowedByShape:
    """Whole global batches of one shape each, of examples that lie in groups: each batch lies within one window.

    Which groups make a window is drawn once for a run, so that every epoch has as many batches as any other; the order
    of the windows, and of the batches in them, is another each epoch. An epoch shows every example. Where those of one
    shape in a window do not fill its last batch there, it is filled as `ByShape` does it, with others of that window:
    the more shapes and the smaller the windows, the more often this happens.

    Args:
        groups: number of examples in each group; their numbers follow each other.
        window: groups of a window.
        shapes: `[n]` a number for each example's shape.
        batch: examples of a global batch; `at` takes positions counted in these.
    """

    def __init__(self, groups: Sequence[int], window: int, shapes: Sequence[int] | NDArray, batch: int) -> None:
        self.groups, self.window, self.batch = tuple(groups), window, batch
        self._shapes = np.asarray(shapes)
        self._starts = np.concatenate([[0], np.cumsum(self.groups)]).astype(np.int64)

    def at(self, positions: range, seed: int, stage: str) -> tuple[int, ...]:
        result: list[int] = []
        at = positions.start
        while at < positions.stop:
            window, first, left = self._find(at, seed, stage)
            stop = min(first + left, first + positions.stop - at)
            _, orders = _shaped_windows(self, seed, stage)
            result += orders[window].at(range(first, stop), seed, f"{stage}/window {window}")
            at += stop - first
        return tuple(result)

    def epoch(self, seed: int, stage: str) -> int:
        """Positions in an epoch."""
        return self.batch * sum(order.batches for order in _shaped_windows(self, seed, stage)[1])

    def window_at(self, position: int, seed: int, stage: str) -> tuple[tuple[int, ...], int]:
        """The groups of the window in which a position lies, and the first position behind it."""
        window, _, left = self._find(position, seed, stage)
        return _shaped_windows(self, seed, stage)[0][window], position + left

    def among(self, examples: Sequence[int]) -> WindowedByShape:
        """The order of these examples alone, ascending, which are numbered anew from 0."""
        groups = _counts(self._starts, examples)
        return WindowedByShape(groups, self.window, self._shapes[np.asarray(examples)], self.batch)

    def members(self, group: int) -> NDArray[np.int64]:
        """The numbers of a group's examples."""
        return np.arange(self._starts[group], self._starts[group + 1])

    def shapes(self, examples: NDArray[np.int64]) -> NDArray:
        return self._shapes[examples]

    def _find(self, position: int, seed: int, stage: str) -> tuple[int, int, int]:
        """Which window a position lies in, the position in that window's own sequence, and how many follow in it."""
        _, orders = _shaped_windows(self, seed, stage)
        number, inside = divmod(position, self.batch)
        epoch, number = divmod(number, sum(order.batches for order in orders))
        shuffled = permute(np.arange(len(orders)), len(orders), seed, stage, "windows", epoch)
        ends = np.cumsum([orders[window].batches for window in shuffled])
        turn = int(np.searchsorted(ends, number, side="right"))
        window = int(shuffled[turn])
        own = orders[window].batches
        before = number - (int(ends[turn]) - own)
        return window, (epoch * own + before) * self.batch + inside, (own - before) * self.batch - inside


@lru_cache(maxsize=_KEPT)
def _shaped_windows(order: WindowedByShape, seed: int, stage: str) -> tuple[list[tuple[int, ...]], list[ByShape]]:
    """The groups of each window of a run, and the order inside it."""
    full = np.flatnonzero(order.groups)
    shuffled = full[permute(np.arange(len(full)), len(full), seed, stage, "groups")]
    windows = [shuffled[at : at + order.window] for at in range(0, len(full), order.window)]
    examples = [np.concatenate([order.members(int(group)) for group in groups]) for groups in windows]
    orders = [ByShape(order.shapes(numbers), order.batch, numbers) for numbers in examples]
    return [tuple(int(group) for group in groups) for groups in windows], orders


@dataclass(frozen=True)
class ReadAhead:
    """An order in windows that says which groups come next.

    Args:
        order: the order.
        soon: is told, whenever examples are asked for, the groups of the window behind theirs. It returns at once.
    """

    order: Windowed | WindowedByShape
    soon: Callable[[Sequence[int]], None]

    def at(self, positions: range, seed: int, stage: str) -> tuple[int, ...]:
        if positions:
            _, behind = self.order.window_at(positions[-1], seed, stage)
            self.soon(self.order.window_at(behind, seed, stage)[0])
        return self.order.at(positions, seed, stage)

    def among(self, examples: Sequence[int]) -> ReadAhead:
        """The order of these examples alone, ascending, which are numbered anew from 0."""
        return replace(self, order=self.order.among(examples))


@dataclass(frozen=True)
class Interleaved:
    """Several orders at once, each with an exact share of every epoch; each goes on through epochs of its own.

    The parts take turns as evenly as whole numbers allow: of any stretch of the sequence each has its share, give or
    take fewer examples than there are parts.

    Args:
        orders: of the parts.
        counts: examples of each in an epoch, all at least 1.
        offsets: what is added to each part's numbers.
    """

    orders: tuple[Order, ...]
    counts: tuple[int, ...]
    offsets: tuple[int, ...]

    def at(self, positions: range, seed: int, stage: str) -> tuple[int, ...]:
        result = np.empty(len(positions), dtype=np.int64)
        here = np.arange(len(positions))  # where in the result
        left = np.arange(positions.start, positions.stop, dtype=np.int64)  # positions among the parts that are left
        total = sum(self.counts)
        for part, (order, count, offset) in enumerate(zip(self.orders, self.counts, self.offsets, strict=True)):
            before = left // total * count + left % total * count // total  # of this part, before each position
            after = (left + 1) // total * count + (left + 1) % total * count // total
            mine = after > before
            if mine.any():
                own = before[mine]
                name = f"{stage}/{part}" if part else stage
                numbers = np.array(order.at(range(int(own[0]), int(own[-1]) + 1), seed, name), dtype=np.int64)
                result[here[mine]] = numbers[own - own[0]] + offset
            here, left, total = here[~mine], (left - before)[~mine], total - count
        return tuple(int(i) for i in result)


def slots(counts: Sequence[int], lengths: Sequence[int]) -> NDArray[np.int64]:
    """The numbers `[sum(counts)]` of one epoch of a mixture, in no order: of each part as many as `counts` says, its
    examples as often as each other, give or take one; numbers of the parts follow each other."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    parts = [start + np.arange(count) % n for start, count, n in zip(starts[:-1], counts, lengths, strict=True)]
    return np.concatenate(parts).astype(np.int64)
