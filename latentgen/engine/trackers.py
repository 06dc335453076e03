"""Where measurements go: metrics.jsonl always, and the trackers that the recipe names beside it."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate.tracking import get_available_trackers

from latentgen.core.errors import UserError
from latentgen.core.files import naming, write_json, write_text
from latentgen.engine.remote import KINDS, Place, Remote, quiet_threads, send_picture, send_values

CLOSING, LEAVING = 30.0, 3.0
"""Seconds that all trackers together are waited for at the end of a stage, and when it is left early."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise `UserError` unless every tracker is installed; called before anything is written."""
    found = {str(name) for name in get_available_trackers()}
    missing = [name for name in dict.fromkeys(names) if name not in found]
    if missing:
        packages = " ".join(KINDS[name].package for name in missing)
        raise UserError(
            f"train.trackers: {', '.join(missing)} not installed; `pip install {packages}`, "
            "or leave it out (metrics.jsonl is always written)"
        )


class Trackers:
    """Append-only log of one stage; use as a context manager.

    On resume the lines of metrics.jsonl that will be written again are dropped, so that each step of a stage has one
    line of a kind. What other trackers were sent cannot be taken back; the same numbers come again, and are not sent
    a second time. `sent` in `trackers/STAGE.json` keeps how far that was, also over several stops.

    Args:
        metrics: the log of the whole run, in its folder, which gives trackers their project's name.
        tensorboard: folder of event files, one below it for each stage.
        names: other trackers, each as `remote.KINDS` calls it.
        active: only one process of several writes.
        again: kinds of lines of `start_step` that will be written again.
    """

    def __init__(
        self,
        metrics: Path,
        tensorboard: Path,
        *,
        stage: str,
        start_step: int,
        names: Sequence[str] = (),
        active: bool = True,
        again: Collection[str] = ("preview",),
    ) -> None:
        self.stage, self.active = stage, active
        self._remotes: list[Remote] = []
        self._threads = quiet_threads()
        if not active:
            return
        metrics.parent.mkdir(parents=True, exist_ok=True)
        before: list[dict[str, Any]] = []
        if metrics.is_file():
            before = [json.loads(line) for line in metrics.read_text().splitlines() if _whole(line)]
            kept = [line for line in before if not _ahead(line, stage, start_step, again)]
            write_text(metrics, "".join(json.dumps(line) + "\n" for line in kept))
        key, self._sent = _progress(metrics.parent / "trackers" / f"{stage}.json", before, stage)
        self._file = open(metrics, "a", buffering=1)
        place = Place(metrics.parent, tensorboard, stage, key)
        self._remotes = [Remote(name, place) for name in dict.fromkeys(names)]

    def log(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Write the measurements of `step` (optimizer steps done); `kind` is "train", "preview" or another word.

        metrics.jsonl takes any JSON values; trackers get the numbers among them.
        """
        if not self.active:
            return
        finite = {key: value if not _wild(value) else str(value) for key, value in values.items()}
        with naming(Path(self._file.name)):
            self._file.write(json.dumps({"stage": self.stage, "kind": kind, "step": step, **finite}) + "\n")
        if step <= self._sent.get(kind, -1):
            return
        prefix = self.stage if kind in ("train", "preview") else f"{self.stage}/{kind}"
        numbers = {f"{prefix}/{key}": value for key, value in values.items() if isinstance(value, int | float)}
        for remote in self._remotes:
            if numbers:
                remote.send(send_values(numbers, step))

    def picture(self, step: int, path: Path) -> None:
        """Show the preview sheet of `step` in the trackers that can show pictures; call before its `log`."""
        if not self.active or not path.is_file() or step <= self._sent.get("preview", -1):
            return
        for remote in self._remotes:
            show = KINDS[remote.name].show
            if show is not None:
                remote.send(send_picture(show, f"{self.stage}/preview", path, step))

    def __enter__(self) -> Trackers:
        self._threads.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            self._file.close()
            for remote in self._remotes:
                remote.end()
            deadline = time.monotonic() + (CLOSING if kind is None else LEAVING)
            for remote in self._remotes:
                remote.wait(deadline)
        self._threads.__exit__(None, None, None)


def _progress(path: Path, before: list[dict[str, Any]], stage: str) -> tuple[str, dict[str, int]]:
    """A name for this stage of this run, as good as unique, and the last step that trackers have of each kind."""
    known: dict[str, Any] = {"key": uuid.uuid4().hex, "sent": {}}
    if path.is_file():
        known = json.loads(path.read_text())
    sent: dict[str, int] = dict(known["sent"])
    for line in before:
        if line.get("stage") == stage and isinstance(line.get("step"), int):
            kind = str(line.get("kind"))
            sent[kind] = max(sent.get(kind, -1), line["step"])
    write_json(path, {"key": known["key"], "sent": sent})
    return known["key"], sent


def _wild(value: Any) -> bool:
    """JSON has no word for infinity, or for what is not a number."""
    return isinstance(value, float) and not math.isfinite(value)


def _whole(line: str) -> bool:
    """A kill may leave the last line cut."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _ahead(line: dict[str, Any], stage: str, start_step: int, again: Collection[str]) -> bool:
    """Training resumes after `start_step` and does the kinds in `again` of that step again."""
    step = line.get("step")
    if line.get("stage") != stage or not isinstance(step, int):
        return False
    return step > start_step or (step == start_step and line.get("kind") in again)
