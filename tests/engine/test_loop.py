"""The loop on a toy task: cuts agree, a stopped run continues bit for bit, what is not finite is never saved."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_settings
from accelerate import Accelerator
from torch import Tensor, nn

from latentgen.core.errors import Interrupted, UserError
from latentgen.core.files import write_file
from latentgen.core.rand import Draw
from latentgen.data.loader import Cut, Loader
from latentgen.data.order import Shuffled
from latentgen.engine import checkpoint as checkpoints
from latentgen.engine.checkpoint import Checkpoint, load_newest, steps_in
from latentgen.engine.loop import Loop
from latentgen.engine.settings import StagePaths
from latentgen.engine.task import Phase

STEPS, BATCH = 7, 8
SETTINGS = replace(toy_settings.SETTINGS, steps=STEPS, schedule="cosine", log_every=3, keep_last=2, preview_every=4)


def fetch(draw: Draw) -> dict[str, Tensor]:
    return {"x": draw.normal("x", (2, 5, 5)), "y": draw.normal("y", (3,))}


class Toy:
    """A channels_last convolution that predicts noise, and a critic that starts at step 2."""

    name = "toy"

    def __init__(self, dropout: float = 0.0, bad_step: int | None = None) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Dropout(dropout), nn.Flatten(), nn.Linear(36, 3))
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.modules: dict[str, nn.Module] = {"net": net, "critic": nn.Linear(3, 1)}
        self.averaged: tuple[str, ...] = ("net",)
        self.bad_step = bad_step
        self.ran: list[tuple[int, str]] = []
        self.previews: list[int] = []

    def phases(self) -> tuple[Phase, ...]:
        return Phase("net", ("net",)), Phase("critic", ("critic",), start=2)

    def losses(self, phase: str, batch: Any, draw: Draw) -> dict[str, Tensor]:
        self.ran.append((draw.step, phase))
        out = self.modules["net"](batch["x"] + 0.1 * draw.normal("more", (2, 5, 5)))
        if phase == "critic":
            return {"loss": (self.modules["critic"](out.detach()) - 1).square().mean()}
        loss = (out - batch["y"]).square().mean() - 0.1 * self.modules["critic"](out).mean()
        return {"loss": loss * (float("nan") if draw.step == self.bad_step else 1), "size": out.abs().mean()}

    def preview(self, averaged: Mapping[str, nn.Module], step: int, folder: Path) -> dict[str, float]:
        self.previews.append(step)
        return {"weight": float(averaged["net"][3].weight.sum())}  # type: ignore[index]


class Kill(Exception):
    """Stands for a process that dies."""


class Dying:
    """Data that kill the process before, or ask it to stop in, the step `at`."""

    def __init__(self, data: Loader, at: int, *, ask: bool) -> None:
        self.data, self.at, self.ask = data, at, ask

    def iterate(self, start: int) -> Iterator[tuple[int, Any]]:
        for step, parts in self.data.iterate(start):
            if step == self.at:
                if not self.ask:
                    raise Kill
                signal.raise_signal(signal.SIGTERM)
            yield step, parts


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def loader(micro: int | None = None) -> Loader:
    return Loader(fetch, Shuffled(20), 0, "toy", Cut(BATCH, micro), STEPS)


def paths(folder: Path) -> StagePaths:
    return StagePaths(folder / "c", folder / "s", folder / "m.jsonl", folder / "tb")


def finished(folder: Path) -> Checkpoint:
    found = load_newest(folder / "c")
    assert found is not None
    assert found.step == STEPS
    return found


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "m.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "steps_per_second"} for line in found]


def flat(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {f"{group}/{key}": value for group, tensors in checkpoint.tensors.items() for key, value in tensors.items()}


def identical(first: Checkpoint, second: Checkpoint) -> list[str]:
    a, b = flat(first), flat(second)
    return sorted(
        name for name in a.keys() | b.keys() if name not in a or name not in b or not torch.equal(a[name], b[name])
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, accelerator: Accelerator) -> Path:
    """A run without interruption."""
    folder = tmp_path_factory.mktemp("reference")
    Loop(Toy(0.3), loader(4), SETTINGS, accelerator, paths(folder)).run()
    return folder


def test_the_whole_state_is_in_the_checkpoint(reference: Path) -> None:
    groups = finished(reference).tensors
    own = {"weights-net", "weights-critic", "ema-net", "optimizer-net", "optimizer-critic"}
    assert set(groups) == {*own, "meter", "spikes"}
    assert {name.split(".")[1] for name in groups["optimizer-net"]} == {"exp_avg", "exp_avg_sq", "step"}


LENGTHS = replace(SETTINGS, ema_lengths=(0.05, 0.2), ema_snapshots=2)


def with_snapshots(folder: Path) -> StagePaths:
    return replace(paths(folder), ema=folder / "e")


def test_averages_of_several_lengths_are_in_the_checkpoint_and_their_snapshots_beside_it(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    Loop(Toy(0.3), loader(4), LENGTHS, accelerator, with_snapshots(whole)).run()
    groups = finished(whole).tensors
    assert {"ema-net", "ema-net-0.05", "ema-net-0.2"} <= set(groups)
    assert not torch.equal(groups["ema-net-0.05"]["3.weight"], groups["ema-net-0.2"]["3.weight"])
    assert steps_in(whole / "e") == [2, 4, 6, 7]
    for at in (3, 5):
        with pytest.raises(Interrupted):
            Loop(Toy(0.3), Dying(loader(4), at, ask=True), LENGTHS, accelerator, with_snapshots(stopped)).run()
    Loop(Toy(0.3), loader(4), LENGTHS, accelerator, with_snapshots(stopped)).run()
    assert identical(finished(stopped), finished(whole)) == []
    for step in (2, 4, 6, 7):
        for name in ("net-0.05.safetensors", "net-0.2.safetensors", "state.json"):
            path = Path("e", f"{step:08d}", name)
            assert (stopped / path).read_bytes() == (whole / path).read_bytes()


def test_they_change_nothing_else(tmp_path: Path, reference: Path, accelerator: Accelerator) -> None:
    Loop(Toy(0.3), loader(4), LENGTHS, accelerator, with_snapshots(tmp_path)).run()
    added = [name for name in identical(finished(tmp_path), finished(reference)) if not name.startswith("ema-net-")]
    assert added == []
    assert lines(tmp_path) == lines(reference)


def test_a_bad_state_is_not_kept_as_a_snapshot(tmp_path: Path, accelerator: Accelerator) -> None:
    loop = Loop(Toy(), loader(), LENGTHS, accelerator, with_snapshots(tmp_path))
    (average, _) = loop.trained.lengths.averages.values()
    with torch.no_grad():
        average.averaged.get_parameter("0.weight")[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"the snapshot of step 2 is refused: .*0\.weight not finite"):
        loop.run()
    assert steps_in(tmp_path / "e") == []


@pytest.mark.parametrize("at", range(STEPS))
@pytest.mark.parametrize("ask", [True, False], ids=["asked", "killed"])
def test_a_run_stopped_at_any_step_continues_bit_for_bit(
    at: int, ask: bool, tmp_path: Path, reference: Path, accelerator: Accelerator
) -> None:
    settings = SETTINGS if ask else replace(SETTINGS, save_every=1)
    task = Toy(0.3)
    loop = Loop(task, Dying(loader(4), at, ask=ask), settings, accelerator, paths(tmp_path))
    with pytest.raises(Interrupted if ask else Kill):
        loop.run()
    assert steps_in(tmp_path / "c")[-1:] == ([at + 1] if ask else [at][: at > 0])
    torch.manual_seed(99)  # the second process starts with another stream
    again = Toy(0.3)
    Loop(again, loader(4), settings, accelerator, paths(tmp_path)).run()
    begun = at + 1 if ask else at
    assert [ran[0] for ran in again.ran][:1] == [begun][: begun < STEPS], "no step is trained twice"
    assert identical(finished(tmp_path), finished(reference)) == []
    assert lines(tmp_path) == lines(reference), "and the log has the same lines"


def test_a_damaged_checkpoint_costs_steps_not_the_result(
    tmp_path: Path, reference: Path, accelerator: Accelerator
) -> None:
    settings = replace(SETTINGS, save_every=2)
    with pytest.raises(Kill):
        Loop(Toy(0.3), Dying(loader(4), 5, ask=False), settings, accelerator, paths(tmp_path)).run()
    newest = tmp_path / "c" / "00000004" / "optimizer-net.safetensors"
    newest.write_bytes(newest.read_bytes()[:-3])
    Loop(Toy(0.3), loader(4), settings, accelerator, paths(tmp_path)).run()
    assert identical(finished(tmp_path), finished(reference)) == []
    assert lines(tmp_path) == lines(reference)


def test_a_finished_run_is_not_trained_again(tmp_path: Path, reference: Path, accelerator: Accelerator) -> None:
    shutil.copytree(reference, tmp_path / "copy")
    task = Toy(0.3)
    loop = Loop(task, loader(), SETTINGS, accelerator, paths(tmp_path / "copy"))
    loop.run()
    assert task.ran == []
    saved = finished(reference).tensors["ema-net"]
    assert all(torch.equal(value, saved[name]) for name, value in loop.averaged()["net"].state_dict().items())


def test_micro_batches_give_the_step_of_the_whole_batch(tmp_path: Path, accelerator: Accelerator) -> None:
    states = []
    for parts in (1, 2, 4):
        folder = tmp_path / str(parts)
        Loop(Toy(), loader(BATCH // parts), SETTINGS, accelerator, paths(folder)).run()
        states.append((finished(folder), lines(folder)))
    for state, log in states[1:]:
        for group in ("weights-net", "weights-critic", "ema-net"):
            for name, value in state.tensors[group].items():
                torch.testing.assert_close(value, states[0][0].tensors[group][name], rtol=1e-4, atol=1e-5)
        for line, first in zip(log, states[0][1], strict=True):
            assert line.keys() == first.keys()
            numbers = {k: v for k, v in first.items() if not isinstance(v, str)}
            assert {k: line[k] for k in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-5)


def test_both_phases_train_from_their_start(tmp_path: Path, accelerator: Accelerator) -> None:
    task = Toy()
    before = {name: {k: v.clone() for k, v in module.state_dict().items()} for name, module in task.modules.items()}
    with pytest.raises(Kill):
        Loop(Toy(), Dying(loader(), 2, ask=False), replace(SETTINGS, save_every=1), accelerator, paths(tmp_path)).run()
    early = load_newest(tmp_path / "c")
    assert early is not None
    assert all(torch.equal(early.tensors["weights-critic"][k], v) for k, v in before["critic"].items())
    assert not torch.equal(early.tensors["weights-net"]["3.weight"], before["net"]["3.weight"])
    Loop(task, loader(), SETTINGS, accelerator, paths(tmp_path)).run()
    assert task.ran == [(step, phase) for step in range(2, STEPS) for phase in ("net", "critic")]
    done = finished(tmp_path)
    assert not torch.equal(done.tensors["weights-critic"]["weight"], before["critic"]["weight"])
    assert float(done.tensors["optimizer-critic"]["0.step"]) == STEPS - 2
    train = [line for line in lines(tmp_path) if line["kind"] == "train"]
    assert {"loss", "size", "grad_norm", "critic/loss", "critic/grad_norm", "learning_rate"} <= set(train[-1])
    assert train[-1]["step"] == STEPS


def test_log_save_and_preview_come_when_they_should(tmp_path: Path, accelerator: Accelerator) -> None:
    task = Toy()
    Loop(task, loader(), replace(SETTINGS, save_every=2, keep_last=3), accelerator, paths(tmp_path)).run()
    assert steps_in(tmp_path / "c") == [4, 6, 7]
    assert task.previews == [0, 4, 7]
    assert [line["step"] for line in lines(tmp_path) if line["kind"] == "train"] == [3, 6, 7]
    assert [line["step"] for line in lines(tmp_path) if line["kind"] == "preview"] == [0, 4, 7]


def test_the_logged_loss_is_the_mean_since_the_last_line(tmp_path: Path, accelerator: Accelerator) -> None:
    for every, folder in ((1, tmp_path / "one"), (STEPS, tmp_path / "all")):
        Loop(Toy(), loader(), replace(SETTINGS, log_every=every), accelerator, paths(folder)).run()
    each = [line["loss"] for line in lines(tmp_path / "one") if line["kind"] == "train"]
    (mean,) = [line["loss"] for line in lines(tmp_path / "all") if line["kind"] == "train"]
    assert len(each) == STEPS
    assert mean == pytest.approx(sum(each) / STEPS, rel=1e-5)


def test_gradients_are_clipped(tmp_path: Path, accelerator: Accelerator) -> None:
    task = Toy()
    loop = Loop(task, loader(), replace(SETTINGS, grad_clip=1e-3), accelerator, paths(tmp_path))
    _, parts = next(iter(loader().iterate(0)))
    loop.step(0, parts)
    norm = torch.stack([p.grad.norm() for p in loop.trained.plain["net"].parameters() if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_a_step_that_is_not_finite_changes_nothing_and_is_named(tmp_path: Path, accelerator: Accelerator) -> None:
    loop = Loop(Toy(bad_step=3), loader(4), SETTINGS, accelerator, paths(tmp_path))
    seen = {}
    plain = loop.step

    def step(number: int, parts: Any) -> None:
        before = {k: v.clone() for k, v in flat(loop.state.snapshot(0)).items() if not k.startswith("meter/")}
        plain(number, parts)
        after = flat(loop.state.snapshot(0))
        seen[number] = [name for name, value in before.items() if not torch.equal(value, after[name])]

    loop.step = step  # type: ignore[method-assign]
    loop.run()
    assert seen[3] == ["spikes/in_row"]
    assert all(seen[number] for number in range(STEPS) if number != 3)
    assert all(bool(value.isfinite().all()) for value in flat(finished(tmp_path)).values())
    (note,) = [line for line in lines(tmp_path) if line["kind"] == "guard"]
    named = [index for draw, _ in dict(loader(4).iterate(0))[3] for index in draw.indices]
    assert (note["step"], note["what"], note["phase"], note["examples"]) == (4, "loss", "net", named)


def test_too_many_in_a_row_end_the_run_with_nothing_bad_saved(tmp_path: Path, accelerator: Accelerator) -> None:
    task = Toy()
    loop = Loop(task, loader(), replace(SETTINGS, bad_steps=3, save_every=2), accelerator, paths(tmp_path))
    with torch.no_grad():
        loop.trained.plain["net"][3].weight[0, 0] = float("nan")  # type: ignore[index]
    with pytest.raises(FloatingPointError, match=r"not\s+finite|refused"):
        loop.run()
    assert steps_in(tmp_path / "c") == []


def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, accelerator: Accelerator, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, blocks: Any) -> str:
        if "00000004" in str(path):
            raise OSError(28, "No space left on device")
        return write_file(path, blocks)

    settings = replace(SETTINGS, save_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_file", full)
        with pytest.raises(UserError, match=r"of step 4 could not be written: No space left .* step 2 is untouched"):
            Loop(Toy(0.3), loader(4), settings, accelerator, paths(tmp_path)).run()
    assert steps_in(tmp_path / "c") == [2]
    Loop(Toy(0.3), loader(4), settings, accelerator, paths(tmp_path)).run()
    assert identical(finished(tmp_path), finished(reference)) == []
