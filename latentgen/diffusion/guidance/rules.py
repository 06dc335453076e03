"""Rules: how the prediction with the prompt and the one without it become one. Exactly one rule is at work.

x0_hat, eps and v depend on one another linearly at a given x, so guiding x0_hat is guiding them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.diffusion.guidance.driver import Needs, State
from latentgen.diffusion.parameterization import per_example


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance: uncond + scale * (cond - uncond) (arXiv 2207.12598, eq. 6, where scale = 1 + w).

    scale = 1 is the conditional prediction and costs one evaluation; anything else costs two.
    """

    scale: float = 7.5

    def __post_init__(self) -> None:
        _check_scale(self.scale)

    def needs(self, sigma: Tensor, state: State) -> Needs:
        del state
        return _cond(sigma) if self.scale == 1 else _both(sigma)

    def combine(self, predictions: dict[str, Tensor], x: Tensor, sigma: Tensor, state: State) -> Tensor:
        del x, sigma, state
        cond = predictions["cond"]
        if "uncond" not in predictions:
            return cond
        uncond = predictions["uncond"]
        return uncond + self.scale * (cond - uncond)


@dataclass(frozen=True)
class APG:
    """Adaptive projected guidance (arXiv 2410.02416): strong guidance without its burnt colours.

        d = cond - uncond + momentum * (this d, a step ago)            "reverse momentum" when negative
        d = d * min(1, norm_threshold / |d|)                           "rescaling"; L2 over the picture, 0: no limit
        d = its part orthogonal to cond + eta * its part along cond    "projection": the part along saturates colours
        x0_hat = cond + (scale - 1) * d

    eta = 1, momentum = 0 and no limit is CFG.
    """

    scale: float = 7.5
    eta: float = 0.0
    momentum: float = -0.5
    norm_threshold: float = 0.0

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        if not -1 < self.momentum < 1:
            raise UserError(f"guidance apg: momentum={self.momentum}: choose it between -1 and 1 (-0.5 is usual).")
        if not self.norm_threshold >= 0:
            raise UserError(
                f"guidance apg: norm_threshold={self.norm_threshold}: it must not be negative (0: no limit)."
            )
        if not math.isfinite(self.eta):
            raise UserError(
                f"guidance apg: eta={self.eta}: it must be a finite number (0 is usual, 1 projects nothing)."
            )

    def needs(self, sigma: Tensor, state: State) -> Needs:
        del state
        return _cond(sigma) if self.scale == 1 else _both(sigma)

    def combine(self, predictions: dict[str, Tensor], x: Tensor, sigma: Tensor, state: State) -> Tensor:
        del sigma
        if "uncond" not in predictions:
            return predictions["cond"]
        cond = _wide(predictions["cond"])
        difference = cond - _wide(predictions["uncond"])
        if self.momentum != 0:
            if "momentum" in state:
                difference = difference + self.momentum * state["momentum"]
            state["momentum"] = difference
        if self.norm_threshold > 0:
            norm = dot(difference, difference).sqrt()
            # min(1, r / norm), written so that a norm of 0 divides nothing
            difference = difference * per_example(self.norm_threshold / norm.clamp(min=self.norm_threshold), x)
        along = _ratio(dot(difference, cond), dot(cond, cond))
        parallel = per_example(along, x) * cond
        kept = difference - (1 - self.eta) * parallel  # the orthogonal part + eta * the parallel one
        return (cond + (self.scale - 1) * kept).to(x.dtype)


@dataclass(frozen=True)
class CFGPP:
    """CFG++ (arXiv 2406.08070, algorithm 2): the guided picture, but the unconditional noise; scale between 0 and 1.

    From sigma to s its DDIM step, in these coordinates, is

        x_next = uncond + scale * (cond - uncond) + s * (x - uncond) / sigma

    An Euler step goes to (1 - s / sigma) * x0_hat + (s / sigma) * x. Both land on the same point when

        x0_hat = uncond + scale * sigma / (sigma - s) * (cond - uncond)

    so CFG++ is CFG whose scale follows the steps, for samplers whose step is Euler's: `euler` and `ddim` without added
    noise. `levels` are the noise levels that the sampler visits, n + 1 with the last.
    """

    scale: float
    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.scale <= 1:
            raise UserError(f"guidance cfgpp: --guidance-scale {self.scale:g}: CFG++ takes 0 to 1 (0.6 is usual).")

    def needs(self, sigma: Tensor, state: State) -> Needs:
        del state
        return _both(sigma)

    def combine(self, predictions: dict[str, Tensor], x: Tensor, sigma: Tensor, state: State) -> Tensor:
        del state
        cond = predictions["cond"]
        if "uncond" not in predictions:
            return cond
        uncond = predictions["uncond"]
        scales = torch.tensor([self._scale_at(level) for level in sigma.tolist()], dtype=torch.float64)
        scales = scales.to(device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        return (uncond + per_example(scales, x) * (cond - uncond)).to(x.dtype)

    def _scale_at(self, sigma: float) -> float:
        if sigma not in self.levels[:-1]:
            raise UserError(
                f"guidance cfgpp: noise level {sigma:g} is none of the schedule's: it needs steps from one level to "
                "the next without added noise, as euler and ddim take them."
            )
        following = self.levels[self.levels.index(sigma) + 1]
        return self.scale * sigma / (sigma - following)


@dataclass(frozen=True)
class CFGZero:
    """CFG-Zero* (arXiv 2503.18886, "optimized scale"): the unconditional velocity is first scaled to fit the other.

        v = s * v_uncond + scale * (v_cond - s * v_uncond),   s = <v_cond, v_uncond> / <v_uncond, v_uncond>

    s is the best multiple for each picture. v is the velocity of the flow path, whatever the network predicts:
    v = (x - (1 + sigma) * x0_hat) / sigma. The paper's other half, a frozen start, is `ZeroInit`.
    """

    scale: float = 7.5

    def __post_init__(self) -> None:
        _check_scale(self.scale)

    def needs(self, sigma: Tensor, state: State) -> Needs:
        del state
        return _cond(sigma) if self.scale == 1 else _both(sigma)

    def combine(self, predictions: dict[str, Tensor], x: Tensor, sigma: Tensor, state: State) -> Tensor:
        del state
        if "uncond" not in predictions:
            return predictions["cond"]
        level, wide = per_example(_wide(sigma), x), _wide(x)
        v_cond = (wide - (1 + level) * _wide(predictions["cond"])) / level
        v_uncond = (wide - (1 + level) * _wide(predictions["uncond"])) / level
        fitted = per_example(_ratio(dot(v_cond, v_uncond), dot(v_uncond, v_uncond)), x) * v_uncond
        v = fitted + self.scale * (v_cond - fitted)
        return ((wide - level * v) / (1 + level)).to(x.dtype)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The scalar product of each picture's values. [b, c, h, w] twice -> [b], at least float32."""
    return (_wide(a) * _wide(b)).flatten(1).sum(dim=1)


def _ratio(over: Tensor, under: Tensor) -> Tensor:
    """over / under where under > 0, else 0: a prediction of nothing has no direction."""
    return torch.where(under > 0, over / torch.where(under > 0, under, 1), 0)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _cond(sigma: Tensor) -> Needs:
    return {"cond": torch.ones_like(sigma, dtype=torch.bool)}


def _both(sigma: Tensor) -> Needs:
    everyone = torch.ones_like(sigma, dtype=torch.bool)
    return {"cond": everyone, "uncond": everyone}


def _check_scale(scale: float) -> None:
    if not math.isfinite(scale):
        raise UserError(f"guidance scale {scale}: it must be a finite number (1 is no guidance).")
