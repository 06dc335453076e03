"""Stopped after any step, once or several times, a run goes on in the same bits; and this test would see it if not.

The U-Net's stage of a whole recipe: 24 steps, 3 epochs. Each run is one in this process, with a real signal, real files
and, where asked for, real workers. Held to be equal are every file of every checkpoint that both runs write, the loss
of every step, and the log.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from latentgen.core.errors import Interrupted
from latentgen.data.frame import Shape
from latentgen.engine.checkpoint import Checkpoint
from latentgen.engine.guard import Guard
from latentgen.engine.loop import Loop
from latentgen.engine.saver import Saver
from latentgen.engine.step import Stepper
from latentgen.recipe.load import load_recipe
from latentgen.recipe.plan import Plan, make_plan
from latentgen.recipe.run import Run
from latentgen.recipe.schema import Recipe

STEPS, EPOCH, BAD = 24, 8, 3
"""Steps of a run, steps of an epoch, and a step (from 0) whose loss is made infinite, so that the guard has something
to remember."""
SHAPES = [(workers, parts) for workers in (0, 2) for parts in (1, 3)]
"""(data workers, micro-batches of a step)"""
SEVERAL = [(4, 9), (8, 16), (1, 2), (23, 24), (3, 11, 20), (7, 8, 9), (1, 12, 23)]

RECIPE = """\
name: stopped
seed: 3
data: {{size: 96, captions: 2, holdout: 9, flip: true, workers: {workers}, cache: {folder}/cache}}
autoencoder: {{from: {model}}}
text_encoder: {{from: {model}}}
unet: {{channels: [8, 8], layers_per_block: 1, heads: 2, norm_groups: 4, dropout: 0.1}}
diffusion: {{caption_dropout: 0.3, balanced: true}}
train: {{steps: 24, global_batch: 12, micro_batch: {micro}, warmup_steps: 2, log_every: 5, save_every: 4, keep_last: 99,
  validate_every: 8, ema_lengths: [0.1], ema_snapshots: 7, trackers: []}}
preview: {{every: 100, num: 1, num_inference_steps: 1, prompts: ["a red circle"]}}
"""


@dataclass
class Story:
    """What a run did, over all its starts."""

    folder: Path
    losses: dict[int, str] = field(default_factory=dict)

    def files(self, step: int) -> dict[str, str]:
        """Of a checkpoint: file -> SHA-256."""
        manifest = json.loads((self.checkpoints / f"{step:08d}" / "manifest.json").read_text())
        return {name: about["sha256"] for name, about in manifest["files"].items()}

    @property
    def checkpoints(self) -> Path:
        return self.folder / "runs/stopped/checkpoints/unet"

    def steps(self) -> set[int]:
        return {int(path.name) for path in self.checkpoints.iterdir()}

    def log(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.folder / "runs/stopped/metrics.jsonl").read_text().splitlines()]
        return sorted(
            ({k: v for k, v in line.items() if k != "steps_per_second"} for line in lines),
            key=lambda line: (line["kind"], line["step"]),
        )


Runner = Callable[..., Story]


@pytest.fixture(scope="module")
def runner(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """Trains the recipe, stopped after the steps given, and tells what happened."""
    cache = tmp_path_factory.mktemp("shared")
    patch = pytest.MonkeyPatch()
    story: Story
    stop_after: int | None = None
    plain_judge, plain_call = Guard.judge, Stepper.__call__

    def judge(self: Guard, step: int, phase: str, names: Any, losses: Sequence[Tensor], *rest: Any) -> Tensor:
        if step == BAD:
            losses = [loss * float("inf") for loss in losses]
        told = " ".join(float(loss).hex() for loss in losses)
        assert story.losses.setdefault(step, told) == told or step not in seen, step
        seen.add(step)
        story.losses[step] = told
        return plain_judge(self, step, phase, names, losses, *rest)

    def call(self: Stepper, step: int, micro_batches: Any) -> None:
        plain_call(self, step, micro_batches)
        if step + 1 == stop_after:
            signal.raise_signal(signal.SIGTERM)

    def plan_once(recipe: Recipe, shapes: Mapping[Shape, int]) -> Plan:
        """Counting FLOP takes longer than training here, and is the same every time."""
        if not plans:
            plans.append(make_plan(recipe, shapes))
        return plans[0]

    seen: set[int] = set()
    plans: list[Plan] = []
    patch.setattr("latentgen.recipe.run.make_plan", plan_once)
    patch.setattr(Guard, "judge", judge)
    patch.setattr(Stepper, "__call__", call)

    def run(folder: Path, workers: int, parts: int, stops: Sequence[int] = ()) -> Story:
        nonlocal story, stop_after
        recipe = folder / "recipe.yaml"
        recipe.write_text(RECIPE.format(workers=workers, micro=12 // parts, folder=cache, model=model))
        story = Story(folder)
        for stop_after in (*stops, None):
            seen.clear()
            trained = Run(load_recipe(recipe, []), folder / "runs", "cpu")
            if stop_after is None:
                trained.train()
            else:
                with pytest.raises(Interrupted, match=f"after (step {stop_after}|the last step) of"):
                    trained.train()
        return story

    yield run
    patch.undo()


@pytest.fixture(scope="module")
def reference(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Story]:
    """The run that is never stopped, by its number of micro-batches; workers change nothing, as is tested."""
    found: dict[int, Story] = {}

    def get(parts: int) -> Story:
        if parts not in found:
            found[parts] = runner(tmp_path_factory.mktemp(f"whole{parts}"), 0, parts)
        return found[parts]

    return get


def differences(found: Story, whole: Story) -> set[str]:
    """What is not equal: `losses`, `log`, and names of a checkpoint's files; empty when all is."""
    common = found.steps() & whole.steps()
    assert {4, 8, 12, 16, 20, 24} <= common
    wrong = {
        name
        for step in common
        for name in found.files(step).keys() | whole.files(step).keys()
        if found.files(step).get(name) != whole.files(step).get(name)
    }
    if found.losses != whole.losses:
        wrong.add("losses")
    if found.log() != whole.log():
        wrong.add("log")
    return wrong


@pytest.mark.parametrize(("workers", "parts"), SHAPES)
def test_stopped_after_any_one_step(workers: int, parts: int, runner: Runner, reference: Any, tmp_path: Path) -> None:
    whole = reference(parts)
    assert len(whole.losses) == STEPS
    assert "inf" in whole.losses[BAD]
    for stop in range(1, STEPS + 1):
        folder = tmp_path / str(stop)
        folder.mkdir()
        found = runner(folder, workers, parts, [stop])
        assert stop in found.steps(), "saved where it was stopped"
        assert differences(found, whole) == set(), stop


@pytest.mark.parametrize("stops", SEVERAL, ids=str)
@pytest.mark.parametrize("parts", [1, 3])
def test_stopped_several_times(
    parts: int, stops: tuple[int, ...], runner: Runner, reference: Any, tmp_path: Path
) -> None:
    found = runner(tmp_path, 0, parts, stops)
    assert set(stops) <= found.steps()
    assert differences(found, reference(parts)) == set()


def items(checkpoint: Checkpoint) -> set[tuple[str, str]]:
    """All that a checkpoint remembers: groups of tensors (of an optimizer each kind of state), and plain data."""
    found = {("step", "")}
    for group, tensors in checkpoint.tensors.items():
        kinds = {name.partition(".")[2] for name in tensors} if group.startswith("optimizer-") else {""}
        found |= {(group, kind) for kind in kinds}
    return found | {("data", name) for name, value in checkpoint.data.items() if value is not None}


def without(checkpoint: Checkpoint, begun: Checkpoint, item: tuple[str, str]) -> Checkpoint:
    """The checkpoint with one item as it was before the first step."""
    group, kind = item
    if item == ("step", ""):
        return Checkpoint(begun.step, checkpoint.tensors, checkpoint.data)
    if group == "data":
        return Checkpoint(checkpoint.step, checkpoint.tensors, {**checkpoint.data, kind: begun.data[kind]})
    before = begun.tensors.get(group, {})
    if group.startswith("optimizer-"):
        tensors = {
            name: torch.zeros_like(value) if name.partition(".")[2] == kind else value
            for name, value in checkpoint.tensors[group].items()
        }
    else:
        tensors = {name: value.clone() for name, value in before.items()}
    return Checkpoint(checkpoint.step, {**checkpoint.tensors, group: tensors}, checkpoint.data)


def test_nothing_can_be_left_out(
    runner: Runner, reference: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One state item after the other is left out of what is restored: each time the comparison says so."""
    whole, stop = reference(1), 18
    begun: list[Checkpoint] = []
    leave: tuple[str, str] | None = None
    known: set[tuple[str, str]] = set()
    plain_load = Saver.load

    def load(self: Saver, wanted: Any) -> Checkpoint | None:
        found = plain_load(self, wanted)
        if found is None:
            return None
        known.update(items(found))
        return found if leave is None else without(found, begun[0], leave)

    plain_restore = Loop._restore

    def restore(self: Loop) -> int:
        if not begun:
            first = self.state.snapshot(0)
            copies = {group: {k: v.clone() for k, v in tensors.items()} for group, tensors in first.tensors.items()}
            begun.append(Checkpoint(0, copies, first.data))
        return plain_restore(self)

    monkeypatch.setattr(Saver, "load", load)
    monkeypatch.setattr(Loop, "_restore", restore)

    def stopped(name: str) -> set[str]:
        folder = tmp_path / name
        folder.mkdir()
        return differences(runner(folder, 0, 1, [stop]), whole)

    assert stopped("nothing") == set()
    assert {group for group, _ in known} >= {
        "step", "weights-unet", "weights-log_variance", "ema-unet", "ema-unet-0.1", "optimizer-unet", "meter",
        "validation", "data",
    }  # fmt: skip
    assert {kind for group, kind in known if group == "optimizer-unet"} == {"exp_avg", "exp_avg_sq", "step"}
    for leave in sorted(known):
        assert stopped("-".join(leave).replace("/", "_")), f"{leave} may be left out unseen"
