"""Score a text-to-image model on the world of shapes: a table per category, intervals, and a grid that marks failures.

How pictures are made is not known here: `evaluate` is given a function that draws them.
"""

from __future__ import annotations

import io
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from latentgen.core.errors import UserError
from latentgen.core.files import write_bytes, write_json, write_text
from latentgen.core.rand import seed_of
from latentgen.data.sources.shapes_scene import CATEGORIES
from latentgen.evals.shapes_prompts import Prompt
from latentgen.evals.shapes_score import Verdict, score

Draw = Callable[[list[str], list[int]], Sequence[Image.Image]]
"""Prompts and seeds -> pictures, one for each."""

SETS = ("all", "seen", "heldout")
RESAMPLES = 2000
GRID_COLUMNS = 12
THUMBNAIL = 128


@dataclass(frozen=True)
class Row:
    """One line of the table: the share of pictures that pass, and its 95% bootstrap interval over prompts.

    Attributes:
        category: one of the six, or "overall": the mean of the categories that have prompts in this set.
        set: "all", "seen" or "heldout" prompts.
        prompts, pictures: how many.
        score, low, high: in [0, 1].
    """

    category: str
    set: str
    prompts: int
    pictures: int
    score: float
    low: float
    high: float


@dataclass(frozen=True)
class Outcome:
    """One picture's verdict."""

    prompt: Prompt
    seed: int
    ok: bool
    failed: tuple[str, ...]
    confidence: float


@dataclass(frozen=True)
class Report:
    """The result of `evaluate`: the table, every outcome, and the pictures of the grid by their place in `outcomes`."""

    rows: tuple[Row, ...]
    outcomes: tuple[Outcome, ...]
    pictures: dict[int, Image.Image]
    pictures_per_prompt: int
    seed: int

    def row(self, category: str = "overall", set: str = "all") -> Row:
        """The line of the table for a category ("overall" for their mean) and a set of prompts."""
        for row in self.rows:
            if (row.category, row.set) == (category, set):
                return row
        raise UserError(f"shapes report: no row for category {category!r} and set {set!r}")

    @property
    def score(self) -> float:
        """The headline: the mean of the categories over all prompts, in [0, 1]."""
        return self.row().score


def evaluate(
    draw: Draw,
    prompts: Sequence[Prompt],
    pictures_per_prompt: int = 4,
    seed: int = 0,
    batch_size: int = 64,
) -> Report:
    """Draw pictures for the prompts and judge them.

    Args:
        draw: called with at most `batch_size` prompts and as many seeds; returns as many square pictures.
        prompts: for example `standing_prompts()`.
        pictures_per_prompt: pictures for each prompt. A picture's seed depends on `seed`, the prompt's text and its
        number among them, so that a part of the list gives the same pictures as the whole. seed: another seed draws
        other pictures. batch_size: how many pictures are asked for at once.

    Raises:
        UserError: no prompts, or no pictures; an unknown category; a prompt outside the grammar.
        ValueError: `draw` returned another number of pictures than it was asked for.
    """
    if not prompts or pictures_per_prompt < 1:
        raise UserError(f"shapes report: {len(prompts)} prompts, {pictures_per_prompt} pictures each; give at least 1")
    for prompt in prompts:
        if prompt.category not in CATEGORIES:
            known = ", ".join(CATEGORIES)
            raise UserError(
                f"shapes report: prompt {prompt.text!r} has category {prompt.category!r}; choose one of {known}"
            )
    shown = _shown_in_grid(prompts, pictures_per_prompt)
    jobs = [(prompt, _seed(seed, prompt, k)) for prompt in prompts for k in range(pictures_per_prompt)]
    outcomes: list[Outcome] = []
    kept: dict[int, Image.Image] = {}
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        pictures = draw([prompt.text for prompt, _ in batch], [number for _, number in batch])
        if len(pictures) != len(batch):
            raise ValueError(f"draw returned {len(pictures)} pictures for {len(batch)} prompts")
        for (prompt, number), picture in zip(batch, pictures, strict=True):
            if len(outcomes) in shown:
                kept[len(outcomes)] = picture.convert("RGB").resize((THUMBNAIL, THUMBNAIL), _filter(picture))
            outcomes.append(_outcome(prompt, number, score(picture, prompt.text)))
    rows = tuple(_rows(outcomes, pictures_per_prompt, seed))
    return Report(rows, tuple(outcomes), kept, pictures_per_prompt, seed)


def _seed(seed: int, prompt: Prompt, number: int) -> int:
    """32 bits, which every framework's generators accept."""
    return seed_of("shapes report", seed, prompt.text, number) % 2**32


def _outcome(prompt: Prompt, seed: int, verdict: Verdict) -> Outcome:
    return Outcome(prompt, seed, verdict.ok, verdict.failed, verdict.confidence)


def _filter(picture: Image.Image) -> Image.Resampling:
    """Pixels stay visible when a small picture is enlarged."""
    return Image.Resampling.NEAREST if picture.width <= THUMBNAIL else Image.Resampling.BOX


def _shown_in_grid(prompts: Sequence[Prompt], pictures_per_prompt: int) -> set[int]:
    """Places of the grid's pictures among all: the first of each category's first prompts."""
    shown: set[int] = set()
    taken: Counter[str] = Counter()
    for place, prompt in enumerate(prompts):
        if taken[prompt.category] < GRID_COLUMNS:
            taken[prompt.category] += 1
            shown.add(place * pictures_per_prompt)
    return shown


def bootstrap(groups: Sequence[np.ndarray], seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean of the groups' means.

    Args:
        groups: one array of prompt scores for each category; prompts are resampled within their group (stratified).
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    means = np.zeros(RESAMPLES)
    for scores in groups:
        picked = rng.integers(0, len(scores), size=(RESAMPLES, len(scores)))
        means += scores[picked].mean(1) / len(groups)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def _rows(outcomes: list[Outcome], pictures_per_prompt: int, seed: int) -> Iterator[Row]:
    passed = np.array([outcome.ok for outcome in outcomes], dtype=float).reshape(-1, pictures_per_prompt).mean(1)
    prompts = [outcome.prompt for outcome in outcomes[::pictures_per_prompt]]
    for name in SETS:
        groups: dict[str, np.ndarray] = {}
        for category in CATEGORIES:
            within = [p.category == category and (name == "all" or p.heldout == (name == "heldout")) for p in prompts]
            if any(within):
                groups[category] = passed[np.array(within)]
        for category, scores in groups.items():
            low, high = bootstrap([scores], seed)
            mean = float(scores.mean())
            yield Row(category, name, len(scores), len(scores) * pictures_per_prompt, mean, low, high)
        if groups:
            count = sum(map(len, groups.values()))
            mean = float(np.mean([scores.mean() for scores in groups.values()]))
            low, high = bootstrap(list(groups.values()), seed)
            yield Row("overall", name, count, count * pictures_per_prompt, mean, low, high)


def write(report: Report, folder: Path) -> None:
    """Write `shapes.json` (everything), `shapes.md` (the table) and `shapes.png` (the grid) into `folder`."""
    folder = Path(folder)
    write_json(folder / "shapes.json", as_dict(report))
    write_text(folder / "shapes.md", as_markdown(report))
    png = io.BytesIO()
    grid(report).save(png, "PNG")
    write_bytes(folder / "shapes.png", png.getvalue())


def as_dict(report: Report) -> dict[str, Any]:
    """The report without its pictures, as JSON values."""
    return {
        "score": report.score,
        "pictures_per_prompt": report.pictures_per_prompt,
        "seed": report.seed,
        "rows": [asdict(row) for row in report.rows],
        "failures": {category: dict(counts) for category, counts in _failures(report).items()},
        "outcomes": [
            {**asdict(outcome.prompt), **{k: v for k, v in asdict(outcome).items() if k != "prompt"}}
            for outcome in report.outcomes
        ],
    }


def _failures(report: Report) -> dict[str, Counter[str]]:
    """Category -> failed check -> number of pictures; a picture may fail several checks."""
    counts: dict[str, Counter[str]] = {}
    for outcome in report.outcomes:
        counts.setdefault(outcome.prompt.category, Counter()).update(outcome.failed)
    return counts


def as_markdown(report: Report) -> str:
    """The table: categories down, sets across, each score in percent with its interval; then what failed."""
    table = {(row.category, row.set): row for row in report.rows}
    lines = ["# Shapes", "", "Share of pictures that show what the prompt asks for, in percent,"]
    note = f"{report.pictures_per_prompt} pictures a prompt, seed {report.seed}"
    lines += [f"with 95% intervals over prompts; {note}.", ""]
    lines += ["| category | all | seen | held out | prompts | failed checks |", "|---|---|---|---|---|---|"]
    failures = _failures(report)
    for category in (*CATEGORIES, "overall"):
        if (category, "all") not in table:
            continue
        cells = [_cell(table.get((category, name))) for name in SETS]
        counts = failures.get(category, Counter()) if category != "overall" else sum(failures.values(), Counter())
        failed = ", ".join(f"{name} {count}" for name, count in counts.most_common()) or "none"
        lines.append(f"| {category} | {' | '.join(cells)} | {table[category, 'all'].prompts} | {failed} |")
    return "\n".join(lines) + "\n"


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{100 * row.score:.1f} ({100 * row.low:.1f} to {100 * row.high:.1f})"


_RED, _GREEN, _INK, _PAPER = (215, 30, 30), (60, 160, 80), (20, 20, 20), (255, 255, 255)
_FRAME, _TEXT, _LABEL = 4, 66, 16


def grid(report: Report) -> Image.Image:
    """One row of pictures a category; a failure has a red frame and the names of the failed checks."""
    places: dict[str, list[int]] = {}
    for place in sorted(report.pictures):
        places.setdefault(report.outcomes[place].prompt.category, []).append(place)
    cell = THUMBNAIL + 2 * _FRAME + 6
    height = cell + _TEXT + _LABEL
    sheet = Image.new("RGB", (cell * max(map(len, places.values())), height * len(places)), _PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for down, (category, row) in enumerate(places.items()):
        scored = report.row(category)
        pen.text((3, down * height + 2), f"{category}: {100 * scored.score:.1f}%", fill=_INK, font=font)
        for across, place in enumerate(row):
            outcome = report.outcomes[place]
            x, y = across * cell + 3, down * height + _LABEL + 3
            edge = THUMBNAIL + 2 * _FRAME
            pen.rectangle((x, y, x + edge - 1, y + edge - 1), fill=_GREEN if outcome.ok else _RED)
            sheet.paste(report.pictures[place], (x + _FRAME, y + _FRAME))
            if not outcome.ok:
                pen.text((x, y + edge + 1), "not: " + ", ".join(outcome.failed), fill=_RED, font=font)
            words = "\n".join(textwrap.wrap(outcome.prompt.text, 24)[:4])
            pen.text((x, y + edge + (1 if outcome.ok else 14)), words, fill=_INK, font=font, spacing=1)
    return sheet
