"""Fit a sigma schedule to a model: for one sampler, number of steps and guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from latentgen.core.errors import UserError
from latentgen.diffusion.fitted import Fit, fit, reference
from latentgen.diffusion.guidance import parse, remembers
from latentgen.diffusion.samplers import find_sampler
from latentgen.formats.model import Model
from latentgen.pipelines.generate import Request, check, prepare
from latentgen.pipelines.guiding import split_prompt, weak_model

OF_STEPS: Mapping[str, str] = {
    "cfgpp": "its scale follows the steps",
    "zero_init": "it leaves out the first steps, however long",
}
"""Guidance that depends on the steps, other than by remembering them, and how."""


@torch.no_grad()
def fit_schedule(
    model: Model,
    requests: Sequence[Request],
    *,
    reference_steps: int = 100,
    rounds: int = 12,
    on_round: Callable[[int, float], object] | None = None,
) -> Fit:
    """The levels at which these requests' sampler and number of steps err least on these requests.

    Args:
        requests: equal but for words and seeds; drawn in one batch. 16 varied ones serve up to a dozen steps.
        reference_steps: Heun steps that stand for infinitely many.
        rounds, on_round: as in `diffusion.fitted.fit`.

    Raises:
        UserError: a request that the model cannot draw; a sampler that adds noise or chooses its own steps; guidance
            that depends on the steps taken; a number below 1.
    """
    for name, number in (("--reference-steps", reference_steps), ("--rounds", rounds)):
        if number < 1:
            raise UserError(f"{name} {number}: must be at least 1")
    for request in requests:
        check(request, model)
    first = requests[0]
    p, solver = model.parameterization(), find_sampler(first.sampler)
    if solver.noise:
        raise UserError(f"fit-schedule --sampler {first.sampler}: it adds noise; choose one without noise")
    if solver.own_steps:
        raise UserError(f"fit-schedule --sampler {first.sampler}: it chooses its steps itself; there is nothing to fit")
    for part in parse(first.guidance):
        reason = "it remembers earlier steps" if remembers(part) else OF_STEPS.get(part.name)
        if reason is not None:
            raise UserError(
                f"fit-schedule --guidance {part.name}: {reason}, so other steps aim at other pictures; fit without it"
            )
    if len({split_prompt(request.prompt, request.guidance)[1] for request in requests}) > 1:
        raise UserError("fit-schedule --guidance compose: give prompts that all have the same weights, one fit has one")
    denoise, x, sigmas, _ = prepare(model, requests, weak_model(first.guidance, model))
    x = x * (p.sigma_max / float(sigmas[0]))
    target = reference(denoise, x, p, reference_steps)
    return fit(denoise, x, first.num_inference_steps, p, solver=solver, target=target, rounds=rounds, on_round=on_round)
