"""The driver makes what is needed and no more, in one forward pass, and remembers for one sampling call only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch

from latentgen.core.errors import UserError
from latentgen.diffusion.guidance import CFG, Needs, State, batched, bind
from latentgen.diffusion.guidance.rules import APG

SHIFT = {"cond": 1.0, "uncond": -1.0, "weak": 10.0}


class Network:
    """x plus a number for each kind; remembers how many rows of each kind it was given."""

    def __init__(self) -> None:
        self.calls: list[dict[str, list[int]]] = []

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        self.calls.append({kind: at.tolist() for kind, at in rows.items()})
        assert len(sigma) == len(x) == sum(map(len, rows.values()))
        shifts = torch.cat([torch.full((len(at),), SHIFT[kind]) for kind, at in rows.items()])
        return x + shifts.reshape(-1, 1, 1, 1)


@dataclass(frozen=True)
class AboveOne:
    """Needs `uncond` above sigma = 1 and `weak` above sigma = 5; gives their sum."""

    def needs(self, sigma: torch.Tensor, state: State) -> Needs:
        return {"uncond": sigma > 1, "cond": torch.ones_like(sigma, dtype=torch.bool), "weak": sigma > 5}

    def combine(self, predictions: dict[str, torch.Tensor], x: torch.Tensor, sigma: torch.Tensor, state: State):
        return sum(predictions.values(), torch.zeros_like(x))


def test_one_forward_pass_for_all_kinds() -> None:
    network = Network()
    x, sigma = torch.randn(3, 2, 4, 4), torch.full((3,), 2.0)
    torch.testing.assert_close(bind(CFG(3.0), batched(network))(x, sigma), x - 1 + 3 * 2)
    torch.testing.assert_close(bind(CFG(1.0), batched(network))(x, sigma), x + 1)
    everyone = [0, 1, 2]
    assert network.calls == [{"cond": everyone, "uncond": everyone}, {"cond": everyone}]


def test_a_picture_gets_what_it_needs_at_its_own_level() -> None:
    network = Network()
    x, sigma = torch.zeros(3, 1, 2, 2), torch.tensor([0.5, 9.0, 2.0])
    out = bind(AboveOne(), batched(network))(x, sigma)
    assert network.calls == [{"uncond": [1, 2], "cond": [0, 1, 2], "weak": [1]}]
    # where a kind was not made, cond stands: 1 + 1 + 1, 1 - 1 + 10, 1 - 1 + 1
    assert out[:, 0, 0, 0].tolist() == [3.0, 10.0, 1.0]


def test_kinds_that_nobody_needs_are_absent() -> None:
    network = Network()
    out = bind(AboveOne(), batched(network))(torch.zeros(2, 1, 2, 2), torch.tensor([0.5, 0.5]))
    assert network.calls == [{"cond": [0, 1]}]
    assert (out == 1).all()


def test_what_is_remembered_lasts_for_one_sampling_call() -> None:
    x, sigma = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.full((2,), 2.0)
    apg = APG(3.0, eta=1.0, momentum=-0.5)
    first = bind(apg, batched(Network()))
    one, two = first(x, sigma), first(x, sigma)
    assert not torch.equal(one, two), "the second evaluation must know of the first"
    assert torch.equal(bind(apg, batched(Network()))(x, sigma), one), "another call must not"


def test_memory_needs_the_same_pictures_throughout() -> None:
    denoise = bind(APG(3.0, momentum=-0.5), batched(Network()))
    denoise(torch.randn(2, 1, 2, 2), torch.ones(2))
    with pytest.raises(UserError, match="'momentum' of 2 pictures and got 6"):
        denoise(torch.randn(6, 1, 2, 2), torch.ones(6))
    forgetful = bind(APG(3.0, momentum=0.0), batched(Network()))
    assert forgetful(torch.randn(2, 1, 2, 2), torch.ones(2)).shape[0] == 2
    assert forgetful(torch.randn(6, 1, 2, 2), torch.ones(6)).shape[0] == 6
