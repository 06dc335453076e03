"""Wrappers: guidance round another guidance. They change when it works, what it is fed, or what comes out.

`stack.py` says in which order they lie round the rule, innermost first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.diffusion.guidance.driver import Guidance, Needs, State
from latentgen.diffusion.guidance.rules import dot
from latentgen.diffusion.parameterization import per_example


@dataclass(frozen=True)
class Autoguidance:
    """A worse network guides in the unconditional one's place (arXiv 2406.02507): cond and weak, same prompt.

    `model` is the folder of the worse network: of fewer weights, of fewer steps, or averaged over another length. Who
    binds the predictions opens it.
    """

    inner: Guidance
    model: str = ""

    def __post_init__(self) -> None:
        if not self.model:
            raise UserError("guidance autoguidance: name the folder of a worse model: autoguidance,model=FOLDER")

    def needs(self, sigma: Tensor, state: State) -> Needs:
        return {"weak" if kind == "uncond" else kind: mask for kind, mask in self.inner.needs(sigma, state).items()}

    def combine(self, predictions: dict[str, Tensor], x: Tensor, sigma: Tensor, state: State) -> Tensor:
        renamed = {"uncond" if kind == "weak" else kind: made for kind, made in predictions.items()}
        return self.inner.combine(renamed, x, sigma, state)


@dataclass(frozen=True)
class PAG:
    """Perturbed-attention guidance (arXiv 2403.17377): also away from a network that cannot see structure.

    Adds scale * (cond - weak), where in `weak` the self-attention of the chosen layers is the identity. `layers` names
    them: mid, down, up or the beginnings of module names, joined by +. Who binds the predictions perturbs them.
    """

    inner: Guidance
    scale: float = 3.0
    layers: str = "mid"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise UserError(f"guidance pag: scale={self.scale}: it must not be negative, nor infinite (3 is usual).")

    def needs(self, sigma: Tensor, state: State) -> Needs:
        needs = self.inner.needs(sigma, state)
        return needs if self.scale == 0 else {**needs, "weak": torch.ones_like(sigma, dtype=torch.bool)}

    def combine(self, predictions: dict[str, Tensor], x: Tensor, sigma: Tensor, state: State) -> Tensor:
        others = {kind: made for kind, made in predictions.items() if kind != "weak"}
        guided = self.inner.combine(others, x, sigma, state)
        if "weak" not in predictions:
            return guided
        return guided + self.scale * (predictions["cond"] - predictions["weak"])


@dataclass(frozen=True)
class Interval:
    """Guidance in an interval of noise levels, low < sigma <= high, and none elsewhere (arXiv 2404.07724).

    Above it guidance takes variety away, below it does nothing: there only the conditional prediction is made.
    """

    inner: Guidance
    low: float = 0.28
    high: float = 5.42

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise UserError(
                f"guidance interval: low={self.low:g} high={self.high:g}: choose noise levels 0 <= low < high."
            )

    def needs(self, sigma: Tensor, state: State) -> Needs:
        inside = self._inside(sigma)
        needs = self.inner.needs(sigma, state)
        return {kind: mask if kind == "cond" else mask & inside for kind, mask in needs.items()}

    def combine(self, predictions: dict[str, Tensor], x: Tensor, sigma: Tensor, state: State) -> Tensor:
        if set(predictions) == {"cond"}:
            return predictions["cond"]
        guided = self.inner.combine(predictions, x, sigma, state)
        return torch.where(per_example(self._inside(sigma), x), guided, predictions["cond"])

    def _inside(self, sigma: Tensor) -> Tensor:
        return (sigma > self.low) & (sigma <= self.high)


@dataclass(frozen=True)
class Adaptive:
    """No guidance any more once the predictions agree (arXiv 2312.12487): their cosine rose above `threshold`.

    Every picture decides for itself, from its own predictions and for good; the decision holds from its next
    evaluation on. The paper takes the cosine of eps. Here it is that of the velocity v, whatever the network predicts:
    eps would agree at the highest levels too, where it is all noise. At a given x, v is along
    x - (1 + sigma^2) * x0_hat.
    """

    inner: Guidance
    threshold: float = 0.991

    def __post_init__(self) -> None:
        if not -1 <= self.threshold <= 1:
            raise UserError(f"guidance adaptive: threshold={self.threshold:g}: a cosine, at most 1 (0.991 is usual).")

    def needs(self, sigma: Tensor, state: State) -> Needs:
        needs = self.inner.needs(sigma, state)
        if "agreed" not in state:
            return needs
        going_on = ~state["agreed"].to(sigma.device)
        return {kind: mask if kind == "cond" else mask & going_on for kind, mask in needs.items()}

    def combine(self, predictions: dict[str, Tensor], x: Tensor, sigma: Tensor, state: State) -> Tensor:
        others = [kind for kind in predictions if kind != "cond"]
        if not others:
            return predictions["cond"]
        needs = self.needs(sigma, state)
        guiding = torch.stack([needs[kind] for kind in others]).any(dim=0)
        guided = self.inner.combine(predictions, x, sigma, state)
        agree = guiding
        for kind in others:
            agree = agree & (self._cosine(predictions["cond"], predictions[kind], x, sigma) > self.threshold)
        state["agreed"] = state.get("agreed", torch.zeros_like(agree)) | agree
        return torch.where(per_example(guiding, x), guided, predictions["cond"])

    @staticmethod
    def _cosine(a: Tensor, b: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        factor = per_example(1 + sigma.to(wide) ** 2, x)
        v_a, v_b = x.to(wide) - factor * a.to(wide), x.to(wide) - factor * b.to(wide)
        return dot(v_a, v_b) / (dot(v_a, v_a).sqrt() * dot(v_b, v_b).sqrt())


@dataclass(frozen=True)
class Rescale:
    """The guided picture brought back towards the conditional one's contrast (arXiv 2305.08891, eq. 15 and 16).

        x0_hat = phi * guided * std(cond) / std(guided) + (1 - phi) * guided

    with the standard deviation over each picture. It is taken of x0_hat here, the picture whose contrast is at stake.
    """

    inner: Guidance
    phi: float = 0.7

    def __post_init__(self) -> None:
        if not 0 <= self.phi <= 1:
            raise UserError(f"guidance rescale: phi={self.phi:g}: choose it between 0 (nothing) and 1 (0.7 is usual).")

    def needs(self, sigma: Tensor, state: State) -> Needs:
        return self.inner.needs(sigma, state)

    def combine(self, predictions: dict[str, Tensor], x: Tensor, sigma: Tensor, state: State) -> Tensor:
        guided = self.inner.combine(predictions, x, sigma, state)
        if set(predictions) == {"cond"}:
            return guided
        spread, wanted = (made.float().flatten(1).std(dim=1) for made in (guided, predictions["cond"]))
        ratio = torch.where(spread > 0, wanted / torch.where(spread > 0, spread, 1), 1)
        # eq. 15 and 16 in one factor, which is exactly 1 where nothing was guided
        return (guided * per_example(1 + self.phi * (ratio - 1), x)).to(x.dtype)


@dataclass(frozen=True)
class Threshold:
    """Dynamic thresholding (arXiv 2205.11487, section 2.3): values are held where pictures can be.

    s is a percentile of |x0_hat| over the picture, at least `limit`; x0_hat is clamped to [-s, s] and times limit / s.
    For pixels `limit` is 1, the paper's. Latents have no such bound: there it is the size that clean latents seldom
    pass, 3 standard deviations for latents of unit variance.
    """

    inner: Guidance
    percentile: float = 0.995
    limit: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.percentile <= 1:
            raise UserError(
                f"guidance threshold: percentile={self.percentile:g}: choose it in (0, 1] (0.995 is usual)."
            )
        if not 0 < self.limit < math.inf:
            raise UserError(f"guidance threshold: limit={self.limit:g}: it must be above 0 (1 for pixels).")

    def needs(self, sigma: Tensor, state: State) -> Needs:
        return self.inner.needs(sigma, state)

    def combine(self, predictions: dict[str, Tensor], x: Tensor, sigma: Tensor, state: State) -> Tensor:
        guided = self.inner.combine(predictions, x, sigma, state)
        # one sort a picture: torch.quantile refuses more than 16 million values
        sizes = guided.float().abs().flatten(1).sort(dim=1).values
        place = self.percentile * (sizes.shape[1] - 1)
        low = math.floor(place)
        s = torch.lerp(sizes[:, low], sizes[:, math.ceil(place)], place - low).clamp(min=self.limit)
        s = per_example(s, x)
        return (torch.minimum(torch.maximum(guided, -s), s) * (self.limit / s)).to(x.dtype)


@dataclass(frozen=True)
class Compose:
    """Several prompts at once, each with its weight (arXiv 2206.01714, "and"); a negative weight is its "not".

        cond = uncond + sum of weights[i] * (cond_i - uncond)

    stands for the conditional prediction, so with one prompt of weight 1 it is the inner guidance itself. The weights
    are not brought to a sum: two prompts of weight 1 pull twice.
    """

    inner: Guidance
    weights: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if not self.weights or not all(map(math.isfinite, self.weights)):
            raise UserError(f"guidance compose: weights {self.weights}: give each prompt a finite number.")

    def needs(self, sigma: Tensor, state: State) -> Needs:
        needs = self.inner.needs(sigma, state)
        if self.weights == (1.0,):
            return needs
        return {**dict.fromkeys(self._kinds(), needs["cond"]), **needs, "uncond": needs["cond"]}

    def combine(self, predictions: dict[str, Tensor], x: Tensor, sigma: Tensor, state: State) -> Tensor:
        if self.weights == (1.0,):
            return self.inner.combine(predictions, x, sigma, state)
        uncond = predictions["uncond"]
        composed = uncond
        for weight, kind in zip(self.weights, self._kinds(), strict=True):
            composed = composed + weight * (predictions[kind] - uncond)
        kinds = self.inner.needs(sigma, state)
        merged = {"cond": composed, "uncond": uncond}
        return self.inner.combine({kind: merged[kind] for kind in kinds}, x, sigma, state)

    def _kinds(self) -> tuple[str, ...]:
        return ("cond", *(f"cond{number}" for number in range(2, len(self.weights) + 1)))


@dataclass(frozen=True)
class ZeroInit:
    """The first `steps` steps leave the picture as it is (arXiv 2503.18886, "zero-init"): no prediction is made.

    The velocity of the flow path is 0 there, which is x0_hat = x / (1 + sigma). For networks that predict the first
    steps worse than that, as in early training. `levels` are the noise levels that the sampler visits.
    """

    inner: Guidance
    levels: tuple[float, ...] = ()
    steps: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.steps < len(self.levels):
            raise UserError(f"guidance zero_init: steps={self.steps}: choose it from 0 to {len(self.levels) - 1}.")

    def needs(self, sigma: Tensor, state: State) -> Needs:
        return {kind: mask & ~self._frozen(sigma) for kind, mask in self.inner.needs(sigma, state).items()}

    def combine(self, predictions: dict[str, Tensor], x: Tensor, sigma: Tensor, state: State) -> Tensor:
        still = x / (1 + per_example(sigma, x)).to(x.dtype)
        if not predictions:
            return still
        guided = self.inner.combine(predictions, x, sigma, state)
        return torch.where(per_example(self._frozen(sigma), x), still, guided)

    def _frozen(self, sigma: Tensor) -> Tensor:
        return sigma >= self.levels[self.steps - 1] if self.steps else torch.zeros_like(sigma, dtype=torch.bool)
