"""A sigma schedule fitted to the model at hand: where a few steps should go so that they err least.

The aim is that of Align Your Steps (arXiv 2404.14507), which bounds the error of a stochastic solver and descends on
the bound. For a deterministic solver the error itself is at hand: draw a few pictures with very many steps, then move
the levels of the short schedule until it arrives nearest to them. Errors that cancel along the way are put to use.

It is a problem of least squares in n - 1 numbers, the logarithms of the steps in log(sigma), solved by the method of
Levenberg and Marquardt with differences for derivatives: n - 1 runs of the short schedule for each improvement.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.diffusion.parameterization import Denoiser, Parameterization
from latentgen.diffusion.samplers import Sampler, dpmpp_2m, heun
from latentgen.diffusion.schedules import SCHEDULES, exponential

DIFFERENCE = 0.1
"""Relative change of a step for the derivative by it: wide enough to see past the roughness of a network."""
BLENDED = 4
"""Registered schedules whose means, two by two, are further starts."""
TINY = 1e-30
LONGEST_MOVE = 1.0
"""A step may grow or shrink by the factor e in one improvement."""


class Fit(NamedTuple):
    """A fitted schedule, and what it was worth on the pictures it was fitted to.

    sigmas: [n + 1], float32, descending, first sigma_max, last 0.
    error: distance of a typical picture from the reference, as `error_of` measures it, on pictures not fitted to.
    start: the best of the registered schedules; start_error: that one's error.
    """

    sigmas: Tensor
    error: float
    start: str
    start_error: float


def reference(denoise: Denoiser, x: Tensor, parameterization: Parameterization, steps: int = 200) -> Tensor:
    """The end of the probability flow from x at sigma_max: Heun's steps even in log(sigma), the last from sigma_min."""
    return heun(denoise, x, exponential(steps, parameterization))


def fit(
    denoise: Denoiser,
    x: Tensor,
    n: int,
    parameterization: Parameterization,
    *,
    solver: Sampler = dpmpp_2m,
    target: Tensor | None = None,
    rounds: int = 12,
    starts: int = 2,
    on_round: Callable[[int, float], object] | None = None,
) -> Fit:
    """Find the n levels from which `solver` draws the pictures of x most nearly as infinitely many steps would.

    Args:
        denoise: with the guidance that will be used; guidance changes the best schedule.
        x: [b, c, h, w] at sigma_max, as for a sampler: b pictures, half to fit to and half to judge by. Sixteen are
            enough for a smooth denoiser; a small network under strong guidance wants a hundred.
        n: steps, at least 1 (with 1 there is nothing to choose).
        parameterization: gives sigma_max and sigma_min, which no level leaves.
        solver: a deterministic sampler.
        target: where x should arrive [b, c, h, w]; None asks `reference`.
        rounds: improvements at most; ends sooner where one gains less than half a percent.
        starts: from how many schedules to descend: the best of the registered ones and of means of two of them.
        on_round: called with the number of the round and the error so far.

    Raises:
        UserError: numbers below 1, or no registered schedule serves n steps.
    """
    if n < 1 or rounds < 1 or starts < 1:
        raise UserError(f"fitting {n} steps in {rounds} rounds from {starts} starts: each must be at least 1.")
    with torch.no_grad():
        end = reference(denoise, x, parameterization) if target is None else target

        def residual(sigmas: Tensor, pictures: int | None = None) -> Tensor:
            return (solver(denoise, x[:pictures], sigmas) - end[:pictures]).double().flatten(1)

        found = sorted(
            ((error_of(residual(sigmas)), name, sigmas) for name, sigmas in _candidates(n, parameterization)),
            key=lambda candidate: candidate[0],
        )
        if not found:
            raise UserError(f"no schedule to start from for {n} steps: choose fewer.")
        start_error, start, start_sigmas = found[0]
        if n == 1:
            return Fit(start_sigmas, start_error, start, start_error)
        among = [(error, sigmas) for error, _, sigmas in found]
        for (_, one), (_, other) in combinations(among[:BLENDED], 2):
            mean = torch.cat([(one[:-1] * other[:-1]).sqrt(), one[-1:]])
            among.append((error_of(residual(mean)), mean))
        among.sort(key=lambda candidate: candidate[0])
        fits = [_descend(residual, sigmas, parameterization, rounds, on_round) for _, sigmas in among[:starts]]
        start_error = error_of(_unseen(residual(start_sigmas)))
        sigmas, error = min([*fits, (start_sigmas, start_error)], key=lambda result: result[1])
    return Fit(sigmas, error, start, start_error)


def error_of(residual: Tensor) -> float:
    """Geometric mean over pictures of the root mean square of residuals [b, d]: the error of a typical picture.

    Between two things that a prompt can mean the flow divides. The few pictures that start at such a divide may end in
    either with any short schedule, and would outweigh all others in a plain mean.
    """
    return float(errors_of(residual).log().mean().exp())


def errors_of(residual: Tensor) -> Tensor:
    """Root mean square of the residuals [b, d] of each picture. [b]."""
    return residual.square().mean(dim=1).clamp(min=TINY).sqrt()


def _candidates(n: int, parameterization: Parameterization) -> list[tuple[str, Tensor]]:
    """What every registered schedule proposes for n steps, where it can, moved to start at sigma_max."""
    found = []
    for name, schedule in SCHEDULES.items():
        try:
            sigmas = schedule(n, parameterization)
        except UserError:  # it needs a table of times, or has fewer of them than n
            continue
        sigmas = sigmas.double()
        if n > 1 and not sigmas[1] < parameterization.sigma_max:
            continue
        sigmas[0] = parameterization.sigma_max
        found.append((name, sigmas.float()))
    return found


def _descend(
    residual: Callable[..., Tensor],
    sigmas: Tensor,
    parameterization: Parameterization,
    rounds: int,
    on_round: Callable[[int, float], object] | None,
) -> tuple[Tensor, float]:
    """Levenberg and Marquardt's descent on the first half of the pictures; of the schedules on its way, the one that is
    best on the other half, and its error there. A network is rough: what helps a few pictures may help no other."""
    steps = _steps(sigmas, parameterization)
    everything = residual(_sigmas(steps, parameterization))
    r, damping = _seen(everything), 0.1
    error = error_of(r)
    best, best_error = steps, error_of(_unseen(everything))
    for number in range(rounds):
        before = error
        moved = [residual(_sigmas(each, parameterization), len(r)) for each in _each_moved(steps)]
        jacobian = (torch.stack(moved, dim=-1) - r[..., None]) / DIFFERENCE  # [b / 2, d, n - 1]
        weight = 1 / r.square().mean(dim=1).clamp(min=TINY)  # the derivative of log(square): relative errors count
        normal = torch.einsum("bdi,b,bdj->ij", jacobian, weight, jacobian)
        gradient = torch.einsum("bdi,b,bd->i", jacobian, weight, r)
        for _ in range(6):
            damped = normal + damping * normal.diagonal().clamp(min=1e-12 * float(normal.diagonal().max())).diag()
            move = -torch.linalg.lstsq(damped.cpu(), gradient.cpu()[:, None]).solution[:, 0]
            move *= min(1.0, LONGEST_MOVE / max(float(move.abs().max()), 1e-12))
            tried = steps + move
            everything = residual(_sigmas(tried, parameterization))
            if error_of(_seen(everything)) < error:
                steps, r, error, damping = tried, _seen(everything), error_of(_seen(everything)), damping / 5
                if error_of(_unseen(everything)) < best_error:
                    best, best_error = steps, error_of(_unseen(everything))
                break
            damping *= 5
        if on_round is not None:
            on_round(number, best_error)
        if error > 0.995 * before:
            break
    return _sigmas(best, parameterization), best_error


def _seen(residual: Tensor) -> Tensor:
    """The pictures that are fitted to: the first half, or the only one."""
    return residual[: (len(residual) + 1) // 2]


def _unseen(residual: Tensor) -> Tensor:
    """The pictures that the fit is judged by."""
    return residual[(len(residual) + 1) // 2 :] if len(residual) > 1 else residual


def _each_moved(steps: Tensor) -> list[Tensor]:
    return list(steps + DIFFERENCE * torch.eye(len(steps), dtype=steps.dtype))


def _steps(sigmas: Tensor, parameterization: Parameterization) -> Tensor:
    """Logarithms of the steps in log(sigma) between the levels above 0. [n - 1], float64."""
    levels = sigmas[:-1].double().clamp(min=parameterization.sigma_min)
    return (levels[:-1] / levels[1:]).log().clamp(min=1e-5).log()


def _sigmas(steps: Tensor, parameterization: Parameterization) -> Tensor:
    """The inverse of `_steps`: levels from sigma_max on, then 0. Steps that would pass sigma_min are all shortened."""
    lengths = steps.exp()
    whole = math.log(parameterization.sigma_max / parameterization.sigma_min)
    lengths = lengths * min(1.0, whole / float(lengths.sum()))
    logs = math.log(parameterization.sigma_max) - torch.cat([lengths.new_zeros(1), lengths.cumsum(dim=0)])
    return torch.cat([logs.exp(), logs.new_zeros(1)]).to(torch.float32)
