"""Muon: singular values of one, AdamW for the rest, and a state that survives being written down."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from latentgen.engine import muon
from latentgen.engine.muon import SMALLEST, Muon, matrices_of, orthogonalised
from latentgen.engine.optim import build_optimizer, flatten, unflatten


class Net(nn.Module):
    """Every kind of parameter: large and small layers, a channels_last convolution, an embedding, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 16)
        self.conv = nn.Conv2d(16, 24, 3, padding=1)
        self.linear = nn.Linear(24, 32)
        self.head = nn.Linear(32, 2)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids).transpose(1, 2).unflatten(2, (3, 3)).contiguous(memory_format=torch.channels_last)
        return self.head(self.linear(torch.tanh(self.conv(x)).mean(dim=(2, 3)))) * self.scale


def make(net: nn.Module, kind: str = "muon") -> torch.optim.Optimizer:
    return build_optimizer({"net": net}, kind=kind, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)


def gradients(net: Net, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    net.zero_grad()
    (net(torch.randint(40, (8, 9), generator=generator)) - 1).square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(16, 16), (24, 144), (144, 24), (128, 512)])
def test_singular_values_come_out_near_one_and_directions_stay(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    turned = orthogonalised(matrix, dtype)
    s = torch.linalg.svdvals(turned)
    assert float(s.min()) > 0.5
    assert float(s.max()) < 1.3
    polar = torch.linalg.svd(matrix, full_matrices=False)
    exact = polar.U @ polar.Vh
    cosine = (turned * exact).sum() / (exact.norm() * turned.norm())
    assert float(cosine) > 0.97


@pytest.mark.parametrize("shape", [(16, 32), (24, 144), (144, 24), (128, 1152)])
def test_the_short_way_round_by_the_gram_matrix_gives_the_same(shape: tuple[int, int]) -> None:
    """Also of a matrix as gradients are: most of it in a few directions."""
    torch.manual_seed(0)
    matrix = torch.randn(shape) * torch.logspace(0, -4, shape[1])
    exact = orthogonalised(matrix.double(), torch.float64)
    error = (orthogonalised(matrix, torch.float32) - exact).norm() / exact.norm()
    assert float(error) < 1e-3 < float((orthogonalised(matrix, torch.bfloat16) - exact).norm() / exact.norm())


def test_zero_stays_zero() -> None:
    for shape in ((16, 20), (16, 64)):
        assert torch.equal(orthogonalised(torch.zeros(shape), torch.float32), torch.zeros(shape))


def test_matrices_are_large_layers_weights() -> None:
    net = Net()
    assert {id(p) for p in matrices_of([net])} == {id(net.conv.weight), id(net.linear.weight)}
    assert min(net.head.weight.shape) < SMALLEST
    net.conv.requires_grad_(False)
    assert [id(p) for p in matrices_of([net])] == [id(net.linear.weight)]


def test_matrices_step_by_the_formula_and_the_rest_as_adamw() -> None:
    torch.manual_seed(0)
    net = Net()
    plain = copy.deepcopy(net)
    optimizer, adamw = make(net), make(plain, "adamw")
    before = net.conv.weight.detach().clone()
    gradients(net, 0), gradients(plain, 0)
    assert net.conv.weight.grad is not None
    g = net.conv.weight.grad.clone()
    optimizer.step(), adamw.step()
    direction = orthogonalised((g + 0.95 * (0.05 * g - g)).flatten(1), torch.float32).view_as(before)
    expected = before * (1 - 0.01 * 0.1) - 0.01 * 0.2 * 144**0.5 * direction
    torch.testing.assert_close(net.conv.weight.detach(), expected)
    for name in ("words.weight", "conv.bias", "linear.bias", "head.weight", "head.bias", "scale"):
        assert torch.equal(net.get_parameter(name), plain.get_parameter(name)), name


@pytest.mark.parametrize("count", [1, 2, 7])
def test_processes_share_the_matrices_and_all_get_all(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(3 + number, 4) for number in range(count)]
    me, both, sent, computed = threading.local(), threading.Barrier(2), {}, []

    def all_gather(received: list[torch.Tensor], own: torch.Tensor) -> None:
        sent[me.rank] = own
        both.wait()
        for number, slot in enumerate(received):
            slot.copy_(sent[number])
        both.wait()

    def double(matrix: torch.Tensor) -> torch.Tensor:
        computed.append(len(matrix))
        return 2 * matrix

    def process(rank: int) -> list[torch.Tensor]:
        me.rank = rank
        return muon.shared(double, matrices)

    monkeypatch.setattr(muon, "rank_and_world", lambda: (me.rank, 2))
    monkeypatch.setattr(muon.distributed, "all_gather", all_gather)
    with ThreadPoolExecutor(2) as pool:
        for results in pool.map(process, range(2)):
            assert [r.tolist() for r in results] == [(2 * m).tolist() for m in matrices]
    assert sorted(computed) == [len(matrix) for matrix in matrices]


def test_portions_hold_every_matrix_once_and_not_too_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "rank_and_world", lambda: (0, 2))
    monkeypatch.setattr(muon, "AT_ONCE", 100)
    parameters = [nn.Parameter(torch.zeros(size, 2)) for size in (3, 60, 5, 30, 60, 4, 200)]
    portions = list(muon.portions(parameters))
    assert {id(p) for some in portions for p in some} == {id(p) for p in parameters}
    assert [[len(p) for p in some] for some in portions] == [[200, 60], [60, 30, 5, 4, 3]]


def test_steps_have_the_size_of_adamws() -> None:
    """Root mean square 0.2 times the learning rate, as eq. 4 of arXiv 2502.16982 asks."""
    torch.manual_seed(0)
    net = Net()
    optimizer = build_optimizer({"net": net}, kind="muon", lr=0.01, betas=(0.9, 0.99), weight_decay=0.0)
    for weight in (net.conv.weight, net.linear.weight):
        before = weight.detach().clone()
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        size = (weight.detach() - before).square().mean().sqrt() / 0.01
        assert 0.12 < float(size) < 0.26


def test_the_state_survives_bit_for_bit() -> None:
    torch.manual_seed(0)
    net = Net()
    optimizer = make(net)
    for number in range(3):
        gradients(net, number)
        optimizer.step()
    saved = {name: value.clone(memory_format=torch.contiguous_format) for name, value in flatten(optimizer).items()}
    again = copy.deepcopy(net)
    other = make(again)
    unflatten(other, saved)
    assert other.state[again.conv.weight]["momentum"].stride() == again.conv.weight.stride()
    for number in (3, 4):
        for one, its in ((net, optimizer), (again, other)):
            gradients(one, number)
            its.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_a_parameter_without_gradient_stays() -> None:
    net = Net()
    before = net.linear.weight.detach().clone()
    make(net).step()
    assert torch.equal(net.linear.weight, before)


def test_the_kinds() -> None:
    assert isinstance(make(Net()), Muon)
    with pytest.raises(ValueError, match="'lion' is not one of adamw, adamw8bit, muon"):
        make(Net(), "lion")


@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_is_told_to_stay_changes_nothing_whatever_the_gradient(first: bool) -> None:
    """As on a GPU, where nobody reads whether it is to stay; and the next step is the one there would have been."""
    torch.manual_seed(0)
    net = Net()
    plain = copy.deepcopy(net)
    optimizer, other = make(net), make(plain)
    if not first:
        for one, its in ((net, optimizer), (plain, other)):
            gradients(one, 0)
            its.step()
    for number, skip in ((1, 1.0), (2, 0.0), (3, 1.0)):
        gradients(net, number)
        if skip:
            for p in net.parameters():
                assert p.grad is not None
                p.grad[(0,) * p.ndim] = float("nan")
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(skip)  # type: ignore[attr-defined]
        optimizer.step()
        if not skip:
            gradients(plain, number)
            other.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))
    mine, its = flatten(optimizer), flatten(other)
    assert mine.keys() == its.keys()
    assert all(torch.equal(value, its[name]) for name, value in mine.items())
