"""Our batch normalisation is torch's, on one process; `test_clip` compares two processes with one."""

from __future__ import annotations

import torch
from torch import nn

from latentgen.models.batch_norm import GlobalBatchNorm, replace_batch_norm


def pair() -> tuple[nn.BatchNorm2d, GlobalBatchNorm]:
    torch.manual_seed(0)
    theirs = nn.BatchNorm2d(5)
    nn.init.uniform_(theirs.weight, 0.5, 2.0)
    nn.init.normal_(theirs.bias)
    holder = nn.Sequential(theirs)
    replace_batch_norm(holder)
    ours = holder[0]
    assert isinstance(ours, GlobalBatchNorm)
    return theirs, ours


def test_training_gives_the_same_values_gradients_and_statistics() -> None:
    theirs, ours = pair()
    for _ in range(3):
        x = torch.randn(4, 5, 6, 7) * 3 + 2
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        weight = torch.randn_like(x)
        y, z = theirs(a), ours(b)
        torch.testing.assert_close(z, y)
        (y * weight).sum().backward()
        (z * weight).sum().backward()
        torch.testing.assert_close(b.grad, a.grad, atol=1e-5, rtol=1e-4)
    for name in ("weight", "bias"):
        torch.testing.assert_close(getattr(ours, name).grad, getattr(theirs, name).grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_evaluation_uses_the_running_statistics() -> None:
    theirs, ours = pair()
    for _ in range(3):
        x = torch.randn(4, 5, 6, 7) * 3 + 2
        theirs(x), ours(x)
    one = torch.randn(1, 5, 6, 7)
    torch.testing.assert_close(ours.eval()(one), theirs.eval()(one))
    torch.testing.assert_close(ours(torch.cat([one, one * 9]))[:1], ours(one))


def test_replacing_reaches_every_depth() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ModuleList([nn.Sequential(nn.BatchNorm2d(4))]))
    replace_batch_norm(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert sum(isinstance(module, GlobalBatchNorm) for module in network.modules()) == 1
