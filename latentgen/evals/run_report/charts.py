"""Which curves a stage has, and which of them share a chart."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from latentgen.evals.run_report.curves import POINTS, Line, chart, told
from latentgen.evals.run_report.read import Series, Stage
from latentgen.evals.run_report.strips import evenly

TITLES = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "steps_per_second": "Speed, steps a second",
    "error": "Squared error",
    "psnr": "PSNR of held-out pictures, dB",
    "ssim": "SSIM of held-out pictures",
    "retrieval": "Retrieval of held-out pairs",
    "kl": "KL divergence",
    "pixel": "Pixel loss",
    "accuracy": "Accuracy on training batches",
    "late": "Late-interaction loss",
    "gap": "Held-out loss less that of training examples",
    "vlb": "Variational bound, bits per dimension",
}

FIRST = ("loss", "learning_rate", "grad_norm", "steps_per_second", "error")
LEVEL = re.compile(r"^(.+)/(\d+)$")
SETS = {"held_out": "held out", "seen": "training examples, averaged weights"}
"""How validation calls the examples it measures."""

LINEAR = (TITLES["learning_rate"], TITLES["steps_per_second"])
STYLES = 8
"""Colours of the page."""

ROWS = 12
"""Rows of a table of numbers."""


@dataclass(frozen=True)
class Chart:
    """One card of the page."""

    title: str
    lines: list[Line]
    linear: bool = False


def stage_charts(stage: Stage) -> list[Chart]:
    """Every measurement of the stage is in one chart, validation beside training; standard errors are bars."""
    charts: dict[str, list[Line]] = {}
    for kind, key, series in _measured(stage):
        title, label = _place(stage, kind, key)
        lines = charts.setdefault(title, [])
        lines.append(
            Line(
                label,
                series,
                style=f"c{len(lines) % STYLES + 1}",
                smooth=kind == "train" and title != TITLES["learning_rate"],
                marks=kind != "train",
                spread=_spread(stage, kind, key, series),
            )
        )
    return [Chart(title, lines, linear=title in LINEAR) for title, lines in charts.items()]


def _measured(stage: Stage) -> Iterator[tuple[str, str, Series]]:
    """(kind, measurement, series) in the order in which they are shown."""
    entries = [(kind, key, series) for kind, curves in stage.curves.items() for key, series in curves.items()]

    def rank(entry: tuple[str, str, Series]) -> tuple[int, bool, bool, str]:
        kind, key, _ = entry
        last = key.rpartition("/")[2]
        place = FIRST.index(last) if last in FIRST else len(FIRST)
        return place, LEVEL.match(key) is None, kind != "train", key

    for kind, key, series in sorted(entries, key=rank):
        if not key.endswith("_se"):
            yield kind, key, series


def _place(stage: Stage, kind: str, key: str) -> tuple[str, str]:
    """The title of the chart in which a measurement is shown, and its name there."""
    level = LEVEL.match(key)
    name = level[1] if level is not None else key
    of, _, last = name.rpartition("/")
    title, label = TITLES.get(last, last), SETS.get(of, kind)
    if of and of not in SETS:
        title += f" ({of})"
    if level is None:
        return title, label
    return title + " by noise level" + ("" if kind == "train" else f" ({label})"), _level_label(stage, kind, level)


def _spread(stage: Stage, kind: str, key: str, series: Series) -> list[float] | None:
    """The standard error of each value, where it was logged along."""
    of = stage.curves[kind].get(f"{key}_se")
    return of.values if of is not None and of.steps == series.steps and len(of.steps) <= POINTS else None


def _level_label(stage: Stage, kind: str, level: re.Match[str]) -> str:
    number, name = int(level[2]), level[1]
    others = [int(m[2]) for key in stage.curves[kind] if (m := LEVEL.match(key)) and m[1] == name]
    ends = {min(others): "cleanest", max(others): "noisiest"}
    return f"{number} {ends[number]}" if number in ends and len(others) > 1 else str(number)


def card(of: Chart, name: str, last_step: int | None) -> str:
    """A chart with its legend and its table of numbers, as HTML."""
    legend = "".join(
        f'<li><span class="key {line.style}"></span>{escape(line.label)} <b>{told(line.series.values[-1])}</b></li>'
        for line in of.lines
    )
    return (
        f'<section class="card"><h3>{escape(of.title)}</h3><ul class="legend">{legend}</ul>'
        f"{chart(of.title, of.lines, name=name, last_step=last_step, linear=of.linear)}"
        f'<div class="tip" aria-hidden="true"></div>{_table(of)}</section>'
    )


def _table(of: Chart) -> str:
    steps = evenly(sorted({step for line in of.lines for step in line.series.steps}), ROWS)
    by_step = [dict(zip(line.series.steps, line.series.values, strict=True)) for line in of.lines]
    head = "".join(f'<th scope="col">{escape(line.label)}</th>' for line in of.lines)
    rows = "".join(
        f'<tr><th scope="row">{step:,}</th>'
        + "".join(f"<td>{told(values[step]) if step in values else ''}</td>" for values in by_step)
        + "</tr>"
        for step in steps
    )
    return (
        '<details><summary>Numbers</summary><div class="wide"><table>'
        f'<thead><tr><th scope="col">step</th>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>'
    )
