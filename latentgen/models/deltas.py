"""The change that an adapter makes to one weight: LoRA, LoKr and LoHa, each with or without DoRA's magnitude.

The weight is that of a linear layer [o, i] or a convolution [o, i, kh, kw]. With scale s = alpha / rank:

* LoRA (arXiv 2106.09685): s up down; a convolution may put a third factor between (Tucker, "mid")
* LoHa (arXiv 2108.06098): s (w1_a w1_b) * (w2_a w2_b), the product of two low-rank matrices element by element
* LoKr (arXiv 2309.14859): s w1 (x) w2, a Kronecker product; each of the two may itself be low-rank
* DoRA (arXiv 2402.09353): with any of these as D, the weight becomes m (W + D) / |W + D|
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from latentgen.core.errors import UserError

TENSORS: Mapping[str, tuple[str, ...]] = {
    "lora": ("down", "up", "mid"),
    "lokr": ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"),
    "loha": ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"),
}
"""Kinds of adapters, and the tensors that each may have."""


@dataclass(frozen=True, eq=False)
class Factors:
    """What is stored of the change to one weight.

    Attributes:
        kind: a key of TENSORS.
        tensors: named as in TENSORS. Shapes, for a weight [o, i, ...]: lora down [r, i, ...], up [o, r, (1, 1)], with
            mid [r, r, kh, kw] down is [r, i, (1, 1)]; loha w1_a [o, r], w1_b [r, i...], with t1 [r, r, kh, kw] w1_a is
            [r, o]; lokr w1 [o1, i1], w2 [o2, i2, ...] where o = o1 o2 and i = i1 i2, low-rank parts as in loha.
        alpha: no dimensions; None means a scale of 1.
        magnitude: of DoRA, one number for each output [o, 1, ...] or each input [1, i, ...]; None for no DoRA.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    alpha: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int | None:
        """The length of the inner dimension; None for a LoKr whose two factors are whole."""
        inner = {"lora": ("down",), "loha": ("w1_b",), "lokr": ("w2_b", "w1_b")}[self.kind]
        return next((self.tensors[name].shape[0] for name in inner if name in self.tensors), None)

    @property
    def scale(self) -> float:
        """alpha / rank, or 1 where one of them is not there."""
        return self.alpha.item() / self.rank if self.alpha is not None and self.rank is not None else 1.0

    @property
    def linear(self) -> bool:
        """Whether the change does not depend on the weight, so that changes add up."""
        return self.magnitude is None

    def named(self) -> dict[str, Tensor]:
        """Every tensor there is, "alpha" and "magnitude" among them."""
        more = {"alpha": self.alpha, "magnitude": self.magnitude}
        return {**self.tensors, **{name: value for name, value in more.items() if value is not None}}


def missing(kind: str, names: set[str]) -> str | None:
    """What tensor a set of factors lacks to be complete, or None."""
    if kind == "lokr":
        pairs = [(w, f"{w}_a", f"{w}_b") for w in ("w1", "w2")]
        return next((w for w, a, b in pairs if w not in names and not {a, b} <= names), None)
    needed = {"lora": ("down", "up"), "loha": ("w1_a", "w1_b", "w2_a", "w2_b")}[kind]
    return next((name for name in needed if name not in names), None)


def product(factors: Factors, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The factors multiplied out, without scale and magnitude: [o, ...], as many numbers as the weight has."""
    t = {name: value.to(device, dtype) for name, value in factors.tensors.items()}
    if factors.kind == "lora":
        up = t["up"].flatten(1)
        if "mid" in t:
            return torch.einsum("or,rs...,si->oi...", up, t["mid"], t["down"].flatten(1))
        return (up @ t["down"].flatten(1)).unflatten(1, t["down"].shape[1:])
    if factors.kind == "loha":
        return _low_rank(t, "w1", "t1") * _low_rank(t, "w2", "t2")
    w1 = t["w1"] if "w1" in t else t["w1_a"] @ t["w1_b"]
    w2 = t["w2"] if "w2" in t else _low_rank(t, "w2", "t2")
    return torch.kron(w1.reshape(*w1.shape, *[1] * (w2.dim() - 2)), w2.contiguous())


def without_mid(factors: Factors) -> Factors:
    """The same LoRA with the third factor multiplied into the first; others are returned as they are."""
    if "mid" not in factors.tensors:
        return factors
    t = factors.tensors
    down = torch.einsum("rs...,si->ri...", t["mid"].float(), t["down"].float().flatten(1)).to(t["down"].dtype)
    # The rank that alpha is divided by stays that of the factor below.
    assert t["mid"].shape[0] == t["mid"].shape[1]
    return Factors(factors.kind, {"down": down, "up": t["up"]}, factors.alpha, factors.magnitude)


def without_scale(factors: Factors) -> Factors:
    """The same change with a scale of 1 and no alpha."""
    plain = Factors(factors.kind, factors.tensors, None, factors.magnitude)
    return scaled(plain, factors.scale)


def scaled(factors: Factors, by: float) -> Factors:
    """`by` times the change (before DoRA's magnitude), multiplied into one of the factors."""
    if by == 1.0:
        return factors
    into = next(name for name in ("up", "w1", "w1_a") if name in factors.tensors)
    value = (factors.tensors[into].float() * by).to(factors.tensors[into].dtype)
    return Factors(factors.kind, {**factors.tensors, into: value}, factors.alpha, factors.magnitude)


def _low_rank(t: Mapping[str, Tensor], name: str, core: str) -> Tensor:
    a, b = t[f"{name}_a"], t[f"{name}_b"]
    return torch.einsum("rs...,ro,si->oi...", t[core], a, b) if core in t else a @ b


def fits(factors: Factors, shape: torch.Size) -> bool:
    """Whether the factors make a change of a weight of this shape; nothing is computed."""
    try:
        made = product(factors, "meta").shape
    except (RuntimeError, IndexError):
        return False
    if made.numel() != shape.numel() or made[0] != shape[0]:
        return False
    return factors.magnitude is None or _axis(factors.magnitude, shape) is not None


def delta(factors: Factors, weight: Tensor) -> Tensor:
    """The change of `weight` [o, i, ...], in float32 (float64 for a weight of that type) and on its device.

    Raises:
        UserError: the factors do not fit the weight.
    """
    if not fits(factors, weight.shape):
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in factors.named().items())
        raise UserError(f"{factors.kind} factors ({shapes}) do not fit a weight {list(weight.shape)}")
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    change = factors.scale * product(factors, weight.device, dtype).reshape(weight.shape)
    if factors.magnitude is None:
        return change
    base = weight.to(dtype)
    tuned = base + change
    axis = _axis(factors.magnitude, weight.shape)
    norm = torch.linalg.vector_norm(tuned, dim=[d for d in range(weight.dim()) if d != axis], keepdim=True)
    norm = torch.where(norm == 0, 1.0, norm)  # a row of zeros stays one
    magnitude = factors.magnitude.to(weight.device, dtype).reshape(norm.shape)
    return tuned * (magnitude / norm) - base


def _axis(magnitude: Tensor, shape: torch.Size) -> int | None:
    """The dimension of the weight that has one magnitude for each index."""
    if magnitude.shape[:1] == shape[:1] and magnitude.numel() == shape[0]:
        return 0
    if magnitude.dim() >= 2 and magnitude.shape[0] == 1 and magnitude.numel() == magnitude.shape[1] == shape[1]:
        return 1
    return None
