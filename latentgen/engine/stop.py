"""Ctrl-C, SIGTERM and SIGUSR1 as a request: finish the step, save, leave; where no step is done, leave at once."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from latentgen.core.errors import Interrupted

ECHO = 1.0
"""Seconds in which further signals are taken for the same request: launchers pass on the Ctrl-C that the terminal
has already sent to every process."""

SAID = "stopped; the same command continues"


class StopRequest:
    """While entered, the first of `signals` sets `asked`, and raises `Interrupted` in the main thread.

    Within `postponed` it only sets `asked`: for work that asks, and has something to save. One more signal, later than
    `ECHO`, raises KeyboardInterrupt anywhere. Entering it again while it is entered changes nothing.

    Attributes:
        asked: a signal came here, or `ask` was called: to another process.
    """

    signals = (signal.SIGINT, signal.SIGTERM, *((signal.SIGUSR1,) if os.name != "nt" else ()))

    def __init__(self) -> None:
        self.asked = False
        self._first: float | None = None
        self._passed_on = False
        self._entered = self._postponed = 0
        self._before: dict[signal.Signals, Any] = {}

    def ask(self) -> None:
        """From another thread: another process was asked. A signal that comes here later is still the first one."""
        if not self.asked:
            self.asked = True
            if self._before:
                self._passed_on = True
                _thread.interrupt_main(signal.SIGTERM)

    @contextlib.contextmanager
    def postponed(self) -> Iterator[None]:
        """Within it the first signal raises nothing."""
        self._postponed += 1
        try:
            yield
        finally:
            self._postponed -= 1

    def _handle(self, number: int, frame: FrameType | None) -> None:
        raises = not self.asked or self._passed_on  # else it is known, and this process is leaving
        self.asked = True
        if self._passed_on:
            self._passed_on = False
        elif self._first is None:
            self._first = time.monotonic()
        elif time.monotonic() - self._first > ECHO:
            self._restore()
            raise KeyboardInterrupt
        if raises and not self._postponed:
            raise Interrupted(SAID)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __enter__(self) -> StopRequest:
        self._entered += 1
        if self._entered == 1 and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in self.signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered -= 1
        if not self._entered:
            self._restore()
