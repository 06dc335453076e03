"""How much memory a computation would take on a GPU, told without one: it runs on the meta device, where tensors have
shapes but no numbers, and every storage that comes and goes is counted.

What kernels use inside, and what the allocator cannot use again, is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary


class Allocated(TorchDispatchMode):
    """Counts the storages that come to be inside of it, in bytes.

    Attributes:
        alive: of those that are still there.
        history: how much that was after each that came.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0
        self.history: list[int] = []
        self._known: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._known.setdefault(tensor.untyped_storage(), None)  # it was there before, or is counted
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage not in self._known:
                self._known[storage] = len(self.history)
                self.alive += storage.nbytes()
                self.history.append(self.alive)
                weakref.finalize(storage, self._free, storage.nbytes())
        return out

    def _free(self, count: int) -> None:
        self.alive -= count

    def beside(self, tensors: Iterable[Tensor]) -> list[int]:
        """`history` less these, each from the moment on at which it was there and the next came: as if it had been
        added at once to one that was there before."""
        sizes = [0] * (len(self.history) + 1)
        for storage in {id(s): s for s in (tensor.untyped_storage() for tensor in tensors)}.values():
            sizes[self._known[storage] + 1] += storage.nbytes()
        return [alive - gone for alive, gone in zip(self.history, accumulate(sizes[:-1]), strict=True)]

    @property
    def peak(self) -> int:
        """The most that were there at a time."""
        return max(self.history, default=0)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Growth:
    """The most bytes at a time, by the number of examples: exactly, for any number.

    Args:
        lines: (bytes, bytes of each example) at the times when there may be most.
    """

    lines: tuple[tuple[int, int], ...]

    def __call__(self, examples: int) -> int:
        return max((fixed + examples * each for fixed, each in self.lines), default=0)


def growth(few: Sequence[int], more: Sequence[int]) -> Growth:
    """From the histories of two runs with as many examples as `PROBES` says.

    Both did the same things in the same order: at each time what is there is linear in the number of examples.
    """
    assert len(few) == len(more), "another number of examples is computed in another way"
    step = PROBES[1] - PROBES[0]
    slopes = [(b - a) // step for a, b in zip(few, more, strict=True)]
    best: dict[int, int] = {}
    for value, each in zip(few, slopes, strict=True):
        fixed = value - PROBES[0] * each
        best[each] = max(best.get(each, fixed), fixed)
    lines: list[tuple[int, int]] = []
    for each in sorted(best, reverse=True):  # one that grows less counts only where it begins higher
        if not lines or best[each] > lines[-1][0]:
            lines.append((best[each], each))
    return Growth(tuple(lines))


PROBES = (2, 3)
"""Examples of the two runs; a single one may be laid out in another way."""


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of what these tensors keep, shared memory once."""
    return sum({id(s): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())


LOWER = {
    functional.linear, torch.conv1d, torch.conv2d, torch.conv3d, torch.matmul, Tensor.matmul, Tensor.__matmul__,
    torch.bmm, Tensor.bmm, torch.mm, Tensor.mm, torch.addmm, torch.baddbmm, functional.scaled_dot_product_attention,
}  # fmt: skip
WIDER = {
    functional.group_norm, functional.layer_norm, functional.softmax, torch.softmax, Tensor.softmax,
    functional.mse_loss, torch.exp, Tensor.exp, torch.pow, Tensor.pow, torch.norm, Tensor.norm, torch.rsqrt,
    Tensor.rsqrt, torch.sum, Tensor.sum,
}  # fmt: skip
"""What CUDA's autocast computes in the lower precision, and what in float32 (docs.pytorch.org/docs/stable/amp.html,
"CUDA Op-Specific Behavior"), as far as the networks here call it."""


class LikeCuda(TorchFunctionMode):
    """Within it tensors on the meta device are of the types that they would have on CUDA, and attention is one kernel.

    That kernel keeps the inputs, the output and a number for each query, as flash attention (arXiv 2205.14135) and
    CUDA's memory-efficient one do.

    Args:
        dtype: of autocast; None is without.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype = dtype
        self._copies: dict[int, Tensor] = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._copies.clear()
        super().__exit__(kind, error, trace)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.dtype is not None and (func in LOWER or func in WIDER):
            dtype = self.dtype if func in LOWER else torch.float32
            args, kwargs = tree_map(lambda value: self._cast(value, dtype), (args, kwargs))
        if func is functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self._copies:  # autocast keeps the copies of weights that are trained to the end
            self._copies[id(value)] = value.to(dtype)
        return self._copies[id(value)]


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Tensor:
    del rest, named  # a mask, where there is one, is as small as the text
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]


def autocast(call: Callable[..., Any], dtype: torch.dtype | None) -> Callable[..., Any]:
    """`call` as accelerate's mixed precision runs a network: computed in `dtype`, its outputs in float32."""

    def run(*args: Any, **named: Any) -> Any:
        with LikeCuda(dtype):
            out = call(*args, **named)
        return out if dtype is None else tree_map(_wide, out)

    return run


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
