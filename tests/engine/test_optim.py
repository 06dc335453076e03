"""Learning rates, and an optimizer that survives being written down bit for bit."""

from __future__ import annotations

import copy
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from latentgen.engine.optim import build_optimizer, flatten, learning_rate, set_rate, unflatten

RUN = {"peak": 0.8, "warmup": 4, "steps": 20}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "inverse_sqrt"])
def test_warm_up_is_a_line_to_the_peak(schedule: str) -> None:
    rates = [learning_rate(step, schedule=schedule, **RUN) for step in range(5)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert max(learning_rate(step, schedule=schedule, **RUN) for step in range(20)) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("schedule", "final", "step", "rate"),
    [
        ("cosine", 0.0, 4, 0.8),
        ("cosine", 0.0, 12, 0.4),
        ("cosine", 0.0, 8, 0.4 * (1 + math.cos(math.pi / 4))),
        ("cosine", 0.25, 20, 0.2),
        ("cosine", 0.25, 12, 0.5),
        ("linear", 0.0, 8, 0.6),
        ("linear", 0.5, 12, 0.6),
        ("linear", 0.0, 20, 0.0),
        ("linear", 0.5, 999, 0.4),
        ("constant", 0.0, 19, 0.8),
        ("inverse_sqrt", 0.0, 15, 0.4),
    ],
)
def test_schedules(schedule: str, final: float, step: int, rate: float) -> None:
    assert learning_rate(step, schedule=schedule, final=final, **RUN) == pytest.approx(rate)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "inverse_sqrt"])
def test_without_warm_up_the_first_step_is_the_peak(schedule: str) -> None:
    assert learning_rate(0, peak=0.5, schedule=schedule, warmup=0, steps=1) == 0.5


def test_an_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="'step' is not one of cosine"):
        learning_rate(9, schedule="step", **RUN)


class Net(nn.Module):
    """A channels_last convolution, a linear layer and a scalar: every layout the optimizer meets."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(x).mean(dim=(2, 3))) * self.scale


def make(net: nn.Module, kind: str = "adamw") -> torch.optim.Optimizer:
    return build_optimizer({"net": net}, kind=kind, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)


def step(net: Net, optimizer: torch.optim.Optimizer, number: int) -> None:
    x = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    net(x.contiguous(memory_format=torch.channels_last)).square().sum().backward()
    optimizer.step()


def test_flatten_and_unflatten_are_inverse_and_the_next_step_is_the_same() -> None:
    torch.manual_seed(0)
    net = Net()
    optimizer = make(net)
    for number in range(3):
        step(net, optimizer, number)
    saved = {name: value.clone(memory_format=torch.contiguous_format) for name, value in flatten(optimizer).items()}
    again = copy.deepcopy(net)
    other = make(again)
    unflatten(other, saved)
    restored = flatten(other)
    assert restored.keys() == saved.keys()
    assert all(torch.equal(restored[name], saved[name]) and restored[name].dtype == saved[name].dtype for name in saved)
    conv = other.state[again.conv.weight]
    assert conv["exp_avg"].stride() == again.conv.weight.stride()
    assert conv["exp_avg_sq"].stride() == again.conv.weight.stride()
    for number in (3, 4):
        step(net, optimizer, number)
        step(again, other, number)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_the_state_is_named_by_parameter_and_kind() -> None:
    net = Net()
    optimizer = make(net)
    assert flatten(optimizer) == {}
    step(net, optimizer, 0)
    kinds = ("exp_avg", "exp_avg_sq", "step")
    assert sorted(flatten(optimizer)) == sorted(f"{number}.{kind}" for number in range(5) for kind in kinds)


def test_only_matrices_decay() -> None:
    net = Net()
    decays = {id(p): group["weight_decay"] for group in make(net).param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in net.named_parameters()} == {
        "conv.weight": 0.1,
        "conv.bias": 0.0,
        "linear.weight": 0.1,
        "linear.bias": 0.0,
        "scale": 0.0,
    }


def test_frozen_parameters_are_left_out() -> None:
    net = Net()
    net.conv.requires_grad_(False)
    kept = [p for group in make(net).param_groups for p in group["params"]]
    assert len(kept) == 3


KINDS = ("adamw", "adamw8bit", "muon")


@pytest.fixture
def eight_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for the library, which takes groups as torch's own AdamW does."""
    library = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=torch.optim.AdamW))
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)


class Words(nn.Module):
    """One row, as of a learned token; matrices that Muon takes and that it does not; vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.ones(1, 768))
        self.large, self.small = nn.Linear(16, 32), nn.Linear(32, 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("eight_bit")
def test_every_module_has_its_rate_and_may_keep_from_decay(kind: str) -> None:
    modules: dict[str, nn.Module] = {name: Words() for name in ("base", "tokens", "other")}
    optimizer = build_optimizer(
        modules,
        kind=kind,
        lr=0.5,
        betas=(0.9, 0.99),
        weight_decay=0.1,
        rates={"tokens": 0.25, "base": 2.0},
        no_decay=("tokens",),
    )
    for scheduled in (0.5, 0.01):  # as it is built, and as the loop sets it
        of = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
        for name, rate, decay in (("base", 2.0, 0.1), ("tokens", 0.25, 0.0), ("other", 1.0, 0.1)):
            for p in modules[name].parameters():
                assert of[id(p)] == (rate * scheduled, decay if p.ndim > 1 else 0.0)
        set_rate(optimizer, 0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("eight_bit")
def test_the_factor_is_that_of_the_step(kind: str) -> None:
    """Of all kinds of parameters, one row too: a step at half the factor is half as long, and decays half as much."""
    torch.manual_seed(0)
    modules = {name: Words() for name in ("one", "half", "still")}
    begun = {name: value.clone() for name, value in modules["one"].state_dict().items()}
    for module in modules.values():
        module.load_state_dict(begun)
    optimizer = build_optimizer(
        modules, kind=kind, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, rates={"half": 0.5, "still": 0.0}
    )
    gradients = {name: torch.randn_like(value) for name, value in begun.items()}
    for module in modules.values():
        for name, p in module.named_parameters():
            p.grad = gradients[name].clone()
    optimizer.step()
    for name, value in begun.items():
        one, half, still = (module.get_parameter(name).detach() - value for module in modules.values())
        assert float(one.abs().min()) > 0 or kind == "muon"
        torch.testing.assert_close(half, one / 2, rtol=1e-4, atol=1e-7)
        assert not still.any()


def test_fused_adamw_is_the_plain_formula() -> None:
    """arXiv 1711.05101, algorithm 2, written out."""
    torch.manual_seed(0)
    net = Net()
    optimizer, w = make(net), net.linear.weight.detach().clone()
    m = v = torch.zeros_like(w)
    for number in range(3):
        step(net, optimizer, number)
        g = net.linear.weight.grad
        assert g is not None
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        t = number + 1
        w = w * (1 - 0.01 * 0.1) - 0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
        torch.testing.assert_close(net.linear.weight.detach(), w, rtol=1e-5, atol=1e-6)
