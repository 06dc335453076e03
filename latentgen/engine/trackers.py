"""Where measurements go: metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

from latentgen.core.files import write_text


class Trackers:
    """Append-only log of one run; use as a context manager.

    On resume the lines that will be written again are dropped, so that each step of a stage has one line of a kind.
    """

    def __init__(self, metrics: Path, tensorboard: Path, *, stage: str, start_step: int, active: bool = True) -> None:
        self.stage, self.active = stage, active
        if not active:
            return
        metrics.parent.mkdir(parents=True, exist_ok=True)
        if metrics.is_file():
            lines = [line for line in metrics.read_text().splitlines() if _whole(line)]
            kept = [line for line in lines if not _ahead(json.loads(line), stage, start_step)]
            write_text(metrics, "".join(line + "\n" for line in kept))
        self._file = open(metrics, "a", buffering=1)
        self._board = SummaryWriter(str(tensorboard / stage), purge_step=start_step)

    def log(self, step: int, kind: str, values: dict[str, float]) -> None:
        """Write the measurements of `step` (optimizer steps done); `kind` is "train" or "preview"."""
        if not self.active:
            return
        finite = {key: value if math.isfinite(value) else str(value) for key, value in values.items()}
        self._file.write(json.dumps({"stage": self.stage, "kind": kind, "step": step, **finite}) + "\n")
        for key, value in values.items():
            self._board.add_scalar(f"{self.stage}/{key}", value, step)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            self._file.close()
            self._board.close()


def _whole(line: str) -> bool:
    """A kill may leave the last line cut."""
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _ahead(line: dict[str, object], stage: str, start_step: int) -> bool:
    """Training resumes after `start_step` and draws that step's preview again."""
    step = line.get("step")
    if line.get("stage") != stage or not isinstance(step, int):
        return False
    return step > start_step or (step == start_step and line.get("kind") == "preview")
