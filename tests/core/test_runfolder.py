"""Which model a bare command draws with."""

from __future__ import annotations

import os
from pathlib import Path

from latentgen.core.log import counted
from latentgen.core.runfolder import RunFolder, newest_finished


def test_newest_finished_takes_the_last_that_is_finished(tmp_path: Path) -> None:
    assert newest_finished(tmp_path) is None
    for age, name in ((1, "old"), (2, "new"), (3, "half")):
        model = RunFolder(tmp_path / name).model
        model.mkdir(parents=True)
        if name != "half":
            (model / "model_index.json").write_text("{}")
            os.utime(model / "model_index.json", (age, age))
    assert newest_finished(tmp_path) == tmp_path / "new" / "model"


def test_stages_do_not_share_paths(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for place in (run.samples, run.checkpoints, run.result):
        assert place("vae") != place("unet")


def test_counted() -> None:
    assert [counted(n) for n in (950, 12_340, 4_310_000, 1.2e14, 1.2e17)] == [
        "950",
        "12.3k",
        "4.31M",
        "120T",
        "1.20e+17",
    ]
