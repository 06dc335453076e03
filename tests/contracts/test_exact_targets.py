"""Samplers against targets whose denoiser is known exactly, in float64.

Three yardsticks: the solution of the probability flow for a Gaussian and for a mixture; the variance that a stochastic
sampler gives a Gaussian, which follows without chance, as its result is linear in the start and in every noise; and the
mean and covariance of samples of a mixture, within what chance allows. The last part breaks each stochastic sampler on
purpose and shows that these yardsticks notice.
"""

from __future__ import annotations

import inspect
import itertools
import math
import sys
from collections.abc import Callable

import pytest
import torch

from latentgen.diffusion.brownian import brownian_noise
from latentgen.diffusion.samplers import SAMPLERS, Method

SPREAD, HIGH, LOW = 0.7, 14.6146, 0.1
MEANS = torch.tensor([[1.0, -0.5], [-1.2, 0.4], [0.2, 1.1]], dtype=torch.float64)
SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
INNER = 0.4  # standard deviation of each component of the mixture
ORDERS = {1: 0.95, 2: 1.9, 3: 2.7}
STEPS = {1: (60, 120, 240), 2: (30, 60, 120), 3: (30, 60, 120)}

STOCHASTIC = sorted(name for name, method in SAMPLERS.items() if method.noise)
NO_SWITCH = {"ddpm", "er_sde", "lcm"}  # no knob turns their noise off
SILENT = {
    **{name: {} for name, method in SAMPLERS.items() if not method.noise},
    **{name: {"eta": 0.0} for name in STOCHASTIC if name not in NO_SWITCH},
    "restart": {"restarts": 0},
    "parallel": {"tolerance": 0.0},
}


def gaussian(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The exact denoiser for data ~ Normal(0, SPREAD^2). Elementwise."""
    return x * (SPREAD**2 / (SPREAD**2 + sigma.reshape(-1, 1, 1, 1) ** 2))


def consistency(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Where the probability flow of that data ends from x: what a consistency network learns."""
    return x * (SPREAD / (SPREAD**2 + sigma.reshape(-1, 1, 1, 1) ** 2).sqrt())


def mixture(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The exact denoiser for the mixture of pairs (the last dimension)."""
    variance = (INNER**2 + sigma**2).reshape(-1, 1, 1, 1, 1)
    away = x[..., None, :] - MEANS
    belongs = torch.softmax(SHARES.log() - away.square().sum(-1) / (2 * variance[..., 0]), dim=-1)
    return (belongs[..., None] * (MEANS + INNER**2 / variance * away)).sum(-2)


def log_levels(n: int, high: float = HIGH, low: float = LOW) -> torch.Tensor:
    return torch.logspace(math.log10(high), math.log10(low), n + 1, dtype=torch.float64)


def start() -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(2, 1, 6, 2, dtype=torch.float64, generator=generator) * HIGH


@pytest.fixture(scope="module")
def solutions() -> dict[Callable, torch.Tensor]:
    """The probability flow from `start`, solved: by its formula, and by 600 steps of the third order."""
    x = start()
    return {
        gaussian: x * math.sqrt((SPREAD**2 + LOW**2) / (SPREAD**2 + HIGH**2)),
        mixture: SAMPLERS["unipc"](mixture, x, log_levels(600)),
    }


def measured_order(errors: list[float]) -> float:
    return math.log2(errors[0] / errors[-1]) / (len(errors) - 1)


# --- the probability flow ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [gaussian, mixture])
@pytest.mark.parametrize("name", sorted(set(SILENT) - {"dpm_adaptive"}))
def test_the_flow_is_solved_at_the_stated_order(name: str, target: Callable, solutions: dict) -> None:
    """The step to 0 is left out, as it does not shrink."""
    x = start()
    errors = [
        (SAMPLERS[name](target, x, log_levels(n), **SILENT[name]) - solutions[target]).abs().max().item()
        for n in STEPS[SAMPLERS[name].order]
    ]
    assert measured_order(errors) >= ORDERS[SAMPLERS[name].order]


@pytest.mark.parametrize(
    ("name", "knobs", "order"),
    [
        ("unipc", {"order": 1}, 2),  # the corrector gains an order
        ("unipc", {"order": 2}, 3),
        ("unipc", {"variant": "bh1"}, 3),
        ("lms", {"order": 1}, 1),
        ("lms", {"order": 2}, 2),
        ("deis", {"order": 2}, 2),
        ("ipndm", {"order": 2}, 2),
        ("dpmpp_2m_sde", {"eta": 0.0, "solver_type": "heun"}, 2),
    ],
)
def test_orders_of_knobs(name: str, knobs: dict, order: int, solutions: dict) -> None:
    x = start()
    errors = [
        (SAMPLERS[name](mixture, x, log_levels(n), **knobs) - solutions[mixture]).abs().max().item()
        for n in (40, 80, 160)
    ]
    assert measured_order(errors) >= ORDERS[order]


@pytest.mark.parametrize(
    ("name", "error"),
    [("deis", 2.0e-4), ("lms", 3.0e-4), ("dpmpp_3m_sde", 1.0e-4), ("unipc", 2.0e-5), ("plms", 1.0e-3)],
)
def test_multistep_errors_are_small_though_their_start_is_of_low_order(
    name: str, error: float, solutions: dict
) -> None:
    """The order of these bends with the number of steps (see `linear.py`), so their error is pinned at 80."""
    found = SAMPLERS[name](mixture, start(), log_levels(80), **SILENT[name]) - solutions[mixture]
    assert found.abs().max().item() < error


@pytest.mark.parametrize("name", sorted(set(SILENT) - {"dpm_adaptive"}))
def test_starting_far_above_the_data_overshoots_nothing(name: str) -> None:
    """Ten steps of a flow model, whose first leads from 999 to 9: no sampler errs much more than Euler's method."""
    times = torch.arange(10, 0, -1, dtype=torch.float64) / 10 * 0.999
    levels = torch.cat([times / (1 - times), torch.zeros(1, dtype=torch.float64)])
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(2, 1, 6, 2, dtype=torch.float64, generator=generator) * 999
    fine = torch.logspace(math.log10(float(levels[0])), -3, 1000, dtype=torch.float64)
    end = SAMPLERS["dpmpp_2m"](mixture, x, fine)
    error = (SAMPLERS[name](mixture, x, levels, **SILENT[name]) - end).square().mean().sqrt().item()
    euler = (SAMPLERS["euler"](mixture, x, levels) - end).square().mean().sqrt().item()
    assert error < 1.5 * euler


@pytest.mark.parametrize("order", [2, 3])
def test_the_adaptive_error_follows_the_tolerance(order: int, solutions: dict) -> None:
    for tolerance, bound in ((1e-1, 0.2), (1e-2, 0.03), (1e-3, 5e-3), (1e-4, 5e-4)):
        knobs = {"rtol": tolerance, "atol": tolerance / 6, "order": order}
        found = SAMPLERS["dpm_adaptive"](mixture, start(), log_levels(3), **knobs) - solutions[mixture]
        assert found.abs().max().item() < bound


# --- the variance of a Gaussian, without chance -----------------------------------------------------------------------


def variance(method: Callable, sigmas: torch.Tensor, denoise: Callable = gaussian, **knobs: object) -> float:
    """The exact variance of a linear sampler's result, started from the exact marginal.

    The result is a * x + sum of b_k * w_k, where w_k are independent: the increments of the noise path over the finest
    intervals that the sampler's calls make, and every fresh draw. Running the batch (x = 1, no noise),
    (x = 0, w_1 = 1), (x = 0, w_2 = 1) ... yields a and all b_k.
    """
    calls: list[tuple[float, float]] = []

    def listen(sigma: float, sigma_next: float) -> torch.Tensor:
        calls.append((sigma, sigma_next))
        return torch.zeros(1, 1, 1, 1, dtype=torch.float64)

    method(denoise, torch.zeros(1, 1, 1, 1, dtype=torch.float64), sigmas, noise=listen, **knobs)
    cuts = sorted({level for call in calls if call[1] < call[0] for level in call}, reverse=True)
    cells = list(itertools.pairwise(cuts))
    fresh = [k for k, call in enumerate(calls) if call[1] > call[0]]
    number = itertools.count()

    def probe(sigma: float, sigma_next: float) -> torch.Tensor:
        at, drawn = next(number), torch.zeros(1 + len(cells) + len(fresh), dtype=torch.float64)
        if at in fresh:
            drawn[1 + len(cells) + fresh.index(at)] = 1
        for k, (above, below) in enumerate(cells):
            if sigma_next < sigma and above <= sigma and below >= sigma_next:
                drawn[1 + k] = math.sqrt((below**-2 - above**-2) / (sigma_next**-2 - sigma**-2))
        return drawn.reshape(-1, 1, 1, 1)

    x = torch.zeros(1 + len(cells) + len(fresh), 1, 1, 1, dtype=torch.float64)
    x[0] = 1
    out = method(denoise, x, sigmas, noise=probe, **knobs).flatten()
    return out[0].item() ** 2 * (SPREAD**2 + sigmas[0].item() ** 2) + out[1:].square().sum().item()


VARIANCE_ORDER = {"dpmpp_3m_sde": 2}
"""Where it is not the order of the noiseless solution: eta = 1 leaves the noise inside a step unseen."""


@pytest.mark.parametrize("name", sorted(set(STOCHASTIC) - {"lcm", "restart"}))
def test_the_variance_converges(name: str) -> None:
    exact, order = SPREAD**2 + LOW**2, VARIANCE_ORDER.get(name, min(SAMPLERS[name].order, 3))
    errors = [abs(variance(SAMPLERS[name], log_levels(n)) - exact) for n in (40, 80, 160)]
    assert measured_order(errors) >= ORDERS[order]
    assert errors[-1] < {1: 0.03, 2: 6e-4, 3: 1e-5}[order] * exact


@pytest.mark.parametrize(
    ("name", "knobs", "order"),
    [
        ("ddim", {"eta": 0.5}, 1),
        ("ddpm", {"variance": "fixed_large"}, 1),
        ("euler", {"s_churn": 10.0}, 1),
        ("heun", {"s_churn": 10.0}, 2),
        ("dpm2", {"s_churn": 10.0}, 2),
        ("er_sde", {"max_stage": 1}, 1),
        ("er_sde", {"max_stage": 2}, 2),
        ("dpmpp_2m_sde", {"eta": 0.5}, 2),
        ("dpmpp_2m_sde", {"solver_type": "heun"}, 2),
    ],
)
def test_the_variance_converges_with_other_knobs(name: str, knobs: dict, order: int) -> None:
    exact = SPREAD**2 + LOW**2
    errors = [abs(variance(SAMPLERS[name], log_levels(n), **knobs) - exact) for n in (80, 160)]
    assert measured_order(errors) >= {1: 0.9, 2: 1.9}[order]
    assert errors[-1] < 0.05 * exact


def test_restarts_keep_the_variance() -> None:
    exact = SPREAD**2 + LOW**2
    errors = [
        abs(variance(SAMPLERS["restart"], log_levels(40), restarts=2, restart_steps=n) - exact) for n in (9, 18, 36)
    ]
    assert errors[0] < 0.03 * exact
    assert errors[-1] < 0.005 * exact


def test_a_learned_variance_takes_the_place_of_the_fixed_one() -> None:
    """The variance of x_next given x is known for this data; with it every number of steps is exact."""

    def log_variance(x: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        total, total_next = SPREAD**2 + sigma**2, SPREAD**2 + sigma_next**2
        return (total_next - total_next**2 / total).log().reshape(-1, 1, 1, 1).expand_as(x)

    for n in (2, 5, 20):
        found = variance(SAMPLERS["ddpm"], log_levels(n), log_variance=log_variance)
        assert found == pytest.approx(SPREAD**2 + LOW**2, rel=1e-9)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_lcm_is_exact_with_a_consistency_function(n: int) -> None:
    levels = torch.cat([log_levels(n - 1) if n > 1 else torch.tensor([HIGH]), torch.zeros(1)]).double()
    assert variance(SAMPLERS["lcm"], levels, denoise=consistency) == pytest.approx(SPREAD**2, rel=1e-9)
    assert variance(SAMPLERS["lcm"], levels) < 0.95 * SPREAD**2, "an ordinary denoiser's samples are too smooth"


# --- samples of the mixture, within chance ----------------------------------------------------------------------------

COUNT = 6000
SAMPLE_STEPS = {1: 120, 2: 40, 3: 40}


def off_by(method: Callable, n: int, path: bool = True, **knobs: object) -> float:
    """How far mean and covariance of COUNT samples are from the mixture's, in standard errors of chance: the worst."""
    generator = torch.Generator().manual_seed(3)
    which = torch.multinomial(SHARES, COUNT, replacement=True, generator=generator)
    noise = torch.randn(2, COUNT, 2, dtype=torch.float64, generator=generator)
    x = (MEANS[which] + INNER * noise[0] + HIGH * noise[1])[None, None]
    sigmas = torch.cat([log_levels(n, low=0.03), torch.zeros(1)])
    noise_source = (
        brownian_noise([5], x) if path else lambda *levels: torch.randn(x.shape, generator=generator).double()
    )
    out = method(mixture, x, sigmas, noise=noise_source, **knobs)[0, 0]
    mean = SHARES @ MEANS
    covariance = (MEANS - mean).T @ torch.diag(SHARES) @ (MEANS - mean) + INNER**2 * torch.eye(2)
    centred = out - mean
    products = torch.stack([centred[:, 0] ** 2, centred[:, 1] ** 2, centred[:, 0] * centred[:, 1]], dim=1)
    expected = torch.stack([covariance[0, 0], covariance[1, 1], covariance[0, 1]])
    mean_off = (centred.mean(0) / (out.std(0) / COUNT**0.5)).abs().max()
    covariance_off = ((products.mean(0) - expected) / (products.std(0) / COUNT**0.5)).abs().max()
    return torch.maximum(mean_off, covariance_off).item()


@pytest.mark.parametrize("name", sorted(set(STOCHASTIC) - {"lcm"}))
def test_samples_have_the_mean_and_covariance_of_the_data(name: str) -> None:
    assert off_by(SAMPLERS[name], SAMPLE_STEPS[SAMPLERS[name].order]) < 4


# --- a wrong sampler fails --------------------------------------------------------------------------------------------

MUTANTS = [
    ("ddpm", "kept * (x - x0_hat)", "(sigma_next / sigma) * (x - x0_hat)"),  # steps to sigma_next, then adds noise
    ("ddpm", "math.sqrt(1 - kept)", "math.sqrt(1 - sigma_next / sigma)"),
    ("ddim", "line(x, x0_hat, sigma, down)", "line(x, x0_hat, sigma, sigma_next)"),
    ("ddim", "up * s_noise", "1.2 * up * s_noise"),
    ("dpm2_ancestral", "dpm2_step(denoise, x, sigma, down, clock)", "dpm2_step(denoise, x, sigma, sigma_next, clock)"),
    ("dpm2_ancestral", "up * s_noise", "0.8 * up * s_noise"),
    ("dpmpp_2s_ancestral", "line(x, estimate, sigma, down)", "line(x, estimate, sigma, sigma_next)"),
    ("dpmpp_2s_ancestral", "up * s_noise", "1.2 * up * s_noise"),
    ("dpmpp_sde", "x = x + up * s_noise", "x = x + 1.2 * up * s_noise"),
    ("dpmpp_sde", 'up * s_noise * source_of(noise, "dpmpp_sde")(sigma, sigma_next)', "0.0"),
    ("dpmpp_2m_sde", "(1 + eta) * h", "h"),
    ("dpmpp_2m_sde", "-2 * eta * h", "-eta * h"),
    ("dpmpp_3m_sde", "1 + eta", "1"),
    ("dpmpp_3m_sde", "-2 * eta * h", "-3 * eta * h"),
    ("er_sde", "sigma_next**2 - (r * sigma) ** 2", "sigma_next**2 - r * sigma_next * sigma"),
    ("er_sde", "r * (x - x0_hat)", "(sigma_next / sigma) * (x - x0_hat)"),
    ("restart", "_restart_levels(t_max", "_restart_levels(1.3 * t_max"),
    ("restart", "(foot, t_max)\n", "(foot, t_max) * 1.2\n"),
]


def mutated(name: str, old: str, new: str) -> Callable:
    """The sampler with one piece of its source replaced."""
    run = SAMPLERS[name].run
    source = inspect.getsource(run)
    assert old in source
    space = dict(vars(sys.modules[run.__module__]))
    exec(compile(source.replace(old, new), "mutant", "exec"), space)
    return space[run.__name__]


@pytest.mark.parametrize(("name", "old", "new"), [m for m in MUTANTS if m[0] in SAMPLERS])
def test_a_wrong_sampler_misses_the_mean_or_covariance(name: str, old: str, new: str) -> None:
    method, knobs = mutated(name, old, new), {"eta": 1.0} if name == "ddim" else {}
    assert off_by(method, SAMPLE_STEPS[SAMPLERS[name].order], path=False, **knobs) > 6


def test_every_stochastic_sampler_has_mutants() -> None:
    assert {name for name, *_ in MUTANTS} >= set(STOCHASTIC) - {"lcm", "euler_ancestral"}  # which is ddim's code


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("dpmpp_2m", "(2 * r)", "r"),
        ("heun", "churned(x, sigma, gamma, s_noise, noise)", "(x, sigma * (1 + gamma))"),
        ("deis", "math.log(sigma), math.log(sigma_next), math.exp", "math.log(sigma), math.log(sigma_next), math.cosh"),
        ("lms", "lambda u: 1.0", "lambda u: 1.02"),
        ("plms", "ADAMS_BASHFORTH[len(slopes) - 1], slopes", "ADAMS_BASHFORTH[0], slopes[:1]"),
        ("dpmpp_3m_sde", "weights[1:]", "[0.5 * w for w in weights[1:]]"),
    ],
)
def test_a_wrong_solver_misses_its_order(name: str, old: str, new: str, solutions: dict) -> None:
    method, x = mutated(name, old, new), start()
    knobs = {"s_churn": 10.0} if name == "heun" else SILENT[name]
    errors = [
        (method(mixture, x, log_levels(n), **knobs) - solutions[mixture]).abs().max().item()
        for n in STEPS[SAMPLERS[name].order]
    ]
    assert measured_order(errors) < ORDERS[SAMPLERS[name].order]


def test_an_unknown_method_cannot_be_registered_unnoticed() -> None:
    assert all(isinstance(method, Method) and method.order in (0, 1, 2, 3) for method in SAMPLERS.values())
    assert set(SILENT) | NO_SWITCH == set(SAMPLERS)
