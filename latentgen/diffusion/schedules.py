"""Sigma schedules: which noise levels a sampler visits.

    schedule(n, parameterization, **knobs) -> sigmas [n + 1], float32 on the CPU, strictly descending, last exactly 0

The parameterization supplies the range [sigma_min, sigma_max] and, for the schedules named after time spacings, the
discrete table. Levels are computed in float64 and rounded once. Every schedule but `leading` starts at sigma_max.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.diffusion import lookup
from latentgen.diffusion.knobs import read, settable, split
from latentgen.diffusion.noise_tables import NoiseTable
from latentgen.diffusion.parameterization import X0, Eps, Flow, Parameterization, V

Schedule = Callable[..., Tensor]


def karras(n: int, parameterization: Parameterization, *, rho: float = 7.0) -> Tensor:
    """sigma^(1/rho) on a straight line from sigma_max to sigma_min (arXiv 2206.00364, eq. 5)."""
    _check_steps(n)
    if not rho > 0:
        raise UserError(f"rho of the karras schedule is {rho}: it must be above 0 (7 is usual).")
    high, low = parameterization.sigma_max ** (1 / rho), parameterization.sigma_min ** (1 / rho)
    return _finish((high + _ramp(n) * (low - high)) ** rho)


def exponential(n: int, parameterization: Parameterization) -> Tensor:
    """log(sigma) on a straight line from sigma_max to sigma_min: uniform in log-SNR (arXiv 2206.00927)."""
    _check_steps(n)
    high, low = math.log(parameterization.sigma_max), math.log(parameterization.sigma_min)
    return _finish(torch.exp(high + _ramp(n) * (low - high)))


def polyexponential(n: int, parameterization: Parameterization, *, rho: float = 1.0) -> Tensor:
    """log(sigma) on the curve u^rho from sigma_max to sigma_min; rho = 1 is `exponential`, more dwells at low noise."""
    _check_steps(n)
    if not rho > 0:
        raise UserError(f"rho of the polyexponential schedule is {rho}: it must be above 0 (1 is usual).")
    high, low = math.log(parameterization.sigma_max), math.log(parameterization.sigma_min)
    return _finish(torch.exp(low + (1 - _ramp(n)) ** rho * (high - low)))


def trailing(n: int, parameterization: Parameterization) -> Tensor:
    """Integer times counted back from the last one, T - 1 (arXiv 2305.08891, table 2)."""
    table = _table(n, parameterization, "trailing", at_most_one_step_per_time=True)
    last = table.num_timesteps
    step = last - (last - last / n)  # T / n rounded as a difference of times, so that halves fall as in other tools
    t = (last - torch.arange(n, dtype=torch.float64) * step).round() - 1
    return _finish(table.sigma_of_t(t))


def leading(n: int, parameterization: Parameterization, *, steps_offset: int = 1) -> Tensor:
    """Every (T // n)-th integer time from `steps_offset` on (arXiv 2305.08891, table 2; offset 1 in Stable Diffusion).

    It starts below sigma_max, the flaw that paper describes; with one step it starts at t = steps_offset.
    """
    table = _table(n, parameterization, "leading", at_most_one_step_per_time=True)
    stride = table.num_timesteps // n
    if not 0 <= steps_offset <= table.num_timesteps - 1 - (n - 1) * stride:
        raise UserError(f"steps_offset {steps_offset} with {n} steps leaves the {table.num_timesteps} training times.")
    t = torch.arange(n - 1, -1, -1, dtype=torch.float64) * stride + steps_offset
    return _finish(table.sigma_of_t(t))


def linspace(n: int, parameterization: Parameterization) -> Tensor:
    """n evenly spaced times from T - 1 to 0, both included, not rounded (arXiv 2305.08891, table 2)."""
    table = _table(n, parameterization, "linspace")
    return _finish(table.sigma_of_t((1 - _ramp(n)) * (table.num_timesteps - 1)))


def sgm_uniform(n: int, parameterization: Parameterization) -> Tensor:
    """Evenly spaced times of the model's own clock from the last one down, the final 0 taking the place of the first.

    As in Stability's generative-models: n + 1 points from T - 1 to 0, without the last. Not rounded.
    """
    _check_steps(n)
    return _finish(_sigma_of_clock(1 - torch.arange(n, dtype=torch.float64) / n, parameterization))


def beta(n: int, parameterization: Parameterization, *, alpha: float = 0.6, beta: float = 0.6) -> Tensor:
    """Times at even quantiles of a Beta distribution, so both ends get more steps (arXiv 2407.12173).

    Quantiles 1, 1 - 1/n, ..., 1/n on the model's own clock, not rounded to integer times.
    """
    _check_steps(n)
    if not (alpha > 0 and beta > 0):
        raise UserError(f"alpha {alpha} and beta {beta} of the beta schedule must be above 0 (0.6 is usual).")
    quantiles = [beta_quantile(1 - i / n, alpha, beta) for i in range(n)]
    return _finish(_sigma_of_clock(torch.tensor(quantiles, dtype=torch.float64), parameterization))


def flow(n: int, parameterization: Parameterization, *, shift: float = 1.0) -> Tensor:
    """Evenly spaced flow times t = sigma / (1 + sigma), shifted towards noise (arXiv 2403.03206, eq. 23).

    The shift t' = s t / (1 + (s - 1) t) is sigma' = s * sigma. Times run from the one that shifts onto sigma_max down
    to 0, so the schedule starts at sigma_max whatever the shift.
    """
    _check_steps(n)
    if not shift > 0:
        raise UserError(f"shift of the flow schedule is {shift}: it must be above 0 (1 is no shift).")
    start = parameterization.sigma_max / shift
    t = start / (1 + start) * (1 - torch.arange(n, dtype=torch.float64) / n)
    return _finish(shift * t / (1 - t))


def find_schedule(text: str) -> partial[Tensor]:
    """The schedule a user asked for as NAME[,key=value]..., such as "karras,rho=5", with its knobs set.

    Raises UserError for unknown names and knobs; values out of range are refused when it is called.
    """
    name, pairs = split(text)
    make = lookup(SCHEDULES, name, "schedule", SCHEDULE_ALIASES)
    return partial(make, **read(pairs, f"--schedule {text}", name, settable(make, supplied=("n",))))


def beta_quantile(p: float, a: float, b: float) -> float:
    """The x in [0, 1] with I_x(a, b) = p: the inverse of the Beta distribution function. p in [0, 1], a, b > 0."""
    if p <= 0 or p >= 1:
        return 0.0 if p <= 0 else 1.0
    # Newton's method in z = logit(x), which keeps the digits of quantiles near 0 and 1. The distribution function is
    # convex below its mode in z, where this starts, and concave above: every step stays on one side of the root.
    z = math.log(a / b)
    log_scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    for _ in range(200):
        slope = math.exp(log_scale - a * math.log1p(math.exp(-z)) - b * math.log1p(math.exp(z)))  # x^a (1 - x)^b / B
        step = (_beta_cdf(z, a, b) - p) / slope
        z -= step
        if abs(step) < 1e-12:
            break
    return 1 / (1 + math.exp(-z))


def _beta_cdf(logit: float, a: float, b: float) -> float:
    """I_x(a, b) at x = sigmoid(logit), by the continued fraction DLMF 8.17.22."""
    x, rest = 1 / (1 + math.exp(-logit)), 1 / (1 + math.exp(logit))
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast only below; I_x(a, b) = 1 - I_{1-x}(b, a)
        return 1 - _beta_cdf(-logit, b, a)
    log_front = a * math.log(x) + b * math.log(rest) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    fraction = 1.0
    for m in range(30, 0, -1):  # from the inside out: 30 terms are plenty for a, b of order one
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m - 1) * (a + b + m - 1) * x / ((a + 2 * m - 2) * (a + 2 * m - 1))
        fraction = 1 + odd / (1 + even / fraction)
    return math.exp(log_front) / (a * fraction)


def _sigma_of_clock(u: Tensor, parameterization: Parameterization) -> Tensor:
    """Noise levels at fractions u of the way from sigma_min (0) to sigma_max (1) in the model's own time."""
    if isinstance(parameterization, Flow):  # whose own fractions run over [0, 1] and are cut at t_min and t_max
        u = parameterization.t_min + u * (parameterization.t_max - parameterization.t_min)
    return parameterization.sigma_of_fraction(u)


def _check_steps(n: int) -> None:
    if n <= 0:
        raise UserError(f"--steps {n}: the number of sampling steps must be at least 1.")


def _table(
    n: int, parameterization: Parameterization, name: str, at_most_one_step_per_time: bool = False
) -> NoiseTable:
    """The discrete table behind a time-spacing schedule, after the checks these schedules share."""
    _check_steps(n)
    if not isinstance(parameterization, Eps | V | X0):
        other = "flow" if isinstance(parameterization, Flow) else "karras"
        raise UserError(f"schedule {name!r} needs training times, which this model has not: choose {other!r}.")
    table = parameterization.table
    if at_most_one_step_per_time and n > table.num_timesteps:
        raise UserError(f"--steps {n}: schedule {name!r} has only {table.num_timesteps} times; use fewer steps.")
    return table


def _ramp(n: int) -> Tensor:
    """n points from 0 to 1, both included; a single point is 0. [n], float64."""
    return torch.linspace(0, 1, n, dtype=torch.float64)


def _finish(sigmas: Tensor) -> Tensor:
    """Append the final 0 and round to float32."""
    return torch.cat([sigmas, sigmas.new_zeros(1)]).to(torch.float32)


SCHEDULES: Mapping[str, Schedule] = {
    "karras": karras,
    "exponential": exponential,
    "polyexponential": polyexponential,
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    "sgm_uniform": sgm_uniform,
    "beta": beta,
    "flow": flow,
}

SCHEDULE_ALIASES: Mapping[str, str] = {
    "normal": "linspace",  # ComfyUI
    "simple": "trailing",  # ComfyUI; the same where the number of steps divides the number of times, else off by one
    "ddim_uniform": "leading",  # ComfyUI
    "poly_exponential": "polyexponential",
    "sgm uniform": "sgm_uniform",
    "flow_shift": "flow",
    "shift": "flow",
}
