"""An average in main memory is the same average, bit for bit, whenever it is looked at."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from latentgen.engine.ema import Ema
from latentgen.engine.ema_host import HostEma


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))


def move(net: nn.Module, step: int) -> None:
    torch.manual_seed(step)
    with torch.no_grad():
        for p in net.parameters():
            p += torch.randn(p.shape)
    net(torch.randn(4, 2, 4, 4))  # moves the statistics


@pytest.mark.parametrize("looked_at", [(), (0, 1, 2, 3, 4, 5), (2,)])
@pytest.mark.parametrize("skipped", [(), (0,), (3, 4), (5,)])
def test_it_is_the_average(looked_at: tuple[int, ...], skipped: tuple[int, ...]) -> None:
    net = network()
    near, far = Ema(net, 0.9), HostEma(net, 0.9)
    for step in range(6):
        move(net, step)
        for ema in (near, far):
            ema.update(net, step, torch.tensor(float(step in skipped)))
        if step in looked_at:
            for name, value in near.state_dict().items():
                assert torch.equal(far.state_dict()[name], value), name
    for name, value in near.state_dict().items():
        assert torch.equal(far.state_dict()[name], value), name


def test_what_comes_later_does_not_reach_an_update_that_is_under_way() -> None:
    net = network()
    near, far = Ema(net, 0.9), HostEma(net, 0.9)
    move(net, 0)
    for ema in (near, far):
        ema.update(net, 0, torch.zeros(()))
    move(net, 1)  # the next step of the optimizer
    for mine, theirs in zip(far.averaged.parameters(), near.averaged.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_checkpoint_is_taken_whatever_was_under_way() -> None:
    net = network()
    far = HostEma(net, 0.9)
    saved = copy.deepcopy(far.state_dict())
    move(net, 0)
    far.update(net, 0, torch.zeros(()))
    far.load_state_dict(saved)
    assert all(torch.equal(value, saved[name]) for name, value in far.state_dict().items())
