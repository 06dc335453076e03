"""A run folder, read for its report: also one that is being written, was left by a crash, or is from an older version.

Nothing here knows which measurements there are. Whatever numbers metrics.jsonl holds are curves; lines of kinds that
are not measured regularly are events.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from latentgen.core.errors import UserError
from latentgen.core.runfolder import RunFolder

REGULAR = ("train", "validation", "preview")
"""Kinds of lines that are curves; all others are events."""

NAMES = {"vae": "Autoencoder", "clip": "Text encoder", "unet": "U-Net"}
ORDER = tuple(NAMES)
SECTIONS = {"vae": "autoencoder", "clip": "text_encoder"}
KNOWN_FOLDERS = {"checkpoints", "samples", "stages", "model", "control", "tensorboard", "trackers"}


@dataclass(frozen=True)
class Series:
    """One measurement over steps, ascending; numbers only."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Stage:
    """What was measured in one stage.

    Args:
        total: steps that the recipe asks for; None where it does not say.
        batch: examples a step.
        curves: kind -> measurement -> series.
        done: whether its result is there.
    """

    name: str
    total: int | None
    batch: int | None
    curves: dict[str, dict[str, Series]]
    done: bool

    @property
    def step(self) -> int:
        """The last step with a line."""
        return max((series.steps[-1] for kind in self.curves.values() for series in kind.values()), default=0)

    @property
    def seconds(self) -> float:
        """Time spent in steps: without previews, saves and what was done twice."""
        speed = self.curves.get("train", {}).get("steps_per_second")
        if speed is None:
            return 0.0
        before = [0, *speed.steps[:-1]]
        return sum((b - a) / v for a, b, v in zip(before, speed.steps, speed.values, strict=True) if v > 0)


@dataclass(frozen=True)
class RunData:
    """All that a report shows."""

    folder: RunFolder
    recipe_text: str
    recipe: Mapping[str, Any]
    stages: list[Stage]
    events: list[dict[str, Any]]
    wild: Counter[str]
    broken_lines: int
    skipped: list[tuple[str, str, str]]
    scores: dict[str, dict[str, Any]]
    starts: list[dict[str, Any]] = field(default_factory=list)
    sizes: Any = None

    @property
    def name(self) -> str:
        return self.folder.path.resolve().name

    @property
    def finished(self) -> bool:
        return (self.folder.model / "model_index.json").is_file()


def read_run(path: Path) -> RunData:
    """Read a run folder.

    Raises:
        UserError: it is not there, or not a run folder.
    """
    folder = RunFolder(Path(path))
    if not folder.path.is_dir():
        raise UserError(f"{path}: no such run folder; runs are below runs/")
    if not folder.metrics.is_file() and not folder.recipe.is_file():
        above = folder.path.resolve().parent
        if (above / "metrics.jsonl").is_file():
            raise UserError(f"{path}: not a run folder but a part of one; give {folder.path.parent}")
        raise UserError(f"{path}: not a run folder, it holds neither metrics.jsonl nor recipe.yaml")
    text = _text(folder.recipe)
    recipe = _mapping(text)
    lines, broken = _lines(folder.metrics)
    stages, wild = _stages(lines, recipe, folder)
    events = [line for line in lines if line.get("kind") not in REGULAR]
    return RunData(
        folder,
        text,
        recipe,
        stages,
        events,
        wild,
        broken,
        list(_left_out(folder.path)),
        _scores(folder.path),
        _list_of_mappings(folder.path / "starts.json"),
        _json(folder.path / "sizes.json"),
    )


def lookup(recipe: Mapping[str, Any], *keys: str) -> Any:
    """A nested value; None where any part is missing."""
    value: Any = recipe
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _mapping(text: str) -> Mapping[str, Any]:
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return loaded if isinstance(loaded, Mapping) else {}


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path) or "null")
    except ValueError:  # half written by something else, or not ours
        return None


def _list_of_mappings(path: Path) -> list[dict[str, Any]]:
    value = _json(path)
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines, and how many cannot be read; the last one may be half written, which is nothing to speak of."""
    lines, broken = [], 0
    texts = _text(path).splitlines()
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            assert isinstance(line, dict)
        except (ValueError, AssertionError):
            broken += number < len(texts)
            continue
        lines.append(line)
    return lines, broken


def _stages(
    lines: list[dict[str, Any]], recipe: Mapping[str, Any], folder: RunFolder
) -> tuple[list[Stage], Counter[str]]:
    """Curves by stage, and how often each measurement was not a finite number."""
    found: dict[str, dict[str, dict[str, dict[int, float]]]] = {}
    wild: Counter[str] = Counter()
    for line in lines:
        stage, kind, step = line.get("stage"), line.get("kind"), line.get("step")
        if not isinstance(stage, str) or kind not in REGULAR or not isinstance(step, int):
            continue
        curves = found.setdefault(stage, {}).setdefault(kind, {})
        for key, value in line.items():
            if key in ("stage", "kind", "step"):
                continue
            number = _number(value)
            if number is not None and math.isfinite(number):
                curves.setdefault(key, {})[step] = number  # a line that comes again wins
            elif number is not None:
                wild[f"{stage}: {key}"] += 1
    names = [name for name in ORDER if name in found] + [name for name in found if name not in ORDER]
    stages = [
        Stage(
            name,
            _count(lookup(recipe, SECTIONS.get(name, ""), "train", "steps"), lookup(recipe, "train", "steps")),
            _count(
                lookup(recipe, SECTIONS.get(name, ""), "train", "global_batch"), lookup(recipe, "train", "global_batch")
            ),
            {kind: {key: _series(points) for key, points in curves.items()} for kind, curves in found[name].items()},
            folder.result(name).is_dir(),
        )
        for name in names
    ]
    return stages, wild


def _number(value: Any) -> float | None:
    """A number, also one of those that JSON has no word for; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and value not in ("nan", "inf", "-inf"):
        return None
    return float(value)


def _series(points: dict[int, float]) -> Series:
    steps = sorted(points)
    return Series(steps, [points[step] for step in steps])


def _count(*values: Any) -> int | None:
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _left_out(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(file of the list, picture, reason) of everything that was skipped or set aside."""
    for path in sorted([*folder.glob("skipped*.json"), *folder.glob("quarantine*.json")]):
        value = _json(path)
        pairs: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for name, reason in pairs:
            yield path.name, str(name), str(reason)


def _scores(folder: Path) -> dict[str, dict[str, Any]]:
    """Result files of evaluations, in folders of their own beside the model: those with a score."""
    found = {}
    for path in sorted(folder.glob("*/*.json")):
        if path.parent.name not in KNOWN_FOLDERS:
            value = _json(path)
            if isinstance(value, dict) and _number(value.get("score")) is not None:
                found[f"{path.parent.name}/{path.stem}"] = value
    return found
