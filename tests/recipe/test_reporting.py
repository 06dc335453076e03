"""What a run says of itself: its starts, and a page that never stops it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate import Accelerator

from latentgen.engine.remote import KINDS
from latentgen.recipe import reporting
from latentgen.recipe.load import load_recipe
from latentgen.recipe.reporting import Reporter, note_start
from latentgen.recipe.schema import Train


def test_each_start_is_noted(tmp_path: Path) -> None:
    for examples in (20, 30):
        note_start(tmp_path, examples, Accelerator(cpu=True))
    starts = json.loads((tmp_path / "starts.json").read_text())
    assert [start["examples"] for start in starts] == [20, 30]
    assert {"started", "processes", "device", "latentgen", "torch"} <= starts[1].keys()


def test_the_page_is_made_when_asked(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage": "unet", "kind": "train", "step": 1, "loss": 2.0}\n')
    Reporter(tmp_path)()
    assert "U-Net" in (tmp_path / "report.html").read_text()


def test_a_page_that_fails_is_said_once_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(reporting.logger, "warning", lambda text, *values: said.append(text % values))
    report = Reporter(tmp_path / "absent")
    report()
    report()
    assert len(said) == 1
    assert said[0].startswith("report.html was not written (UserError: ")


def test_a_recipe_may_name_every_tracker() -> None:
    for name in KINDS:
        assert load_recipe(None, [f"train.trackers=[{name}]"]).train.trackers == (name,)
    assert Train().trackers == ("tensorboard",)
