"""A process that dies, is halted or hangs: the others end too, with its name, and the same command goes on."""

from __future__ import annotations

import os
import re
import signal

import pytest
from worlds import world

STEP, ENCODED = "latentgen.engine.step:Stepper.__call__", "latentgen.tasks.caching:encode_moments"
FETCH, PREVIEW = "latentgen.data.fetch:PictureBatches.__call__", "latentgen.tasks.vae:VaeTask.preview"
KILL, STOP, TERM = int(signal.SIGKILL), int(signal.SIGSTOP), int(signal.SIGTERM)
SOON = {"beat": 0.2, "silence": 5.0, "grace": 1.0, "parting": 3.0}
"""A process is never so slow on a busy machine that it would be given up for it."""


@pytest.fixture
def two(programs, mini, tmp_path):
    """Starts both processes of a run, each with its faults: hooks."""

    def start(*faults, patience=SOON):
        command = ("train", "--config", mini(tmp_path), "--device", "cpu")
        pairs = zip(world(2), faults, strict=True)
        return [programs.start(*command, cwd=tmp_path, env=env, patience=patience, **hooks) for env, hooks in pairs]

    return start


def line(done, rank: int, pid: int) -> str:
    """The one line that says which process is lost."""
    found = [text for text in done.errors if text.startswith("error: ")]
    assert len(found) == 1, done.err
    assert re.match(rf"error: process {rank} of 2 \(host \S+, pid {pid}\) ", found[0])
    assert found[0].endswith("; the newest checkpoint is untouched; run the same command again")
    assert "Traceback" not in done.err
    return found[0]


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("number", [KILL, STOP], ids=["killed", "halted"])
def test_the_other_process_says_who_is_lost_and_ends(number, lost, two, programs, tmp_path):
    faults = [{}, {}]
    faults[lost] = {"kill": [STEP, 5, number]}
    both = two(*faults)
    done = programs.end(both[1 - lost])
    assert done.code == 4, done.err
    said = line(done, lost, both[lost].pid)
    assert ("has died" if number == KILL else "has not answered for 5 s") in said
    assert "vae, " in said
    if number == STOP:
        os.kill(both[lost].pid, signal.SIGKILL)
    programs.end(both[lost])
    if lost == 1 and number == KILL:
        again = programs("train", "--config", tmp_path / "mini.yaml", cwd=tmp_path, kill=[STEP, 1, KILL])
        assert "continuing after step 3 of 6" in again.err


def test_a_process_killed_while_both_cache(two, programs):
    slow = {"slow": [ENCODED, 0.5], "chunk": 8}
    both = two(slow, {**slow, "kill": [ENCODED, 2, KILL]})
    done = programs.end(both[0])
    assert done.code == 4, done.err
    assert "has died; it was at: caching latents" in line(done, 1, both[1].pid)
    programs.end(both[1])


def test_a_main_thread_that_hangs_while_its_heart_beats(two, programs):
    both = two({}, {"halt": [FETCH, 3, 600.0]}, patience={**SOON, "hang": 5.0})
    ends = [programs.end(running) for running in both]
    assert [end.code for end in ends] == [4, 4], "the one that hangs too"
    assert "has not moved for 5 s; it was at: vae, data of step 1" in line(ends[0], 1, both[1].pid)


def test_a_long_preview_is_waited_for(two, programs, tmp_path):
    """Longer than silence may last; the second process is asked to stop after it, to be done sooner."""
    both = two({"halt": [PREVIEW, 1, 8.0]}, {"ask": [STEP, 1, TERM, 1]})
    ends = [programs.end(running) for running in both]
    assert [end.code for end in ends] == [75, 75], ends
    assert "stopped after step 1 of 6" in ends[0].errors[-1]


def test_a_mistake_that_one_process_meets_ends_the_other(two, programs):
    both = two({}, {"fail": [STEP, 2, "that is no picture"]})
    ends = [programs.end(running) for running in both]
    assert ends[1].code == 2
    assert ends[1].errors[-1] == "error: that is no picture"
    assert ends[0].code == 4
    assert "ended with an error; it was at: vae, step 2" in line(ends[0], 1, both[1].pid)
