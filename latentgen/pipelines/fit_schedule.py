"""Fit a sigma schedule to a model: for one sampler, number of steps and guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from latentgen.core.errors import UserError
from latentgen.diffusion.fitted import Fit, fit, reference
from latentgen.diffusion.samplers import find_sampler
from latentgen.formats.model_folder import Model
from latentgen.pipelines.generate import Request, check, prepare


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
        UserError: a request that the model cannot draw, or a sampler that adds noise.
    """
    for request in requests:
        check(request, model)
    p, solver = model.parameterization(), find_sampler(requests[0].sampler)
    denoise, x, sigmas, _ = prepare(model, requests)
    x = x * (p.sigma_max / float(sigmas[0]))
    try:
        solver(lambda x, sigma: x, x[:1, :1, :1, :1], torch.tensor([1.0, 0.5, 0.0]))
    except UserError as error:
        raise UserError(f"fit-schedule --sampler {requests[0].sampler}: choose one without noise ({error})") from None
    target = reference(denoise, x, p, reference_steps)
    steps = requests[0].num_inference_steps
    return fit(denoise, x, steps, p, solver=solver, target=target, rounds=rounds, on_round=on_round)
