"""Power-function averages of weights, and any of them out of a few (arXiv 2312.02696, section 3, appendix C).

An average after t steps weighs the weights of step tau by p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1): it reaches
back over a fixed share of the run, however long that is. The share is named by the profile's standard deviation over
t, its relative length. Two averages tracked along span, with their snapshots, nearly every other one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LONGEST = 0.28
"""Relative length of a profile that hardly rises any more: 1 / sqrt(12) = 0.289 is the plain mean of all steps."""


def length_of(exponent: float) -> float:
    """Relative length of the profile with exponent gamma > -1: sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)."""
    return math.sqrt((exponent + 1) / (exponent + 3)) / (exponent + 2)


def exponent_of(length: float) -> float:
    """The exponent gamma >= 0 of the profile with relative length in (0, `LONGEST`]; `length_of` falls with it."""
    assert 0 < length <= LONGEST
    low, high = 0.0, 1 / length  # length_of(gamma) < 1 / (gamma + 2), so that gamma < 1 / length
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if length_of(middle) > length else (low, middle)
    return (low + high) / 2


def power_share(step: int, exponent: float) -> float:
    """The share of the weights after optimizer step `step` (from 0) in the average: 1 - (1 - 1/t)^(gamma + 1).

    t = step + 1 is the number of steps done. The share of the first is 1, so the random start leaves no trace. What
    follows gives the weights of step s, up to t, exactly the integral of the profile over (s - 1, s].
    """
    if step == 0:
        return 1.0
    return -math.expm1((exponent + 1) * math.log1p(-1 / (step + 1)))


@dataclass(frozen=True, order=True)
class Profile:
    """The average over the first `step` steps, at least one, with an exponent."""

    step: int
    exponent: float


@dataclass(frozen=True)
class Fit:
    """One profile as a sum of others.

    Args:
        factors: of each of the others; they add up to 1.
        residual: root mean square of what is left of the profile, over that of the profile; 0 is exact.
    """

    factors: tuple[float, ...]
    residual: float


def product(first: Profile, second: Profile) -> float:
    """The integral over all steps of the product of two profiles (arXiv 2312.02696, appendix C.3)."""
    early, late = sorted((first, second))
    scale = (early.exponent + 1) * (late.exponent + 1) / (early.exponent + late.exponent + 1)
    return scale * (early.step / late.step) ** late.exponent / late.step


def fit(wanted: Profile, known: Sequence[Profile]) -> Fit:
    """The sum of `known` profiles that is nearest to `wanted`, by least squares over all steps.

    Unlike in the paper's algorithm 3 the factors must add up to 1: a weight that never moved then comes out as it is,
    and an error of the fit weighs only how far weights have moved.

    Args:
        wanted: as late as one of the known, else nothing reaches up to it.
        known: different profiles, none of them later.
    """
    assert len(set(known)) == len(known) > 0
    assert max(profile.step for profile in known) == wanted.step
    gram = torch.tensor([[product(a, b) for b in known] for a in known], dtype=torch.float64)
    towards = torch.tensor([product(a, wanted) for a in known], dtype=torch.float64)
    own = product(wanted, wanted)
    factors = _constrained(gram, towards)
    left = own - 2 * (towards @ factors) + factors @ gram @ factors
    return Fit(tuple(factors.tolist()), math.sqrt(max(0.0, float(left)) / own))


def _constrained(gram: Tensor, towards: Tensor) -> Tensor:
    """The x that minimises x'Gx - 2 b'x where its entries add up to 1, after Lagrange."""
    count = len(towards)
    scale = gram.diagonal().rsqrt()  # of profiles of norm 1 the matrix is well conditioned
    system = torch.zeros(count + 1, count + 1, dtype=torch.float64)
    system[:count, :count] = gram * scale[:, None] * scale
    system[count, :count] = system[:count, count] = scale / scale.mean()
    right = torch.cat([towards * scale, (1 / scale.mean())[None]])
    # The least-squares solver of lowest norm: profiles that are nearly the same would make another one explode.
    solution = torch.linalg.lstsq(system, right[:, None], driver="gelsd", rcond=1e-13).solution
    return solution[:count, 0] * scale
