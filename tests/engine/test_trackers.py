"""Trackers of other makers: what reaches them, once; and that none of them can stop or hold up a run."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from latentgen.core.errors import UserError
from latentgen.engine import remote, trackers
from latentgen.engine.trackers import Trackers, check_trackers


class Recorder(GeneralTracker):
    """A tracker that keeps what it is told. `troubles` are raised one by one, by what is called."""

    name = "wandb"
    requires_logging_directory = False

    def __init__(self, run_name: str, **arguments: Any) -> None:
        self.heard.append(("open", run_name, arguments))

    heard: list[tuple] = []  # noqa: RUF012
    troubles: dict[str, BaseException] = {}  # noqa: RUF012
    hold: threading.Event | None = None

    def _hear(self, what: str, *details: Any) -> None:
        if self.hold is not None:
            assert self.hold.wait(30)
        if what in self.troubles:
            raise self.troubles[what]
        self.heard.append((what, *details))

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None:
        self._hear("start")

    def store_init_configuration(self, values: dict) -> None:
        self._hear("config", values)

    def log(self, values: dict, step: int | None = None, **kwargs: Any) -> None:
        self._hear("log", step, values)

    def log_images(self, values: dict, step: int | None = None, **kwargs: Any) -> None:
        self._hear("images", step, {key: [picture.shape for picture in each] for key, each in values.items()})

    def finish(self) -> None:
        self._hear("finish")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setattr(Recorder, "heard", [])
    monkeypatch.setattr(Recorder, "troubles", {})
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    return Recorder


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    said: list[str] = []
    monkeypatch.setattr(remote.logger, "warning", lambda text, *values: said.append(text % values))
    return said


def open_at(folder: Path, start: int, *names: str) -> Trackers:
    return Trackers(folder / "metrics.jsonl", folder / "tb", stage="unet", start_step=start, names=names)


def logged(folder: Path) -> list[tuple[str, int]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["kind"], line["step"]) for line in lines]


def test_numbers_pictures_and_the_recipe_arrive(tmp_path: Path, recorder: type[Recorder]) -> None:
    run = tmp_path / "my-run"
    run.mkdir()
    (run / "recipe.yaml").write_text("seed: 3\ntrain: {precision: bf16, beta: null}\n")
    Image.new("RGB", (6, 4)).save(run / "sheet.png")
    with open_at(run, 0, "wandb", "wandb") as log:
        log.picture(0, run / "sheet.png")
        log.picture(0, run / "absent.png")
        log.log(0, "preview", {})
        log.log(2, "train", {"loss": 0.5, "names": ["a"]})
        log.log(2, "validation", {"loss": 0.7})
    (_, project, arguments), *heard = recorder.heard
    assert project == "my-run"
    assert arguments["name"] == "unet"
    assert arguments["resume"] == "allow"
    assert heard == [
        ("start",),
        ("config", {"seed": 3, "train.precision": "bf16", "train.beta": "None"}),
        ("images", 0, {"unet/preview": [(4, 6, 3)]}),
        ("log", 2, {"unet/loss": 0.5}),
        ("log", 2, {"unet/validation/loss": 0.7}),
        ("finish",),
    ]


def test_no_step_is_sent_twice_however_often_a_run_stops(tmp_path: Path, recorder: type[Recorder]) -> None:
    Image.new("RGB", (6, 4)).save(tmp_path / "sheet.png")
    for start, end in ((0, 9), (4, 6), (4, 12)):  # two crashes after a checkpoint of step 4
        with open_at(tmp_path, start, "wandb") as log:
            for step in range(start, end + 1, 2):
                if step > start:
                    log.log(step, "train", {"loss": float(step)})
                log.picture(step, tmp_path / "sheet.png")
                log.log(step, "preview", {"psnr": float(step)})
    sent = [entry for entry in recorder.heard if entry[0] in ("log", "images")]
    for key, first in (("unet/loss", 2), ("unet/psnr", 0), ("unet/preview", 0)):
        assert [entry[1] for entry in sent if key in entry[2]] == list(range(first, 13, 2)), key
    assert len({entry[2]["id"] for entry in recorder.heard if entry[0] == "open"}) == 1, "one run there"
    assert sorted(logged(tmp_path)) == sorted(
        [("train", step) for step in range(2, 13, 2)] + [("preview", step) for step in range(0, 13, 2)]
    )


def test_notes_are_lines_of_their_own(tmp_path: Path, recorder: type[Recorder]) -> None:
    with open_at(tmp_path, 0, "wandb") as log:
        log.log(3, "guard", {"what": "loss", "examples": [1, 2]})
    assert logged(tmp_path) == [("guard", 3)]
    with Trackers(tmp_path / "metrics.jsonl", tmp_path, stage="unet", start_step=3, again=("guard",)):
        pass
    assert logged(tmp_path) == []


def test_tensorboard_has_each_step_once_and_the_picture(tmp_path: Path) -> None:
    Image.new("RGB", (6, 4)).save(tmp_path / "sheet.png")
    for start in (0, 4):
        with open_at(tmp_path, start, "tensorboard") as log:
            log.picture(start, tmp_path / "sheet.png")
            log.log(start, "preview", {})
            for step in range(start + 2, 9, 2):
                log.log(step, "train", {"loss": 1.0 / step})
    board = EventAccumulator(str(tmp_path / "tb/unet")).Reload()
    assert [event.step for event in board.Scalars("unet/loss")] == [2, 4, 6, 8]
    assert [event.step for event in board.Images("unet/preview")] == [0, 4]


@pytest.mark.parametrize("trouble", [OSError("no\nroute"), SystemExit("leave")])
def test_a_line_that_fails_is_said_once(
    trouble: BaseException, tmp_path: Path, recorder: type[Recorder], warnings: list[str]
) -> None:
    recorder.troubles = {"log": trouble}
    with open_at(tmp_path, 0, "wandb") as log:
        for step in range(5):
            log.log(step, "train", {"loss": 1.0})
    assert logged(tmp_path) == [("train", step) for step in range(5)]
    assert len(warnings) == 1
    assert "wandb" in warnings[0]
    assert type(trouble).__name__ in warnings[0]
    assert "\n" not in warnings[0]
    assert recorder.heard[-1] == ("finish",), "it is closed all the same"


def test_a_line_that_fails_does_not_end_the_tracker(
    tmp_path: Path, recorder: type[Recorder], warnings: list[str]
) -> None:
    recorder.troubles = {"images": OSError("full")}
    Image.new("RGB", (6, 4)).save(tmp_path / "sheet.png")
    with open_at(tmp_path, 0, "wandb") as log:
        log.picture(0, tmp_path / "sheet.png")
        log.log(1, "train", {"loss": 1.0})
    assert ("log", 1, {"unet/loss": 1.0}) in recorder.heard
    assert len(warnings) == 1


def test_a_tracker_that_does_not_open_is_left_out(
    tmp_path: Path, recorder: type[Recorder], warnings: list[str]
) -> None:
    recorder.troubles = {"start": ConnectionError("no network")}
    with open_at(tmp_path, 0, "wandb") as log:
        log.log(1, "train", {"loss": 1.0})
        log.log(2, "train", {"loss": 1.0})
    assert logged(tmp_path) == [("train", 1), ("train", 2)]
    assert [text.count("ConnectionError: no network") for text in warnings] == [1]
    assert [entry[0] for entry in recorder.heard] == ["open"]


def test_a_tracker_that_hangs_is_not_waited_for(
    tmp_path: Path, recorder: type[Recorder], warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(recorder, "hold", release)
    monkeypatch.setattr(remote, "WAITING", 3)
    monkeypatch.setattr(trackers, "CLOSING", 0.0)
    try:
        with open_at(tmp_path, 0, "wandb") as log:
            for step in range(20):
                log.log(step, "train", {"loss": 1.0})
            assert [entry[0] for entry in recorder.heard] in ([], ["open"]), "it did nothing all the while"
        assert len(logged(tmp_path)) == 20
        assert len(warnings) == 1
        assert "takes too long" in warnings[0]
    finally:
        release.set()


def test_every_tracker_of_accelerate_can_be_named() -> None:
    assert set(remote.KINDS) == set(LOGGER_TYPE_TO_CLASS)


def test_one_that_is_not_installed_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["tensorboard"])
    check_trackers(["tensorboard"])
    with pytest.raises(UserError, match=r"train\.trackers: wandb, aim not installed; `pip install wandb aim`"):
        check_trackers(["wandb", "tensorboard", "aim"])
