"""Preview sheets over time, cut up: a row for each prompt, a picture for each step."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from latentgen.evals.run_report.read import lookup
from latentgen.pipelines.pictures import cells

STEPS, ROWS = 10, 12
"""Of each stage the page shows so many steps and prompts at most."""

SIDE, SMALL = 192, 136
"""Pixels: larger pictures are shrunk; those up to `SMALL` are kept exactly, as PNG."""


@dataclass(frozen=True)
class Strip:
    """The first picture of one prompt over time; pictures are data URIs, None where there is none of that step."""

    caption: str
    steps: list[int]
    pictures: list[str | None]


def read_strips(samples: Path, stage: str, recipe: Mapping[str, Any]) -> list[Strip]:
    """The strips of a stage, [] where there are no previews. Sheets that cannot be opened are passed over."""
    found = {int(path.stem): path for path in samples.glob("*.png") if path.stem.isdigit()}
    chosen = evenly(sorted(found), STEPS)
    rows: dict[str, dict[int, str]] = {}
    for step in chosen:
        for caption, picture in _first_pictures(found[step], stage, recipe).items():
            rows.setdefault(caption, {})[step] = data_uri(picture)
    shown = list(rows.items())[-ROWS:]  # where prompts were changed, the later ones
    return [Strip(caption, chosen, [of.get(step) for step in chosen]) for caption, of in shown]


def evenly(values: list[int], count: int) -> list[int]:
    """At most `count` of the values, evenly spread, with the first and the last."""
    if len(values) <= count:
        return values
    return [values[round(k * (len(values) - 1) / (count - 1))] for k in range(count)]


def _first_pictures(path: Path, stage: str, recipe: Mapping[str, Any]) -> dict[str, Image.Image]:
    """Caption -> the first picture of its row."""
    try:
        with Image.open(path) as opened:
            sheet = opened.convert("RGB")
            layout = json.loads(opened.info.get("latentgen", "null")) or _older(stage, recipe)
    except (OSError, ValueError):
        return {}
    captions, columns = lookup(layout, "captions"), lookup(layout, "columns")
    if not isinstance(captions, list) or not isinstance(columns, int) or not captions or columns < 1:
        return {}
    return {
        str(name): row[0]
        for name, row in zip(captions, cells(sheet, len(captions), columns, captions=True), strict=True)
    }


def _older(stage: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The layout of sheets that do not say it themselves."""
    if stage == "vae":
        return {
            "captions": ["held-out pictures", "reconstructed"],
            "columns": min(8, lookup(recipe, "data", "holdout") or 8),
        }
    return {"captions": lookup(recipe, "preview", "prompts"), "columns": lookup(recipe, "preview", "num")}


def data_uri(picture: Image.Image) -> str:
    """A picture that needs no file."""
    buffer = BytesIO()
    if max(picture.size) <= SMALL:
        picture.save(buffer, "PNG")
        kind = "png"
    else:
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        picture.save(buffer, "JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
