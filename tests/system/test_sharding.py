"""FSDP2 on two processes trains a toy like one, and its checkpoints are those of any number of processes.

Whole recipes under FSDP2 are in `test_processes.py`.
"""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from worlds import run_two

from latentgen.engine.checkpoint import Keep, read_checkpoint, save_checkpoint

HERE = Path(__file__).resolve().parent
ROUNDING = {"adamw": 1e-6, "muon": 1e-5}
"""Largest difference of weights about 0.1. Muon's steps of 4e-3 make the rounding in a gradient's small singular values
grow with them."""


def checkpoint(folder: Path, step: int) -> dict[str, torch.Tensor]:
    found = read_checkpoint(folder / f"{step:08d}")
    return {f"{group}/{name}": value for group, tensors in found.tensors.items() for name, value in tensors.items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], rounding: float = 0.0) -> None:
    """Equal in every bit, or but for `rounding`."""
    assert first.keys() == second.keys()
    assert any(name.startswith("optimizer-net/") for name in first)
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        if rounding:
            torch.testing.assert_close(
                value, second[name], rtol=1e-4, atol=rounding, msg=lambda text, n=name: f"{n}{text}"
            )
        else:
            assert torch.equal(value, second[name]), name


def logged(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "m.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not isinstance(v, str) and k != "steps_per_second"} for line in lines]


@pytest.fixture(scope="module")
def toy() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(HERE / "sharded_toy.py")))


@pytest.fixture(scope="module", params=ROUNDING)
def kind(request) -> str:
    """Of the optimizer."""
    return request.param


@pytest.fixture(scope="module")
def folder(toy, kind: str, environment, tmp_path_factory) -> Path:
    """One process's training, `one`, and all that two sharded processes made beside it."""
    folder = tmp_path_factory.mktemp("sharded")
    accelerator = Accelerator(cpu=True)
    toy.toy_loop(folder / "one", kind, accelerator).run()
    shutil.copytree(folder / "one" / "c" / "00000003", folder / "begun" / "c" / "00000003")
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_MIN_NUM_PARAMS": "1000"}
    run_two("sharded_toy.py", str(folder), kind, environment={**environment, **asked})
    return folder


def test_everything_of_the_network_is_cut_in_two(folder: Path, kind: str) -> None:
    first, second = (json.loads((folder / f"parts-{rank}.json").read_text()) for rank in range(2))
    assert first["groups"] == second["groups"] == ["", "blocks.0", "blocks.1"]
    mine, theirs = first["parts"], second["parts"]
    kinds = {name.partition("/")[0] for name in mine}
    own = {"momentum"} if kind == "muon" else set()
    assert kinds == {"weight", "gradient", "average", "length", "exp_avg", "exp_avg_sq"} | own
    whole = {name for name, (here, _) in mine.items() if here == -1}
    assert whole == {f"{part}/scale" for part in kinds - own}, "a scalar cannot be cut, all else is"
    for name, (here, total) in mine.items():
        assert theirs[name][1] == total
        if name not in whole:
            assert here + theirs[name][0] == total, f"{name}: no element twice, none missing"
    cut = [sizes for name, sizes in mine.items() if name not in whole]
    share = sum(here for here, _ in cut) / sum(total for _, total in cut)
    assert 0.49 < share < 0.53, "the uneven rows are the first process's"


def test_two_sharded_processes_train_like_one(folder: Path, kind: str) -> None:
    for step in (3, 6):
        same(checkpoint(folder / "one" / "c", step), checkpoint(folder / "two" / "c", step), ROUNDING[kind])
        snapshots = [load_file(folder / name / "e" / f"{step:08d}" / "net-0.1.safetensors") for name in ("one", "two")]
        for name, value in snapshots[0].items():
            torch.testing.assert_close(value, snapshots[1][name], rtol=1e-4, atol=ROUNDING[kind])
    one, two = logged(folder / "one"), logged(folder / "two")
    assert len(one) == len(two) > 6
    assert sum("held_out/loss" in line for line in one) == 4, "steps 0, 2, 4 and 6"
    for line, other in zip(one, two, strict=True):
        assert line == pytest.approx(other, rel=10 * ROUNDING[kind])


def test_a_checkpoint_survives_being_cut_bit_for_bit(folder: Path, kind: str) -> None:
    same(checkpoint(folder / "begun" / "c", 3), checkpoint(folder / "kept", 3))


def test_a_sharded_run_continues_bit_for_bit(folder: Path, kind: str) -> None:
    same(checkpoint(folder / "again" / "c", 6), checkpoint(folder / "two" / "c", 6))


def test_one_process_begins_and_two_sharded_ones_finish(folder: Path, kind: str) -> None:
    same(checkpoint(folder / "begun" / "c", 6), checkpoint(folder / "one" / "c", 6), ROUNDING[kind])


def test_two_sharded_processes_begin_and_one_finishes(folder: Path, toy, kind: str, tmp_path: Path) -> None:
    shutil.copytree(folder / "two" / "c" / "00000003", tmp_path / "c" / "00000003")
    loop = toy.toy_loop(tmp_path, kind, Accelerator(cpu=True))
    assert loop._restore() == 3
    save_checkpoint(tmp_path / "kept", loop.state.snapshot(3), Keep(9))
    same(checkpoint(tmp_path / "c", 3), checkpoint(tmp_path / "kept", 3))
    toy.toy_loop(tmp_path, kind, Accelerator(cpu=True)).run()
    same(checkpoint(tmp_path / "c", 6), checkpoint(folder / "one" / "c", 6), ROUNDING[kind])
