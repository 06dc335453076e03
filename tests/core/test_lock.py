"""One process at a time, and a lock ends with its process."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from latentgen.core.errors import UserError
from latentgen.core.lock import FolderLock


def fork(work: Callable[[], object]) -> int:
    """A process that does `work` and then sleeps until it is killed."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            time.sleep(60)
        finally:
            os._exit(1)
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def holding(folder: Path) -> int:
    """A process that has the lock of `folder`."""
    ready, told = os.pipe()

    def work() -> None:
        lock = FolderLock(folder, "it")
        lock.acquire()
        os.write(told, b"!")
        time.sleep(60)

    pid = fork(work)
    assert os.read(ready, 1) == b"!"
    return pid


def test_a_second_one_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    pid = holding(tmp_path / "run")
    try:
        with pytest.raises(UserError, match=f"the run x is in use by process {pid} on {socket.gethostname()}; "):
            FolderLock(tmp_path / "run", "the run x").acquire()
    finally:
        kill(pid)


def test_a_kill_leaves_no_lock_behind(tmp_path: Path) -> None:
    kill(holding(tmp_path))
    assert (tmp_path / "lock").is_file(), "the file is still there, and locks nothing"
    with FolderLock(tmp_path, "it") as lock:
        lock.acquire()
        assert str(os.getpid()) in (tmp_path / "lock").read_text()
    assert not (tmp_path / "lock").exists()


def test_two_in_one_process(tmp_path: Path) -> None:
    with FolderLock(tmp_path, "it") as lock:
        lock.acquire()
        with pytest.raises(UserError, match="in use"):
            FolderLock(tmp_path, "it").acquire()
    FolderLock(tmp_path, "it").acquire()


def test_forked_workers_do_not_keep_it(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path, "it")
    lock.acquire()
    worker = fork(lambda: None)
    lock.release()
    try:
        FolderLock(tmp_path, "it").acquire()
    finally:
        kill(worker)


def test_a_worker_that_ends_does_not_give_it_back(tmp_path: Path) -> None:
    with FolderLock(tmp_path, "it") as lock:
        lock.acquire()
        kill(fork(lambda: None))
        with pytest.raises(UserError, match="in use"):
            FolderLock(tmp_path, "it").acquire()


def test_waiting_says_for_whom_and_ends_with_the_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pid, taken = holding(tmp_path), threading.Event()

    def wait() -> None:
        with FolderLock(tmp_path, "the cache of things") as lock:
            lock.wait(pause=0.001)
            taken.set()

    with caplog.at_level(logging.INFO):
        thread = threading.Thread(target=wait)
        thread.start()
        while not caplog.records:
            time.sleep(0.001)
        assert not taken.is_set()
        kill(pid)
        thread.join()
    assert taken.is_set()
    assert f"the cache of things is in use by process {pid}" in caplog.text
