"""The held-out loss: what is measured, that it is the same every time, and that training does not feel it."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_settings
from accelerate import Accelerator
from hypothesis import given
from hypothesis.strategies import integers, sets
from torch import Tensor, nn

from latentgen.core.errors import Interrupted
from latentgen.core.rand import Draw
from latentgen.data.loader import Cut, Loader
from latentgen.data.order import Shuffled
from latentgen.engine.checkpoint import Checkpoint, Keep, load_newest, save_checkpoint
from latentgen.engine.loop import Loop
from latentgen.engine.settings import StagePaths
from latentgen.engine.task import Phase
from latentgen.engine.validation import FixedExamples, Validation, _batches

STEPS, EVERY, COUNT = 7, 2, 10
SETTINGS = replace(
    toy_settings.SETTINGS, steps=STEPS, warmup_steps=0, weight_decay=0.0, grad_clip=1.0, log_every=3, keep_last=2
)


class Toy:
    """A line through noise, with dropout; example i has the slope i."""

    name = "toy"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.modules: dict[str, nn.Module] = {"net": nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))}
        self.averaged: tuple[str, ...] = ("net",)
        self.measured: list[tuple[int, tuple[int, ...]]] = []

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("net", ("net",)),)

    def losses(self, phase: str, batch: Tensor, draw: Draw) -> dict[str, Tensor]:
        return {"loss": (self.modules["net"](draw.normal("x", (3,)))[:, 0] - batch).square().mean()}

    def preview(self, averaged: Mapping[str, nn.Module], step: int, folder: Path) -> dict[str, float]:
        return {}

    def measure(self, averaged: Mapping[str, nn.Module], batch: Tensor, draw: Draw) -> dict[str, Tensor]:
        self.measured.append((draw.step, draw.indices))
        error = (averaged["net"](draw.normal("x", (3,)))[:, 0] - batch).square()
        return {"loss": error * (1 + draw.step), "error": error}


def fetch(draw: Draw) -> Tensor:
    return torch.tensor(draw.indices, dtype=torch.float32) / 10


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def validation(task: Toy, batch: int = 4, **more: Any) -> Validation:
    held_out, seen = (FixedExamples(fetch, tuple(range(at, at + COUNT))) for at in (20, 0))
    return Validation(task.measure, held_out, seen, seed=3, stage="toy", every=EVERY, parts=2, batch=batch, **more)


def loop(folder: Path, accelerator: Accelerator, *, measured: bool = True, data: Any = None, **changes: Any) -> Loop:
    task = Toy()
    paths = StagePaths(folder / "c", folder / "s", folder / "m.jsonl", folder / "tb")
    found = validation(task) if measured else None
    data = data or Loader(fetch, Shuffled(20), 0, "toy", Cut(4), STEPS)
    return Loop(task, data, replace(SETTINGS, **changes), accelerator, paths, validation=found)


def lines(folder: Path, kind: str = "validation") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "m.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def flat(folder: Path) -> dict[str, Tensor]:
    found = load_newest(folder / "c")
    assert found is not None
    assert found.step == STEPS
    return {f"{group}/{key}": value for group, tensors in found.tensors.items() for key, value in tensors.items()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, accelerator: Accelerator) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    loop(folder, accelerator).run()
    return folder


def test_the_weights_are_those_of_a_run_without(reference: Path, tmp_path: Path, accelerator: Accelerator) -> None:
    loop(tmp_path, accelerator, measured=False).run()
    plain, watched = flat(tmp_path), flat(reference)
    assert {name for name in watched if name not in plain} >= {"validation/scores", "validation/seen"}
    for name, value in plain.items():
        assert torch.equal(value, watched[name]), name
    assert lines(tmp_path) == []
    without_speed = [
        [{k: v for k, v in line.items() if k != "steps_per_second"} for line in lines(folder, "train")]
        for folder in (tmp_path, reference)
    ]
    assert without_speed[0] == without_speed[1]


def test_global_random_state_is_not_touched(accelerator: Accelerator) -> None:
    task = Toy()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    networks = {"net": task.modules["net"].eval()}
    first = validation(task).run(networks, 0, accelerator)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert validation(task).run(networks, 0, accelerator) == first, "and what it holds does not matter"


def test_it_is_measured_at_the_start_as_often_as_asked_and_at_the_end(reference: Path) -> None:
    assert [line["step"] for line in lines(reference)] == [0, 2, 4, 6, 7]


def test_values_are_means_with_their_standard_errors(accelerator: Accelerator) -> None:
    """Written out: both parts of the 10 held-out and the 10 training examples, with one network."""
    task = Toy()
    net = task.modules["net"].eval()
    found = validation(task).run({"net": net}, 0, accelerator)
    assert found is not None
    each = {}
    for name, first in (("held_out", 20), ("seen", 0)):
        parts = []
        for part in range(2):
            draw = Draw(3, "toy validation", part, COUNT, range(COUNT))
            with torch.no_grad():
                out = net(draw.normal("x", (3,)))[:, 0]
            parts.append((out - torch.arange(first, first + COUNT) / 10).square().double())
        error, loss = (parts[0] + parts[1]) / 2, (parts[0] + 2 * parts[1]) / 2
        each[name] = loss
        expected = {"loss": loss, "error": error, "error/1": parts[0], "error/2": parts[1]}
        for key, values in expected.items():
            assert found[f"{name}/{key}"] == pytest.approx(float(values.mean()), rel=1e-5)
            assert found[f"{name}/{key}_se"] == pytest.approx(float(values.std()) / COUNT**0.5, rel=1e-5)
    gap = each["held_out"] - each["seen"]
    assert found["gap"] == pytest.approx(float(gap.mean()), rel=1e-4)
    assert found["gap_se"] == pytest.approx(float(gap.std()) / COUNT**0.5, rel=1e-4), "the noise they share cancels"
    assert found["parting"] == 0
    assert set(found) == {
        f"{name}/{key}{se}" for name in each for key in ("loss", "error", "error/1", "error/2") for se in ("", "_se")
    } | {"gap", "gap_se", "parting"}


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_batches_do_not_matter(batch: int, accelerator: Accelerator) -> None:
    task = Toy()
    networks = {"net": task.modules["net"].eval()}
    whole = validation(task).run(networks, 0, accelerator)
    assert validation(task, batch).run(networks, 0, accelerator) == pytest.approx(whole, rel=1e-5)
    assert max(len(indices) for _, indices in task.measured) <= max(batch, 4)


@pytest.mark.parametrize(("count", "size", "world"), [(10, 4, 1), (10, 4, 2), (10, 2, 3), (5, 4, 8), (9, 2, 4)])
def test_every_position_belongs_to_one_process_and_all_ask_as_often(count: int, size: int, world: int) -> None:
    shares = _batches(count, size, world)
    assert [row for batches in shares for batch in batches for row in batch] == list(range(count))
    assert max(map(len, shares)) == len(shares[0])
    assert all(0 < len(batch) <= size for batches in shares for batch in batches)


@given(integers(1, 30), integers(1, 8), integers(1, 4), sets(integers(1, 30)))
def test_no_batch_reaches_over_a_border(count: int, size: int, world: int, borders: set[int]) -> None:
    shares = _batches(count, size, world, sorted(borders))
    assert len(shares) == world
    assert [row for batches in shares for batch in batches for row in batch] == list(range(count))
    assert all(0 < len(batch) <= size for batches in shares for batch in batches)
    assert not any(batch.start < at < batch.stop for batches in shares for batch in batches for at in borders)


class Dying:
    """Data that end the process before step `at`: by an exception, or by a signal."""

    def __init__(self, at: int, *, ask: bool) -> None:
        self.at, self.ask = at, ask

    def iterate(self, start: int) -> Iterator[tuple[int, Any]]:
        for step, parts in Loader(fetch, Shuffled(20), 0, "toy", Cut(4), STEPS).iterate(start):
            if step == self.at:
                if not self.ask:
                    raise RuntimeError("killed")
                signal.raise_signal(signal.SIGTERM)
            yield step, parts


@pytest.mark.parametrize("at", range(STEPS))
@pytest.mark.parametrize("ask", [True, False], ids=["asked", "killed"])
def test_a_stopped_run_says_the_same_once(
    at: int, ask: bool, tmp_path: Path, reference: Path, accelerator: Accelerator
) -> None:
    changes = {} if ask else {"save_every": 3}
    with pytest.raises(Interrupted if ask else RuntimeError):
        loop(tmp_path, accelerator, data=Dying(at, ask=ask), **changes).run()
    loop(tmp_path, accelerator, **changes).run()
    assert lines(tmp_path) == lines(reference)
    found, expected = flat(tmp_path), flat(reference)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_signal_ends_a_validation_which_is_made_up_for(
    tmp_path: Path, reference: Path, accelerator: Accelerator
) -> None:
    stopped = loop(tmp_path, accelerator)
    task = stopped.task
    assert isinstance(task, Toy)
    plain = stopped.validation.measure  # type: ignore[union-attr]

    def measure(*args: Any) -> dict[str, Tensor]:
        if len(task.measured) == 12 + 5:  # the second of two validations of 12 batches has begun
            signal.raise_signal(signal.SIGTERM)
        return plain(*args)

    stopped.validation.measure = measure  # type: ignore[union-attr]
    with pytest.raises(Interrupted, match="step 2"):
        stopped.run()
    assert len(task.measured) == 12 + 6, "no further batch"
    assert [line["step"] for line in lines(tmp_path)] == [0]
    loop(tmp_path, accelerator).run()
    assert lines(tmp_path) == lines(reference)


def test_scores_are_there_to_keep_the_best_by(reference: Path, tmp_path: Path, accelerator: Accelerator) -> None:
    again = loop(reference, accelerator)
    assert again.validation is not None
    assert again.validation.score is None
    again._restore()
    measured = lines(reference)
    best = min(measured, key=lambda line: line["held_out/loss"])
    for score, line in ((again.validation.score, measured[-1]), (again.validation.best, best)):
        assert score is not None
        assert (score.step, score.loss, score.error) == (line["step"], line["held_out/loss"], line["held_out/loss_se"])
    assert best["step"] != 0, "it learned something"
    found = [json.loads((path / "manifest.json").read_text()) for path in sorted((reference / "c").iterdir())]
    known = {line["step"]: line["held_out/loss"] for line in measured}
    assert {manifest["step"]: manifest["score"] for manifest in found} == {
        manifest["step"]: known.get(manifest["step"]) for manifest in found
    }
    assert any(manifest["score"] is not None for manifest in found)


def test_validation_may_be_asked_for_later(tmp_path: Path, reference: Path, accelerator: Accelerator) -> None:
    with pytest.raises(Interrupted):
        loop(tmp_path, accelerator, measured=False, data=Dying(3, ask=True)).run()
    loop(tmp_path, accelerator).run()
    assert lines(tmp_path) == lines(reference)[2:], "step 4, where it went on, and the later ones"


def test_learning_by_heart_is_warned_of(accelerator: Accelerator, caplog: pytest.LogCaptureFixture) -> None:
    """Losses that are made up: held-out ones rise, training ones fall."""
    at = 0

    def measure(averaged: Mapping[str, nn.Module], batch: Tensor, draw: Draw) -> dict[str, Tensor]:
        held_out = batch >= 2
        return {"loss": torch.where(held_out, 2 + 0.1 * at, 2 - 0.1 * at) + 0.1 * torch.sin(37 * batch)}

    examples = [FixedExamples(fetch, tuple(range(first, first + 16))) for first in (20, 0)]
    watch = Validation(measure, *examples, seed=0, stage="toy", every=1)
    counts = []
    for at in range(9):
        found = watch.run({}, at, accelerator)
        assert found is not None
        counts.append(found["parting"])
    assert counts == [0, 0, 0, 1, 2, 3, 4, 5, 6]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "toy, step 5" in warnings[0]
    assert "by heart" in warnings[0]
    assert watch.best is not None
    assert watch.best.step == 0


def test_the_state_round_trip(tmp_path: Path, accelerator: Accelerator) -> None:
    task = Toy()
    networks = {"net": task.modules["net"].eval()}
    first, second, fresh = validation(task), validation(task), validation(task)
    first.load_state_dict(fresh.state_dict())
    assert first.score is None
    for step in (0, 2):
        first.run(networks, step, accelerator)
    save_checkpoint(tmp_path, Checkpoint(2, {"validation": first.state_dict()}, {}), Keep(1))
    found = load_newest(tmp_path)
    assert found is not None
    second.load_state_dict(found.tensors["validation"])
    assert (second.score, second.best) == (first.score, first.best)
    assert second.run(networks, 4, accelerator) == first.run(networks, 4, accelerator)
    assert not first.due(4, 100)
    assert first.due(6, 100)
    assert first.due(101, 101)
    assert not first.due(7, 100)
