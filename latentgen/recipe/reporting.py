"""What a run writes about itself beside its measurements: when it was started and where, and its page."""

from __future__ import annotations

import json
import logging
import platform
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from latentgen import __version__
from latentgen.core.files import write_json
from latentgen.evals.run_report import write_report

logger = logging.getLogger(__name__)


def note_start(run: Path, examples: int, accelerator: Accelerator) -> None:
    """Add a line to `starts.json`: each command that trains this run is one."""
    path, device = run / "starts.json", accelerator.device
    before: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    cpu = f"CPU, {torch.get_num_threads()} threads"
    start = {
        "started": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "examples": examples,
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else cpu
        if device.type == "cpu"
        else device.type,
        "latentgen": __version__,
        "torch": version("torch"),
        "python": platform.python_version(),
    }
    write_json(path, [*before, start])


class Reporter:
    """Makes `report.html` anew whenever it is called. A failure is said once, and never stops a run."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._warned = False

    def __call__(self) -> None:
        try:
            write_report(self._run)
        except Exception as error:
            if not self._warned:
                first = next(iter(str(error).splitlines()), "")
                logger.warning("report.html was not written (%s: %s); training goes on", type(error).__name__, first)
            self._warned = True
