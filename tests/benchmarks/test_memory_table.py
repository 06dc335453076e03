"""The table of what fits into a GPU: the pages have what is computed, of models of the published shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
from memory_table import PUBLISHED, lines

from latentgen.recipe.memory import CARDS

ROOT = Path(__file__).resolve().parents[2]
TITLES = {"Stable Diffusion 1.5": "SD 1.5", "SDXL": "SDXL"}
"""Of the guide's sections: the family."""


def rows(page: str) -> list[tuple[str, list[str]]]:
    """Title of the section and cells of each row of numbers."""
    found, title = [], ""
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            title = line[3:]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0].isdigit():
            found.append((title, cells))
    return found


RESULTS, GUIDE = rows("benchmarks/results/memory.md"), rows("docs/memory.md")


def test_the_guide_repeats_the_results() -> None:
    fits = {(family, side, trained): cells for family, (side, kind, trained, _, _, *cells) in RESULTS if kind == "bf16"}
    said = {(TITLES[title], side, trained): cells for title, (side, trained, *cells) in GUIDE}
    assert said == fits
    assert {len(cells) for cells in said.values()} == {len(CARDS)}


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_results_are_what_is_computed(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One row of each family: the model has as many weights as the published one, and a step of it is counted."""
    lines(family, 512, "bf16", "LoRA 16")
    (line,) = capsys.readouterr().out.splitlines()
    computed = [cell.strip() for cell in line.strip("|").split("|")]
    assert (family, computed) in RESULTS
