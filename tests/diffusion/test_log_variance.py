"""The expected error of a noise level, learned along."""

from __future__ import annotations

import torch

from latentgen.diffusion.log_variance import LogVariance


def test_it_begins_at_zero_everywhere() -> None:
    assert torch.equal(LogVariance()(torch.logspace(-4, 4, 9)), torch.zeros(9))


def test_it_learns_the_mean_error_of_every_level() -> None:
    """At the minimum exp(u) is the mean error, so that every level's share of the loss is the same."""
    torch.manual_seed(0)
    u = LogVariance()
    optimizer = torch.optim.AdamW(u.parameters(), lr=2e-3, weight_decay=0.0)

    def mean_error(sigma: torch.Tensor) -> torch.Tensor:
        return 0.02 + 0.3 * sigma / (1 + sigma)

    for step in range(600):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 600)
        sigma = torch.randn(64).mul(1.5).exp()
        error = mean_error(sigma) * torch.rand(64) * 2
        (error * torch.exp(-u(sigma)) + u(sigma)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    sigma = torch.logspace(-1, 1, 15)
    torch.testing.assert_close(u(sigma).exp(), mean_error(sigma), rtol=0.15, atol=0)


def test_levels_beyond_the_ends_are_finite() -> None:
    u = LogVariance()
    torch.nn.init.normal_(u.series)
    values = u(torch.tensor([1e-30, 1 / 200, 200.0, 1e30]))
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[2], values[3])
