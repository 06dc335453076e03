"""Lets two training programs take turns, and tells the processor time each spends on a step."""

from __future__ import annotations

import json
import sys
import time
from typing import Any, TextIO


class Pace:
    """Call `step` after every step: at the end of a turn it reports the turn and waits for a line on standard input.

    Args:
        turn: steps of a turn.
        out: where to report, one JSON line a turn.
        wall: measure by the clock instead, where the work is another device's.
    """

    def __init__(self, turn: int, out: TextIO, wall: bool = False) -> None:
        self.turn, self.out, self.clock = turn, out, time.perf_counter if wall else time.process_time
        self.count, self.losses = 0, list[float]()
        self.since = self.clock()

    def step(self, loss: float | None = None) -> None:
        """One step is done; its loss, where it has been read anyway."""
        self.count += 1
        if loss is not None:
            self.losses.append(loss)
        if self.count % self.turn == 0:
            self.report(seconds=self.clock() - self.since, losses=self.losses)
            if not sys.stdin.readline():
                raise SystemExit(0)
            self.losses, self.since = [], self.clock()

    def report(self, **values: Any) -> None:
        print(json.dumps({"steps": self.turn, **values}), file=self.out, flush=True)
