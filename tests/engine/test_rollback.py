"""Weights that have gone bad: back to the good state, once; and a stop at any step changes nothing of it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from faulty import Fault, data, faulty_loop, leave_out, lines, state
from torch import Tensor

from latentgen.core.errors import Interrupted
from latentgen.engine import optim, spikes
from latentgen.engine.checkpoint import load_newest, steps_in
from latentgen.engine.loop import Loop
from latentgen.engine.rollback import GOOD
from latentgen.engine.state import State

STEPS, BAD, GOOD_AT, BACK = 24, 10, 8, 16
"""The weights go bad in step 11; the state of step 8 is the last good one; at 16 five steps and more were bad."""

LATER = {"steps": STEPS, "rollback_every": 4, "learning_rate": 0.002, "ema_lengths": ()}
FAULT = Fault("weight", BAD, 50.0)


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six losses are enough to know."""
    monkeypatch.setattr(spikes, "WARM", 6)


class Stopping:
    """Data in whose step `at` a signal comes."""

    def __init__(self, inner: Any, at: int) -> None:
        self.inner, self.at = inner, at

    def iterate(self, start: int) -> Iterator[tuple[int, Any]]:
        for step, parts in self.inner.iterate(start):
            if step == self.at:
                signal.raise_signal(signal.SIGTERM)
            yield step, parts


def saved(folder: Path) -> dict[str, Tensor]:
    found = load_newest(folder / "c")
    assert found is not None
    assert found.step == STEPS
    return {f"{group}/{name}": value for group, own in found.tensors.items() for name, value in own.items()}


def different(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    names = first.keys() | second.keys()
    return sorted(n for n in names if n not in first or n not in second or not torch.equal(first[n], second[n]))


@pytest.fixture(scope="module")
def whole(accelerator: Accelerator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that goes back, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spikes, "WARM", 6)
        faulty_loop(folder, accelerator, FAULT, save_every=1, **LATER).run()
    return folder


def test_it_goes_back_and_the_batches_since_are_left_out(accelerator: Accelerator, whole: Path, tmp_path: Path) -> None:
    notes = lines(whole, "guard")
    assert [note["step"] for note in notes] == [*range(BAD + 1, BACK + 1), BACK]
    assert {note["what"] for note in notes[:-1]} == {"spike"}
    assert (notes[-1]["what"], notes[-1]["to"], notes[-1]["bad"]) == ("rollback", GOOD_AT, BACK - BAD)
    loop = faulty_loop(tmp_path, accelerator, **LATER)
    leave_out(loop, set(range(GOOD_AT, BACK)))
    loop.run()
    assert different(saved(whole), saved(tmp_path)) == []
    groups = {name.partition("/")[0] for name in saved(whole)}
    assert {GOOD + "weights-net", GOOD + "ema-net", GOOD + "optimizer-critic", GOOD + "spikes"} <= groups


@pytest.mark.parametrize("stops", [[BAD - 1], [BAD], [BAD + 2], [BACK - 2], [BACK - 1], [BACK], [7, 12, 18]])
def test_stopped_anywhere_it_decides_the_same(
    stops: list[int], accelerator: Accelerator, whole: Path, tmp_path: Path
) -> None:
    for at in stops:
        loop = faulty_loop(tmp_path, accelerator, FAULT, **LATER)
        loop.data = Stopping(loop.data, at)
        with pytest.raises(Interrupted):
            loop.run()
    faulty_loop(tmp_path, accelerator, FAULT, **LATER).run()
    assert different(saved(tmp_path), saved(whole)) == []
    assert lines(tmp_path) == lines(whole)


LEFT_OUT: dict[str, Any] = {
    "the good state": lambda tensors: {k: v for k, v in tensors.items() if not k.startswith(GOOD)},
    "what losses were": lambda tensors: {k: v for k, v in tensors.items() if k != "spikes"},
}


@pytest.mark.parametrize("what", LEFT_OUT)
def test_a_checkpoint_without_it_would_be_found_out(
    what: str, accelerator: Accelerator, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = State.restore

    def restore(self: State, found: Any) -> None:
        found.tensors = LEFT_OUT[what](found.tensors)
        if what == "the good state":
            found.data["good"] = None
        plain(self, found)

    monkeypatch.setattr(State, "restore", lambda self, found: restore(self, Loose(found)))
    loop = faulty_loop(tmp_path, accelerator, FAULT, **LATER)
    loop.data = Stopping(loop.data, BAD + 1)
    with pytest.raises(Interrupted):
        loop.run()
    try:
        faulty_loop(tmp_path, accelerator, FAULT, **LATER).run()
        found = different(saved(tmp_path), saved(whole))
    except FloatingPointError as error:
        found = [str(error)]
    assert found


class Loose:
    """A checkpoint that may be changed."""

    def __init__(self, found: Any) -> None:
        self.step, self.tensors, self.data = found.step, found.tensors, found.data


def test_how_often_one_looks_changes_nothing(accelerator: Accelerator, whole: Path, tmp_path: Path) -> None:
    loop = faulty_loop(tmp_path, accelerator, FAULT, log_every=24, **LATER)
    loop.guard.host = False
    loop.run()
    names = [name for name in different(saved(tmp_path), saved(whole)) if not name.startswith("meter/")]
    # AdamW's moments exist from a skipped first step on where nobody reads the verdict; here no step is the first.
    assert names == []
    assert lines(tmp_path, "guard") == lines(whole, "guard")


def test_a_second_time_to_the_same_state_is_one_too_many(accelerator: Accelerator, tmp_path: Path) -> None:
    reports: list[int] = []
    faults = [FAULT, Fault("weight", BACK + 1, 50.0)]
    loop = faulty_loop(tmp_path, accelerator, *faults, on_preview=lambda: reports.append(1), save_every=1, **LATER)
    with pytest.raises(FloatingPointError, match=f"going back to the state of step {GOOD_AT} does not help"):
        loop.run()
    notes = lines(tmp_path, "guard")
    assert [note["what"] for note in notes].count("rollback") == 1
    assert notes[-1]["step"] == STEPS, "said before it stopped"
    assert reports


def test_after_good_steps_it_may_go_back_again(accelerator: Accelerator, tmp_path: Path) -> None:
    faults = [FAULT, Fault("weight", 22, 50.0)]
    settings = {**LATER, "steps": 32}
    faulty_loop(tmp_path, accelerator, *faults, **settings).run()
    back = [(note["step"], note["to"]) for note in lines(tmp_path, "guard") if note["what"] == "rollback"]
    assert back == [(BACK, GOOD_AT), (28, 20)]


def test_without_it_the_new_level_is_accepted(accelerator: Accelerator, tmp_path: Path) -> None:
    settings = {**LATER, "rollback_every": None}
    loop = faulty_loop(tmp_path, accelerator, FAULT, **settings)
    loop.run()
    notes = lines(tmp_path, "guard")
    assert [note["step"] for note in notes] == list(range(BAD + 1, BAD + 1 + spikes.IN_ROW))
    assert [note["anew"] for note in notes] == [False] * (spikes.IN_ROW - 1) + [True]
    assert all(float(note["loss"]) > note["limit"] for note in notes)
    assert not any(name.startswith(GOOD) for name in saved(tmp_path))


def test_one_spike_is_skipped_with_its_batch_and_named(accelerator: Accelerator, tmp_path: Path) -> None:
    fault, settings = Fault("loss", 12, 1e4), {**LATER, "rollback_every": None}
    bad = faulty_loop(tmp_path / "bad", accelerator, fault, micro=4, **settings)
    good = faulty_loop(tmp_path / "good", accelerator, micro=4, **settings)
    leave_out(good, {12})
    bad.run(), good.run()
    assert different(state(bad), state(good)) == []
    assert lines(tmp_path / "bad", "train") == lines(tmp_path / "good", "train")
    (note,) = lines(tmp_path / "bad", "guard")
    examples = [index for draw, _ in dict(data(accelerator, STEPS).iterate(0))[12] for index in draw.indices]
    assert (note["what"], note["step"], note["examples"]) == ("spike", 13, examples[:4])
    off = faulty_loop(tmp_path / "off", accelerator, fault, micro=4, **{**settings, "spikes": None})
    off.run()
    assert lines(tmp_path / "off", "guard") == []


def test_snapshots_of_steps_undone_go(accelerator: Accelerator, tmp_path: Path) -> None:
    settings = {**LATER, "ema_lengths": (0.1,), "ema_snapshots": 2}
    faulty_loop(tmp_path, accelerator, FAULT, **settings).run()
    assert steps_in(tmp_path / "e") == [2, 4, 6, 8, 16, 18, 20, 22, 24]


def test_an_unused_weight_that_is_not_finite_is_no_good_state(accelerator: Accelerator, tmp_path: Path) -> None:
    loop = faulty_loop(tmp_path, accelerator, **LATER)
    assert isinstance(loop, Loop)
    loop.task.plain["critic"].bias.data.fill_(float("nan"))  # type: ignore[attr-defined]
    loop.task.losses = lambda phase, batch, draw: {  # type: ignore[method-assign]
        "loss": loop.task.modules["net"](batch["x"]).square().mean()
        + sum((p * 0).nan_to_num().sum() for p in loop.task.plain["critic"].parameters())  # type: ignore[attr-defined]
    }
    with pytest.raises(FloatingPointError, match=r"good state of step 4 is refused: weights-critic/bias"):
        loop.run()


def test_what_is_put_back_is_a_copy(accelerator: Accelerator, tmp_path: Path) -> None:
    """Optimizers count their steps in place."""
    loop = faulty_loop(tmp_path, accelerator, **{**LATER, "steps": 8})
    loop.run()
    groups = {group: {k: v.clone() for k, v in own.items()} for group, own in loop.state.groups().items()}
    before = {group: {k: v.clone() for k, v in own.items()} for group, own in groups.items()}
    loop.state.put(groups)
    for number, parts in data(accelerator, 8).iterate(6):
        loop.step(number, parts)
    assert all(torch.equal(v, before[group][k]) for group, own in groups.items() for k, v in own.items())
    assert "0.step" in optim.flatten(loop.trained.optimizers["net"].optimizer)
