"""What a spike is: no healthy loss, however noisy; one that is far off; the same with any sign and scale."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from latentgen.engine.spikes import IN_ROW, ROW, WARM, WINDOW, Spikes, compared

YES = torch.tensor(True)


def runs(losses: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Which of the losses [step, run] are spikes, and what is known at the end [3, run]."""
    known, found = torch.zeros(3, losses.shape[1]), []
    for loss in losses:
        spike, _, known = compared(known, loss, factor, torch.ones_like(loss, dtype=torch.bool))
        found.append(spike)
    return torch.stack(found), known


def lognormal(spread: float, steps: int, count: int, fall: float = 3.0) -> Tensor:
    """Losses whose logarithm has the standard deviation `spread`; they fall by a factor of e^`fall`, as losses do."""
    generator = torch.Generator().manual_seed(0)
    noise = spread * torch.randn(steps, count, generator=generator)
    return torch.exp(noise - fall * (1 - torch.exp(-torch.arange(steps) / 200))[:, None])


def law(spread: float, factor: float) -> float:
    """The share of lognormal losses that are spikes, as the module's first lines say."""
    mean = math.exp(spread**2 / 2)
    deviation = mean * math.sqrt(math.exp(spread**2) - 1)
    return 0.5 * math.erfc(math.log(max(mean + factor * deviation, 2 * mean)) / spread / math.sqrt(2))


@pytest.mark.parametrize(("spread", "factor"), [(0.5, 4.0), (0.8, 8.0), (0.3, 2.0)])
def test_false_alarms_are_as_rare_as_the_law_says(spread: float, factor: float) -> None:
    """At low factors, where there are enough of them to count."""
    losses = lognormal(spread, 400, 2000, fall=0.0)
    found = float(runs(losses, factor)[0][WARM:].float().mean())
    # What is known is known from some 200 losses only, whose deviation is a little off: more for heavier tails.
    assert law(spread, factor) / 1.5 < found < 4 * law(spread, factor)


@pytest.mark.parametrize("spread", [0.1, 0.3, 0.5])
def test_healthy_runs_have_none_at_the_default(spread: float) -> None:
    """Losses that vary up to seven-fold within two standard deviations; 700,000 of them."""
    assert law(spread, 20.0) < 2e-7
    spikes, _ = runs(lognormal(spread, 350, 2000), 20.0)
    assert int(spikes.sum()) == 0


def test_batches_of_one_make_few() -> None:
    assert float(runs(lognormal(0.8, 350, 2000), 20.0)[0][WARM:].float().mean()) < 2e-4


def test_a_loss_that_may_be_negative_has_none_where_it_crosses_zero() -> None:
    """Balanced losses: a level that falls through zero, with noise that is never negative on top of it."""
    losses = 0.5 - torch.arange(400)[:, None] / 400 + lognormal(0.4, 400, 500, fall=0.0) * 0.2
    assert int(runs(losses, 20.0)[0].sum()) == 0
    losses[300] += 5
    assert bool(runs(losses, 20.0)[0][300].all())


def test_losses_that_hardly_vary_must_double() -> None:
    losses = torch.full((100, 2), 0.3)
    losses[80], losses[90] = torch.tensor([0.59, 0.61]), torch.tensor([0.59, 0.61])
    found = runs(losses, 20.0)[0]
    assert found.nonzero().tolist() == [[80, 1], [90, 1]]


def test_the_statistics_are_the_plain_ones_and_then_those_of_a_window() -> None:
    losses = torch.randn(WINDOW, 3) + torch.tensor([0.0, 5.0, -5.0])
    _, (count, mean, variance) = runs(losses, 1e9)
    assert count.tolist() == [WINDOW] * 3
    torch.testing.assert_close(mean, losses.mean(0))
    torch.testing.assert_close(variance, losses.var(0, correction=0))
    _, (count, mean, variance) = runs(torch.cat([losses + 100, torch.ones(2000, 3)]), 1e9)
    torch.testing.assert_close((count, mean), (torch.full((3,), float(WINDOW)), torch.ones(3)))
    assert float(variance.max()) < 1e-3


@given(st.floats(1e-3, 1e3), st.floats(1.0, 30.0), st.integers(0, 99))
def test_scale_does_not_matter_and_a_spike_leaves_no_trace(scale: float, factor: float, at: int) -> None:
    scale = 2.0 ** round(math.log2(scale))  # which float32 multiplies by exactly
    losses = lognormal(0.4, 100, 4)
    plain, known = runs(losses, factor)
    scaled, larger = runs(losses * scale, factor)
    assert torch.equal(plain, scaled)
    torch.testing.assert_close(larger[1], known[1] * scale)
    with_spike = torch.cat([losses[:at], torch.full((1, 4), 1e6), losses[at:]])
    if at >= WARM:
        spikes, after = runs(with_spike, factor)
        assert bool(spikes[at].all())
        assert torch.equal(after, known)


def test_nothing_is_said_before_enough_is_known_nor_of_what_does_not_count() -> None:
    losses = torch.ones(WARM, 1)
    losses[-1] = 1e6
    assert int(runs(losses, 20.0)[0].sum()) == 0
    spikes, known = Spikes(20.0, torch.device("cpu")), []
    for value in [*[1.0] * WARM, math.nan, math.inf, 1e6]:
        found = spikes.judge("net", torch.tensor(value), torch.tensor(value == 1.0))
        known.append(spikes.state_dict()["net"])
        assert not found.spike
    assert torch.equal(known[-1], known[-4]), "it was not taken in"


@pytest.mark.parametrize("patient", [False, True])
def test_a_new_level_is_accepted_unless_there_is_a_state_to_go_back_to(patient: bool) -> None:
    spikes = Spikes(20.0, torch.device("cpu"))
    spikes.patient = patient
    anew = []
    for value in [1.0] * WARM + [9.0] * (IN_ROW + 3):
        found = spikes.judge("net", torch.tensor(value), YES)
        spikes.end(found.spike)
        anew.append(bool(found.anew))
    assert anew.index(True) == WARM + IN_ROW - 1 if not patient else not any(anew)
    assert float(spikes.row) == (0 if not patient else IN_ROW + 3)
    assert float(spikes.state_dict()["net"][1]) == (9.0 if not patient else 1.0)


def test_phases_are_apart_and_the_state_is_all_there_is() -> None:
    first, second = (Spikes(20.0, torch.device("cpu")) for _ in range(2))
    for value in range(WARM + 5):
        first.judge("net", torch.tensor(1 + value % 3), YES)
        first.judge("critic", torch.tensor(100 + value % 3), YES)
    first.end(torch.tensor(1.0))
    state = first.state_dict()
    assert set(state) == {ROW, "net", "critic"}
    second.load_state_dict(state)
    for spikes in (first, second):
        spikes.end(torch.tensor(1.0))
        assert float(spikes.row) == 2
        assert bool(spikes.judge("net", torch.tensor(100.0), YES).spike)
        assert not spikes.judge("critic", torch.tensor(100.0), YES).spike
    assert float(state[ROW]) == 1, "what was saved is not touched"


def test_without_a_factor_nothing_is_a_spike() -> None:
    spikes = Spikes(None, torch.device("cpu"))
    assert not any(spikes.judge("net", torch.tensor(v), YES).spike for v in [*[1.0] * WARM, 1e9])
    assert set(spikes.state_dict()) == {ROW}
