"""Cutting networks, as far as one process shows it; tests/system/test_sharding.py has two."""

from __future__ import annotations

import torch
from torch import nn

from latentgen.engine.sharding import assemble, cut, groups, here, load, local, rebuilt, rows, whole


class Net(nn.Module):
    """A list of lists, a sequence, a layer outside of them and a scalar; 4x4 layers have 20 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), nn.Linear(4, 4)])
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))


def test_groups_are_called_members_inner_first() -> None:
    net = Net()
    layers = [module for module in net.modules() if isinstance(module, nn.Linear) and module is not net.first]
    assert groups(net, 20) == layers, "a layer that is no member of a list is not sure to be called"
    assert groups(net, 40) == [net.body[2]], "members too small for themselves make up a larger one"
    assert groups(net, 1000) == []


def test_no_weight_is_in_two_groups() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(2, 2)), nn.Linear(4, 4))
    assert groups(net, 20) == [net[0][0], net[1]], "what is left of the outer sequence, 6 weights, is too small"
    assert groups(net, 6) == [net[0][0], net[0][1], net[1]]


def test_what_is_not_cut_stays_as_it_is() -> None:
    net = Net()
    assert whole(net.first.weight) is net.first.weight
    assert cut(net.first.weight, net.first.weight) is net.first.weight
    assert all(mine is theirs for mine, theirs in zip(local(net), net.parameters(), strict=True))
    assert assemble({"net": net}, keep=False) == {"net": net}
    state = net.state_dict()
    assert rows(net.first.weight) is None
    assert here(net.first.weight) is net.first.weight
    other = Net()
    load(other.state_dict(), state)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


def test_rebuilt_keeps_everything_but_the_parameters() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)).eval()
    net[2].weight = net[0].weight
    copied = rebuilt(net, [p + 1 for p in net.parameters()])
    assert type(copied) is nn.Sequential
    assert not copied.training
    assert copied[2].weight is copied[0].weight, "shared parameters stay shared"
    assert torch.equal(copied[0].weight, net[0].weight + 1)
    assert not any(p.requires_grad for p in copied.parameters())
    assert copied[1].running_mean is not net[1].running_mean
    assert torch.equal(copied[1].running_mean, net[1].running_mean)
