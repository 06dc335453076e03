"""Guidance: how several predictions of the clean image become one.

A guidance says which predictions it needs at a noise level and combines them; `bind` turns it and a function that makes
predictions into a denoiser, so samplers never know about it. Kinds of prediction:

    cond    with the prompt
    uncond  without it (or with the negative prompt)
    weak    from a worse model
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.diffusion.parameterization import Denoiser

KINDS = ("cond", "uncond", "weak")

Predict = Callable[[tuple[str, ...], Tensor, Tensor], dict[str, Tensor]]
"""predict(kinds, x: [b, c, h, w], sigma: [b]) -> {kind: x0_hat [b, c, h, w]} for exactly these kinds."""


class Guidance(Protocol):
    """A rule that combines predictions."""

    def needs(self, sigma: float) -> tuple[str, ...]:
        """The kinds of prediction to make at this noise level; each costs a network evaluation."""
        ...

    def combine(self, predictions: dict[str, Tensor], x: Tensor, sigma: Tensor) -> Tensor:
        """x0_hat [b, c, h, w] from the predictions, given x [b, c, h, w] and sigma [b]."""
        ...


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance: uncond + scale * (cond - uncond) (arXiv 2207.12598, eq. 6, where scale = 1 + w).

    scale = 1 is the conditional prediction and costs one evaluation; anything else costs two. x0_hat, eps and v depend
    on one another linearly at a given x, so guiding x0_hat is guiding them.
    """

    scale: float = 7.5

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise UserError(f"guidance scale {self.scale}: it must be a finite number (1 is no guidance).")

    def needs(self, sigma: float) -> tuple[str, ...]:
        del sigma
        return ("cond",) if self.scale == 1 else ("cond", "uncond")

    def combine(self, predictions: dict[str, Tensor], x: Tensor, sigma: Tensor) -> Tensor:
        del x, sigma
        cond = predictions["cond"]
        if self.scale == 1:
            return cond
        uncond = predictions["uncond"]
        return uncond + self.scale * (cond - uncond)


def bind(guidance: Guidance, predict: Predict) -> Denoiser:
    """A denoiser that makes only the predictions the guidance needs at the present noise level.

    Where the examples of a batch are at different levels, every kind that any of them needs is made.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        needed = {kind for level in set(sigma.tolist()) for kind in guidance.needs(level)}
        assert {*needed} <= {*KINDS}, f"guidance needs {sorted(needed)}"
        kinds = tuple(kind for kind in KINDS if kind in needed)
        return guidance.combine(predict(kinds, x, sigma), x, sigma)

    return denoise


def batched(denoise_kinds: Callable[[Tensor, Tensor, tuple[str, ...]], Tensor]) -> Predict:
    """Make all kinds of prediction in ONE forward pass.

    denoise_kinds(x: [k*b, c, h, w], sigma: [k*b], kinds) -> x0_hat [k*b, c, h, w] sees x repeated once per kind, in the
    order of `kinds`, and gives each block its own conditioning.
    """

    def predict(kinds: tuple[str, ...], x: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        k = len(kinds)
        x0_hat = denoise_kinds(torch.cat([x] * k), torch.cat([sigma] * k), kinds)
        return dict(zip(kinds, x0_hat.chunk(k), strict=True))

    return predict


GUIDANCE: Mapping[str, Callable[..., Guidance]] = {
    "cfg": CFG,
}
