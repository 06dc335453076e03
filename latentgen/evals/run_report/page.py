"""The page: everything of a run that a person asks for, in one file that needs no other."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any

from latentgen.core.files import write_text
from latentgen.evals.run_report.charts import card, stage_charts
from latentgen.evals.run_report.curves import told
from latentgen.evals.run_report.read import NAMES, RunData, Stage, lookup, read_run
from latentgen.evals.run_report.sizes import sizes_section
from latentgen.evals.run_report.strips import Strip, read_strips
from latentgen.evals.run_report.style import CSS, JS

SHOWN = 40
"""Rows of a list of events or of skipped pictures."""


def write_report(run: Path, out: Path | None = None) -> Path:
    """Make `report.html` of a run folder, finished or not; returns where it is.

    Raises:
        UserError: `run` is not a run folder.
    """
    target = out or Path(run) / "report.html"
    write_text(target, report_html(read_run(run)))
    return target


def report_html(data: RunData) -> str:
    """The page. All that comes from captions, recipes and files is escaped; the page may load nothing."""
    body = "".join(
        [
            _head(data),
            _facts(data),
            _notices(data),
            *(_stage(data, stage) for stage in data.stages),
            _scores(data.scores),
            sizes_section(data.sizes),
            _skipped(data.skipped),
            _events(data.events),
            _starts(data.starts),
            _recipe(data),
        ]
    )
    policy = f"default-src 'none'; img-src data:; style-src '{_hash(CSS)}'; script-src '{_hash(JS)}'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(data.name)}: training report</title><style>{CSS}</style></head>"
        f"<body><main>{body}</main><script>{JS}</script></body></html>\n"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _head(data: RunData) -> str:
    links = [(f"stage-{k}", NAMES.get(stage.name, stage.name)) for k, stage in enumerate(data.stages)]
    links += [("scores", "Scores")] * bool(data.scores) + [("recipe", "Recipe")] * bool(data.recipe_text)
    nav = "".join(f'<a href="#{to}">{escape(name)}</a>' for to, name in links)
    written = f"report of {_when(datetime.now(timezone.utc).timestamp())}"
    return (
        f'<header><h1>{escape(data.name)}</h1><p class="soft">{escape(_status(data))} · {written}</p>'
        f'<nav aria-label="Parts of the page">{nav}</nav></header>'
    )


def _status(data: RunData) -> str:
    if data.finished:
        return "finished"
    if not data.stages:
        return "nothing logged yet"
    stage = data.stages[-1]
    name, of = NAMES.get(stage.name, stage.name), f" of {stage.total:,}" if stage.total else ""
    return f"not finished: {name}, step {stage.step:,}{of}, last written {_when(data.folder.metrics.stat().st_mtime)}"


def _when(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _facts(data: RunData) -> str:
    facts = [("Time in steps", duration(sum(stage.seconds for stage in data.stages)))]
    for stage in data.stages:
        if stage.seconds:
            speed = stage.step / stage.seconds
            pictures = f" <small>{told(speed * stage.batch)} pictures/s</small>" if stage.batch else ""
            facts.append((f"{NAMES.get(stage.name, stage.name)} speed", f"{told(speed)} steps/s{pictures}"))
    facts += [(f"Score, {name}", told(float(score["score"]))) for name, score in data.scores.items()]
    newest = data.starts[-1] if data.starts else {}
    for key, title in (("examples", "Examples"), ("processes", "Processes"), ("device", "Device")):
        if key in newest:
            value = newest[key]
            facts.append((title, f"{value:,}" if isinstance(value, int) else escape(str(value))))
    if data.starts:
        facts.append(("Started", f"{len(data.starts)} time{'s' if len(data.starts) > 1 else ''}"))
    if data.skipped:
        facts.append(("Pictures left out", f"{len(data.skipped):,}"))
    precision, seed = lookup(data.recipe, "train", "precision"), data.recipe.get("seed")
    if precision is not None:
        facts.append(("Precision, seed", f"{escape(str(precision))}, {escape(str(seed))}"))
    cells = "".join(f"<div><dt>{escape(title)}</dt><dd>{value}</dd></div>" for title, value in facts)
    return f'<dl class="facts">{cells}</dl>'


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 5 h 12 min, 3 d 4 h."""
    seconds = round(seconds)
    for size, unit, below, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            rest = seconds % size // below
            return f"{seconds // size} {unit}" + (f" {rest} {name}" if rest else "")
    return f"{seconds} s"


def _notices(data: RunData) -> str:
    notes = [f"{escape(name)} was not a finite number in {count} lines" for name, count in sorted(data.wild.items())]
    kinds = Counter(str(event.get("kind")) for event in data.events)
    for kind, count in sorted(kinds.items()):
        often = f", {count} times" if count > 1 else ""
        notes.append(f'{escape(kind)}{often}: see <a href="#events">events</a>')
    if data.broken_lines:
        notes.append(f"{data.broken_lines} lines of metrics.jsonl cannot be read and were left out")
    if data.skipped:
        notes.append(f'{len(data.skipped):,} pictures were left out of training: see <a href="#skipped">which</a>')
    if not notes:
        return ""
    return (
        f'<section class="notice"><h2>To look at</h2><ul>{"".join(f"<li>{note}</li>" for note in notes)}</ul></section>'
    )


def _stage(data: RunData, stage: Stage) -> str:
    position = data.stages.index(stage)
    total = stage.total if stage.total is not None and stage.total >= stage.step else None
    of = f" of {total:,}" if total else ""
    state = "done" if stage.done else "not done"
    bar = (
        f'<progress max="{total}" value="{stage.step}" aria-label="steps done"></progress>'
        if total and not stage.done
        else ""
    )
    cards = "".join(
        card(chart, f"clip-{position}-{number}", total if not stage.done else None)
        for number, chart in enumerate(stage_charts(stage))
    )
    return (
        f'<section id="stage-{position}"><h2>{escape(NAMES.get(stage.name, stage.name))}</h2>'
        f'<p class="soft">Step {stage.step:,}{of}, {duration(stage.seconds)} in steps, {state}.</p>{bar}'
        f"{_strips(read_strips(data.folder.samples(stage.name), stage.name, data.recipe))}"
        f'<div class="charts">{cards}</div></section>'
    )


def _strips(strips: list[Strip]) -> str:
    if not strips:
        return ""
    head = "".join(f'<th scope="col">{step:,}</th>' for step in strips[0].steps)
    rows = []
    for strip in strips:
        caption = escape(strip.caption)
        pictures = "".join(
            f'<td><img src="{picture}" alt="{caption}, step {step:,}"></td>' if picture else "<td></td>"
            for step, picture in zip(strip.steps, strip.pictures, strict=True)
        )
        rows.append(f'<tr><th scope="row" class="name">{caption}</th>{pictures}</tr>')
    return (
        '<section class="card"><h3>Previews by step</h3><div class="wide" tabindex="0" role="region" '
        'aria-label="Previews by step"><table class="strips"><thead><tr><th class="name" scope="col">step</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _table(columns: list[str], rows: list[list[Any]], more: int = 0) -> str:
    head = "".join(f'<th scope="col" class="text">{escape(name)}</th>' for name in columns)
    body = "".join(
        "<tr>" + "".join(f'<td class="text">{escape(_cell(value))}</td>' for value in row) + "</tr>" for row in rows
    )
    rest = f'<p class="soft">and {more:,} more</p>' if more > 0 else ""
    return f'<div class="card wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{rest}</div>'


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return told(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_cell(inner)}" for key, inner in value.items())
    return "" if value is None else ", ".join(map(_cell, value)) if isinstance(value, list) else str(value)


def _scores(scores: Mapping[str, Mapping[str, Any]]) -> str:
    parts = []
    for name, score in scores.items():
        numbers = [[k, v] for k, v in score.items() if isinstance(v, int | float | str)]
        parts.append(f"<h3>{escape(name)}</h3>{_table(['', ''], numbers)}")
        rows = [row for row in score.get("rows") or [] if isinstance(row, dict)]
        if rows:
            columns = list(rows[0])
            parts.append(_table(columns, [[row.get(c) for c in columns] for row in rows[:SHOWN]], len(rows) - SHOWN))
    return f'<section id="scores"><h2>Scores</h2>{"".join(parts)}</section>' if parts else ""


def _skipped(skipped: list[tuple[str, str, str]]) -> str:
    if not skipped:
        return ""
    reasons = Counter(reason for _, _, reason in skipped).most_common()
    counts = _table(
        ["reason", "pictures"], [[reason, count] for reason, count in reasons[:SHOWN]], len(reasons) - SHOWN
    )
    names = _table(["list", "picture", "reason"], [list(row) for row in skipped[:SHOWN]], len(skipped) - SHOWN)
    which = f"<details><summary>Which</summary>{names}</details>"
    return f'<section id="skipped"><h2>Pictures left out</h2>{counts}{which}</section>'


def _events(events: list[dict[str, Any]]) -> str:
    if not events:
        return ""
    rows = []
    for event in events[-SHOWN:]:
        rest = {k: v for k, v in event.items() if k not in ("stage", "kind", "step")}
        rows.append([event.get("stage"), event.get("step"), event.get("kind"), rest])
    table = _table(["stage", "step", "kind", "details"], rows, len(events) - SHOWN)
    return f'<section id="events"><h2>Events</h2>{table}</section>'


def _starts(starts: list[dict[str, Any]]) -> str:
    if not starts:
        return ""
    columns = list(dict.fromkeys(key for start in starts for key in start))
    rows = [[start.get(column) for column in columns] for start in starts[-SHOWN:]]
    return f"<section><h2>Started</h2>{_table(columns, rows, len(starts) - SHOWN)}</section>"


def _recipe(data: RunData) -> str:
    if not data.recipe_text:
        return ""
    first = data.recipe_text.splitlines()[0]
    versions = first.removeprefix("# ") if first.startswith("#") else ""
    text = f"<summary>recipe.yaml, as it ran</summary><pre>{escape(data.recipe_text)}</pre>"
    return (
        f'<section id="recipe"><h2>Recipe</h2><p class="soft">{escape(versions)}</p>'
        f'<details class="card">{text}</details></section>'
    )
