"""Every picture of a set decoded once, before anything is trained on it: what is broken is known by name beforehand.

Pictures are tried out in processes of their own. One that crashes its decoder, or makes it hang, loses that file alone.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from latentgen.data.frame import Shape
from latentgen.data.images import BadPicture
from latentgen.data.trial import HEADER

COMMAND = (sys.executable, "-m", "latentgen.data.trial")
PATIENCE = 60.0
"""Seconds that a picture may take, and one more for each of its megabytes."""


class Checked(NamedTuple):
    """What is known of a picture's file.

    Attributes:
        digest: SHA-256 of its content; "" where it cannot be used.
        size: height and width, upright.
        reason: why it cannot be used; "" where it can.
    """

    digest: str
    size: Shape
    reason: str = ""


def check_pictures(contents: Sequence[Callable[[], bytes]], max_pixels: int) -> list[Checked]:
    """Decode all pictures, several at a time; the results in their order.

    Args:
        contents: each gives a file's bytes, or raises `BadPicture`.
        max_pixels: larger pictures are refused.
    """
    return _trials(os.getpid()).check(contents, max_pixels)


class Trials:
    """Processes that try pictures out. They live on, because starting one takes longer than most pictures.

    Args:
        command: what starts one.
        most: how many there are at a time.
        patience: see `PATIENCE`.
    """

    def __init__(self, command: Sequence[str] = COMMAND, most: int | None = None, patience: float = PATIENCE) -> None:
        self.command, self.patience = list(command), patience
        # Few, for each may hold a large picture.
        self.most = most or min(4, os.cpu_count() or 1)
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()

    def check(self, contents: Sequence[Callable[[], bytes]], max_pixels: int) -> list[Checked]:
        """See `check_pictures`."""
        stopped = threading.Event()

        def check(content: Callable[[], bytes]) -> Checked:
            return Checked("", (0, 0), "stopped") if stopped.is_set() else self._check(content, max_pixels)

        pool = ThreadPoolExecutor(max_workers=min(self.most, max(1, len(contents) // 4)))
        try:
            return list(pool.map(check, contents))
        finally:  # after Ctrl-C nothing that waits is begun
            stopped.set()
            pool.shutdown(cancel_futures=True)

    def close(self) -> None:
        """End all processes."""
        while True:
            try:
                process = self._idle.get_nowait()
            except queue.Empty:
                return
            process.kill()
            process.communicate()

    def _check(self, content: Callable[[], bytes], max_pixels: int) -> Checked:
        try:
            data = content()
        except BadPicture as error:
            return Checked("", (0, 0), str(error))
        answer = self._ask(data, max_pixels)
        if isinstance(answer, str):
            return Checked("", (0, 0), answer)
        height, width = answer
        return Checked(hashlib.sha256(data).hexdigest(), (height, width))

    def _ask(self, data: bytes, max_pixels: int) -> Shape | str:
        """Height and width, or the reason why there are none."""
        try:
            process = self._idle.get_nowait()
        except queue.Empty:
            process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        limit = self.patience + len(data) / 2**20
        end = threading.Timer(limit, process.kill)
        end.start()
        # A crash while the picture is still being sent breaks the pipe; that there is no answer tells it as well.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(HEADER.pack(len(data), max_pixels) + data)
            process.stdin.flush()
        line = process.stdout.readline()
        in_time = end.is_alive()
        end.cancel()
        if in_time and line.endswith(b"\n"):
            self._idle.put(process)
            answer = json.loads(line)
            return answer["reason"] if "reason" in answer else tuple(answer["size"])
        process.kill()
        with contextlib.suppress(BrokenPipeError):
            process.communicate()
        return _death(process.returncode) if in_time else f"its decoder did not end within {limit:.0f} seconds"

    def _started(self) -> subprocess.Popen[bytes]:
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        # What C libraries say goes nowhere: the reason says what there is to say.
        return subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env
        )


@lru_cache(maxsize=1)
def _trials(process: int) -> Trials:
    """Those of this process: one that was forked has its own."""
    del process
    trials = Trials()
    atexit.register(trials.close)
    return trials


def _death(code: int) -> str:
    if code >= 0:
        return f"its decoder ended the process (exit code {code})"
    return f"its decoder crashed ({signal.Signals(-code).name})"
