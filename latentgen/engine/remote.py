"""Trackers of other makers, through accelerate's classes: TensorBoard, Weights & Biases and the rest.

Each is fed by a thread of its own, so that no step waits for a network. A failure is said once, with the tracker's
name, and training goes on: metrics.jsonl has everything.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image

from latentgen.core.files import write_text

logger = logging.getLogger(__name__)

WAITING = 1000
"""Lines that may wait for a slow tracker; further ones are missed."""


@dataclass(frozen=True)
class Place:
    """What a tracker is told of a stage.

    Args:
        run: the run folder; its name is the project's.
        tensorboard: folder of event files.
        stage: names the run within the project.
        key: 32 hexadecimal digits, the same whenever this stage is continued.
    """

    run: Path
    tensorboard: Path
    stage: str
    key: str

    @property
    def project(self) -> str:
        return self.run.resolve().name

    def number_file(self, name: str) -> Path:
        """Where the identity that a service gave to this stage is kept."""
        return self.run / "trackers" / f"{self.stage}.{name}"

    def config(self) -> dict[str, Any]:
        """The recipe as `section.key: value`, for trackers that list hyperparameters; empty where there is none."""
        path = self.run / "recipe.yaml"
        return _flat(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.is_file() else {}


Job = Callable[[GeneralTracker], None]
Show = Callable[[GeneralTracker, str, Path, int], None]


@dataclass(frozen=True)
class Kind:
    """One kind of tracker.

    Args:
        package: what pip installs.
        arguments: (place, identity that the service gave earlier or None) -> what accelerate's class is made with.
        identity: reads the identity that the service gave, for services where one cannot choose it.
        show: sends a picture; None where accelerate has no way to.
        recipe: whether hyperparameters are sent.
    """

    package: str
    arguments: Callable[[Place, str | None], dict[str, Any]]
    identity: Callable[[Any], str] | None = None
    show: Show | None = None
    recipe: bool = True


class Remote:
    """One tracker and its thread.

    A line that fails is missed, and the next one tried; a tracker that does not open is left out until the next stage
    or start. Both are warned of once.
    """

    def __init__(self, name: str, place: Place) -> None:
        self.name = name
        self._place = place
        self._jobs: queue.Queue[Job | None] = queue.Queue(WAITING)
        self._missed = 0
        self._warned = threading.Lock()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def send(self, job: Job) -> None:
        """Have `job` done soon; never waits."""
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self._missed += 1
            self._warn("it takes too long")

    def end(self) -> None:
        """Nothing more will be sent."""
        self._ending.set()
        with contextlib.suppress(queue.Full):  # then it is not waiting for anything to come
            self._jobs.put_nowait(None)

    def wait(self, deadline: float) -> None:
        """Let it finish, but not beyond `deadline` on the monotonic clock."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._missed += self._jobs.qsize()
            self._warn("it was not done in time and was left")
        if self._missed:
            logger.info("tracker %s missed %d entries", self.name, self._missed)

    def _work(self) -> None:
        tracker: GeneralTracker | None = None
        try:
            tracker = open_tracker(self.name, self._place)
        except BaseException as error:  # some call sys.exit
            self._warn(_told(error))
        while not (self._ending.is_set() and self._jobs.empty()) and (job := self._jobs.get()) is not None:
            if tracker is None:
                self._missed += 1
            else:
                self._try(job, tracker)
        if tracker is not None:
            self._try(lambda opened: opened.finish(), tracker)

    def _try(self, job: Job, tracker: GeneralTracker) -> None:
        try:
            job(tracker)
        except BaseException as error:
            self._missed += 1
            self._warn(_told(error))

    def _warn(self, why: str) -> None:
        """Say why something is missed: the first time only."""
        if self._warned.acquire(blocking=False):
            logger.warning("tracker %s: %s; training goes on, metrics.jsonl has everything", self.name, why)


@contextlib.contextmanager
def quiet_threads() -> Iterator[None]:
    """Within it, a thread that a tracker's library has made for itself, and that fails, is told of in one line.

    TensorBoard writes its files from such a thread: a full disk ends it with a traceback that nobody can catch.
    """
    plain = threading.excepthook

    def told(failed: threading.ExceptHookArgs) -> None:
        library = type(failed.thread).__module__.partition(".")[0]
        if library not in KINDS or failed.exc_value is None:
            plain(failed)
        else:
            logger.warning("tracker %s: %s; training goes on without it", library, _told(failed.exc_value))

    threading.excepthook = told
    try:
        yield
    finally:
        threading.excepthook = plain


def open_tracker(name: str, place: Place) -> GeneralTracker:
    """Begin, or go on with, the stage in a tracker."""
    kind, file = KINDS[name], place.number_file(name)
    known = file.read_text().strip() if file.is_file() else None
    tracker = LOGGER_TYPE_TO_CLASS[name](**kind.arguments(place, known))
    tracker.start()
    if kind.identity is not None:
        write_text(file, kind.identity(tracker) + "\n")
    config = place.config()
    if kind.recipe and config and known is None:
        tracker.store_init_configuration(config)
    return tracker


def send_values(values: Mapping[str, float], step: int) -> Job:
    """The job that logs numbers."""
    return lambda tracker: tracker.log(dict(values), step=step)


def send_picture(show: Show, name: str, path: Path, step: int) -> Job:
    """The job that shows a picture."""
    return lambda tracker: show(tracker, name, path, step)


def _told(error: BaseException) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:200]}".removesuffix(": ")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value if isinstance(value, int | float | str) else str(value)
    return flat


def _pixels(path: Path) -> np.ndarray:
    """A picture as `[h, w, 3]` in 0..255."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def _show_board(tracker: Any, name: str, path: Path, step: int) -> None:
    tracker.log_images({name: _pixels(path)[None]}, step=step, dataformats="NHWC")


def _show_list(tracker: Any, name: str, path: Path, step: int) -> None:
    tracker.log_images({name: [_pixels(path)]}, step=step)


def _show_one(tracker: Any, name: str, path: Path, step: int) -> None:
    tracker.log_images({name: Image.fromarray(_pixels(path))}, step=step)


KINDS: Mapping[str, Kind] = {
    "tensorboard": Kind(
        "tensorboard",
        lambda place, known: {"run_name": place.stage, "logging_dir": str(place.tensorboard)},
        show=_show_board,
        recipe=False,  # it would make a further run of them
    ),
    "wandb": Kind(
        "wandb",
        lambda place, known: {
            "run_name": place.project,
            "name": place.stage,
            "id": place.key,
            "resume": "allow",
            "dir": str(place.run),
        },
        show=_show_list,
    ),
    "mlflow": Kind(
        "mlflow",
        lambda place, known: {"experiment_name": place.project, "run_name": place.stage, "run_id": known},
        identity=lambda tracker: tracker.tracker.info.run_id,
    ),
    "comet_ml": Kind(
        "comet_ml",
        lambda place, known: {"run_name": place.project, "experiment_key": place.key, "mode": "get_or_create"},
    ),
    "aim": Kind(
        "aim",
        lambda place, known: {
            "run_name": place.stage,
            "logging_dir": str(place.run),
            "experiment": place.project,
            "run_hash": known,
            "force_resume": known is not None,  # a run that was killed has left its lock
        },
        identity=lambda tracker: tracker.tracker.hash,
        show=_show_one,
    ),
    "clearml": Kind(
        "clearml",
        lambda place, known: {
            "run_name": place.project,
            "task_name": place.stage,
            # Continued from 0, or it would add the last step to every further one.
            **({"reuse_last_task_id": known, "continue_last_task": 0} if known else {"reuse_last_task_id": False}),
        },
        identity=lambda tracker: tracker.tracker.id,
        show=_show_one,
    ),
    "dvclive": Kind(
        "dvclive",
        lambda place, known: {"dir": str(place.run / "dvclive" / place.stage), "resume": True, "save_dvc_exp": False},
    ),
    "swanlab": Kind(
        "swanlab",
        lambda place, known: {
            "run_name": place.project,
            "experiment_name": place.stage,
            "id": place.key[:21],  # earlier versions want exactly so many
            "resume": "allow",
            "logdir": str(place.run / "swanlab"),
        },
        show=_show_list,
    ),
    "trackio": Kind(
        "trackio",
        lambda place, known: {"run_name": place.project, "name": place.stage, "resume": "allow"},
    ),
}
