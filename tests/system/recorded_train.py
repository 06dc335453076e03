"""`train.py` that writes down its draws: what the launchers of several processes start in the tests.

STOP="RANK STEP" makes that process, and only that one, get a SIGINT in its STEP-th step.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recorder import record

from latentgen.cli.main import run_verb
from latentgen.engine.step import Stepper

plain_step = Stepper.__call__
steps = 0


def step(self: Stepper, *arguments: object) -> None:
    global steps
    steps += 1
    if os.environ.get("STOP") == f"{os.environ['RANK']} {steps}":
        signal.raise_signal(signal.SIGINT)
    plain_step(self, *arguments)  # type: ignore[arg-type]


if __name__ == "__main__":
    record(os.environ["DRAWS_FOLDER"])
    Stepper.__call__ = step  # type: ignore[method-assign]
    run_verb("train")
