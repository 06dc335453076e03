"""The averaged weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from latentgen.engine.ema import Ema, decay_at


def test_decay_starts_short_and_ends_at_its_limit() -> None:
    assert [decay_at(step, 0.995) for step in (0, 1, 8)] == pytest.approx([1 / 10, 2 / 11, 9 / 18])
    assert decay_at(10**6, 0.995) == 0.995
    assert decay_at(5, 0.0) == 0.0


def test_update_is_the_plain_loop() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = Ema(net, 0.6)
    expected = {name: p.detach().clone() for name, p in net.named_parameters()}
    for step in range(20):
        with torch.no_grad():
            for p in net.parameters():
                p += torch.randn(p.shape)
        net(torch.randn(4, 2, 4, 4))  # moves the statistics
        ema.update(net, step, torch.zeros(()))
        d = decay_at(step, 0.6)
        expected = {name: d * expected[name] + (1 - d) * p.detach() for name, p in net.named_parameters()}
    for name, p in ema.averaged.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(ema.averaged.buffers(), net.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_average_is_a_module_of_its_own() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
    ema = Ema(net, 0.9)
    assert type(ema.averaged) is nn.Sequential
    assert not ema.averaged.training
    assert net.training
    assert not any(p.requires_grad for p in ema.averaged.parameters())
    before = ema.averaged[0].weight.clone()
    with torch.no_grad():
        net[0].weight += 1
    assert torch.equal(ema.averaged[0].weight, before)


def test_state_round_trip() -> None:
    ema, other = Ema(nn.Linear(2, 2), 0.9), Ema(nn.Linear(2, 2), 0.9)
    other.load_state_dict({name: value.clone() for name, value in ema.state_dict().items()})
    assert torch.equal(other.averaged.weight, ema.averaged.weight)
