"""Pictures are tried out in other processes: what crashes or hangs there is one file's loss, with a reason."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentgen.data.checking import Trials, check_pictures
from latentgen.data.images import BadPicture

ROOT = Path(__file__).parents[2]


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (4, 5 + number % 3, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def trials() -> Iterator[Trials]:
    made = Trials((sys.executable, str(Path(__file__).with_name("crashing_trial.py"))), most=2, patience=1.0)
    yield made
    made.close()


def test_one_that_crashes_or_hangs_loses_itself_alone(trials: Trials) -> None:
    bad = [b"SEGV", b"ABRT", b"HANG", b"EXIT", b"HUGE", b"LOUD"]
    files = [content for number in range(6) for content in (png(number), bad[number] + b"x" * 200_000)]
    found = trials.check([partial(bytes, content) for content in files], 1000)
    assert [each.size for each in found[::2]] == [(4, 5 + number % 3) for number in range(6)]
    assert [each.digest for each in found[::2]] == [hashlib.sha256(png(number)).hexdigest() for number in range(6)]
    reasons = [each.reason for each in found[1::2]]
    assert "its decoder crashed (SIGSEGV)" in reasons
    assert "its decoder crashed (SIGABRT)" in reasons
    assert "its decoder did not end within 1 seconds" in reasons
    assert "its decoder ended the process (exit code 3)" in reasons
    assert all(reasons)


def test_what_cannot_be_read_has_its_own_reason(trials: Trials) -> None:
    def gone() -> bytes:
        raise BadPicture("the file cannot be read")

    found = trials.check([partial(png, 1), gone, partial(bytes, b"")], 1000)
    assert [each.reason for each in found] == ["", "the file cannot be read", "the file is empty (0 bytes)"]


def test_pixels_are_limited_each_time(trials: Trials) -> None:
    (small,) = trials.check([partial(png, 0)], 19)
    (large,) = trials.check([partial(png, 0)], 20)
    assert "at most 19 are allowed" in small.reason
    assert large.reason == ""


SCRIPT = """
import sys
from functools import partial
from latentgen.data.checking import check_pictures
files = [b"no picture"] * 3
print([c.reason for c in check_pictures([partial(bytes, f) for f in files], 100)])
if len(sys.argv) > 1:
    def slow():
        print("begun", flush=True)
        import time
        time.sleep(0.2)
        return b"x"
    check_pictures([slow] * 1000, 100)
"""


def test_ctrl_c_ends_it_at_once_and_nothing_is_left_behind() -> None:
    env = {"PYTHONPATH": str(ROOT), "PATH": ""}
    command = [sys.executable, "-c", SCRIPT, "slow"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "not a picture" in process.stdout.readline()
    assert process.stdout.readline() == "begun\n"
    process.send_signal(2)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in error


def test_the_usual_ones_say_the_same_and_live_on() -> None:
    begun = check_pictures([partial(png, number) for number in range(9)], 1000)
    assert [each.size for each in begun] == [(4, 5 + number % 3) for number in range(9)]
    assert check_pictures([partial(png, number) for number in range(9)], 1000) == begun
    assert check_pictures([], 1000) == []
