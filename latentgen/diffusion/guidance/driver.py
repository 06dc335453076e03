"""Who needs which prediction, all of them in one forward pass, and a denoiser in the end.

A guidance says for every picture which predictions it needs at its noise level and combines them. `bind` turns it and a
function that makes predictions into a denoiser, so samplers never know about it. Kinds of prediction:

    cond    with the prompt
    uncond  without it (or with the negative prompt)
    weak    with the prompt, from a worse network
    cond2, cond3, ...  with the further prompts of a composition
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.diffusion.parameterization import Denoiser

Needs = dict[str, Tensor]
"""{kind: bool [b]}: the pictures of a batch that need this kind of prediction; each costs one network evaluation."""

State = dict[str, Tensor]
"""What a guidance remembers from one evaluation to the next, one row a picture. Empty when sampling begins."""

Predict = Callable[[Mapping[str, Tensor], Tensor, Tensor], dict[str, Tensor]]
"""predict({kind: pictures [k], ascending}, x: [b, c, h, w], sigma: [b]) -> {kind: x0_hat [k, c, h, w]}."""


class Guidance(Protocol):
    """A rule that combines predictions. A frozen description: what changes while sampling lies in `state`.

    A picture's result must depend on its own rows alone.
    """

    def needs(self, sigma: Tensor, state: State) -> Needs:
        """The predictions to make at the noise levels sigma [b], on the device of sigma."""
        ...

    def combine(self, predictions: dict[str, Tensor], x: Tensor, sigma: Tensor, state: State) -> Tensor:
        """x0_hat [b, c, h, w] from the predictions [b, c, h, w], given x [b, c, h, w] and sigma [b].

        Holds the kinds that some picture of the batch needs. For a picture that does not need a kind, its `cond` stands
        there: the difference, which is what guidance amplifies, is then exactly 0.
        """
        ...


def bind(guidance: Guidance, predict: Predict) -> Denoiser:
    """A denoiser for ONE sampling call: it makes only the predictions that a picture needs at its noise level.

    Raises UserError from the denoiser where a guidance that remembers meets another number of pictures than before, as
    in samplers that work on many steps at once.
    """
    state: State = {}

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        for name, kept in state.items():
            if len(kept) != len(x):
                raise UserError(
                    f"guidance remembers {name!r} of {len(kept)} pictures and got {len(x)}: adaptive guidance and apg "
                    "with momentum need a sampler that goes through the noise levels one after the other."
                )
        needed = {kind: mask for kind, mask in guidance.needs(sigma.cpu(), state).items() if mask.any()}
        rows = {kind: mask.nonzero().squeeze(1).to(x.device) for kind, mask in needed.items()}
        made = predict(rows, x, sigma) if rows else {}
        whole = _spread(made.pop("cond"), rows["cond"], x) if "cond" in made else x
        predictions = {} if not rows else {"cond": whole}
        for kind, prediction in made.items():
            predictions[kind] = _spread(prediction, rows[kind], whole)
        return guidance.combine(predictions, x, sigma, state)

    return denoise


def _spread(made: Tensor, rows: Tensor, rest: Tensor) -> Tensor:
    """The rows that were made at their places in the batch, and `rest` at the others."""
    return made if len(rows) == len(rest) else rest.index_copy(0, rows, made)


def batched(denoise_rows: Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]) -> Predict:
    """Make all kinds of prediction in ONE forward pass.

    denoise_rows(x: [k, c, h, w], sigma: [k], {kind: pictures}) -> x0_hat [k, c, h, w] sees one block a kind, in the
    order of the mapping: the pictures of the batch named there. It gives each row its own conditioning.
    """

    def predict(rows: Mapping[str, Tensor], x: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        x_rows = torch.cat([pick(x, at) for at in rows.values()])
        sigma_rows = torch.cat([pick(sigma, at) for at in rows.values()])
        x0_hat = denoise_rows(x_rows, sigma_rows, rows)
        return dict(zip(rows, x0_hat.split([len(at) for at in rows.values()]), strict=True))

    return predict


def pick(values: Tensor, rows: Tensor) -> Tensor:
    """values[rows] for ascending rows; without a copy where these are all."""
    return values if len(rows) == len(values) else values[rows]
