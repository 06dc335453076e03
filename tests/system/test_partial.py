"""Two processes train networks that are partly frozen like one, whether they are cut or not."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from worlds import run_two

from latentgen.engine.checkpoint import read_checkpoint

ENGINE = Path(__file__).resolve().parents[1] / "engine"
STEPS, ROUNDING = 6, 2e-6
WAYS = ("ddp", "cut", "mixed")


@pytest.fixture(scope="module", params=["adamw", "muon"])
def folder(request, environment, tmp_path_factory) -> Path:
    """One process's training, `one`, and what two made beside it."""
    folder = tmp_path_factory.mktemp("partial")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ENGINE))
        partial_loop = runpy.run_path(str(ENGINE / "partial.py"))["partial_loop"]
    partial_loop(folder / "one", Accelerator(cpu=True), norm=False, optimizer=request.param).run()
    run_two("partial_processes.py", str(folder), request.param, environment=environment)
    return folder


def tensors(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    found = read_checkpoint(folder / "c" / f"{step:08d}")
    return {f"{group}/{name}": value for group, own in found.tensors.items() for name, value in own.items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], rounding: float) -> None:
    assert first.keys() == second.keys()
    assert {name.partition("/")[0] for name in first} >= {"weights-net", "ema-net-0.1", "ema-token", "optimizer-net"}
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=50 * rounding, atol=rounding, msg=lambda t, n=name: n + t)


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_like_one(way: str, folder: Path) -> None:
    for step in range(1, STEPS + 1):
        same(tensors(folder / way, step), tensors(folder / "one", step), ROUNDING)


@pytest.mark.parametrize("way", WAYS)
def test_they_continue_bit_for_bit(way: str, folder: Path) -> None:
    same(tensors(folder / f"{way}-again"), tensors(folder / way), 0.0)


@pytest.mark.parametrize("way", WAYS)
def test_they_finish_what_one_began(way: str, folder: Path) -> None:
    same(tensors(folder / f"{way}-begun"), tensors(folder / "one"), ROUNDING)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_frozen_is_cut_too_and_averages_share_it(way: str, folder: Path) -> None:
    first, second = (json.loads((folder / f"{way}-{rank}.json").read_text()) for rank in range(2))
    whole = {name for name, (here, _, _) in first.items() if here < 0}
    assert whole == (first.keys() if way == "ddp" else {"net.scale"}), "a scalar cannot be cut"
    assert {"net.base.0.weight", "net.base.1.weight", "net.base.1.bias", "still.weight"} < first.keys() == second.keys()
    for name, (here, total, shared) in first.items():
        assert shared, name
        assert second[name][2] or not second[name][0], name
        if here >= 0:
            assert here + second[name][0] == total, name
            assert here < total
