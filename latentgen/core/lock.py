"""A lock on a folder that ends with the process that holds it, however that ends.

The system holds it (flock), not the file: a file left behind by a crash locks nothing.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from latentgen.core.errors import UserError

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""What file systems answer that have no locks."""


class FolderLock:
    """One process at a time: take it with `acquire` or `wait`; as a context manager it gives it back at the end.

    Args:
        folder: made if absent; the lock is its file `lock`, which says who holds it and is removed at the end.
        what: shown to the user ("the run runs/quickstart").
    """

    def __init__(self, folder: Path, what: str) -> None:
        self.path, self.what = Path(folder) / "lock", what
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            UserError: another process has it; names that process and its machine.
        """
        if not self._try():
            raise UserError(f"{self.what} is in use by {self._holder()}; wait for that to end, or choose another name=")

    def wait(self, pause: float = 0.2, alive: Callable[[], object] = lambda: None, level: int = logging.INFO) -> None:
        """Take the lock as soon as nobody else has it; says once (at the log's `level`) whom it waits for, and calls
        `alive` all the while."""
        told = False
        while not self._try():
            if not told:
                logger.log(level, "%s is in use by %s: waiting for that to end", self.what, self._holder())
                told = True
            alive()
            time.sleep(pause)

    def release(self) -> None:
        """Give the lock back, and leave no file behind."""
        if self._handle is not None:
            self.path.unlink(missing_ok=True)  # before it is given back: whoever gets it next must not lose its file
            self._close()

    def _try(self) -> bool:
        assert self._handle is None, "this lock is taken already"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            if not self._locked(handle):
                os.close(handle)
                return False
            if _same_file(handle, self.path):
                break
            os.close(handle)  # its last holder has just removed it: what was locked is no longer the folder's lock
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        self._handle = handle
        # The lock belongs to the open file, which forked data workers share: theirs must not outlive this process.
        close = weakref.WeakMethod(self._close)
        os.register_at_fork(after_in_child=lambda: (method := close()) and method())
        return True

    def _locked(self, handle: int) -> bool:
        if sys.platform == "win32":  # no second process can remove or truncate an open file there
            return True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logger.warning("%s: this disk has no locks; make sure that nothing else uses it", self.path.parent)
        return True

    def _holder(self) -> str:
        try:
            found = json.loads(self.path.read_text())
            return f"process {found['pid']} on {found['host']}"
        except (OSError, ValueError):  # it has this moment taken it, or given it back
            return "another process"

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def share(handle: int, path: Path) -> bool:
    """Say that this open file is in use, until it is closed; false when `path` was removed in the meantime."""
    if sys.platform != "win32":
        try:
            fcntl.flock(handle, fcntl.LOCK_SH)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
    return _same_file(handle, path)


def remove_unused(path: Path) -> bool:
    """Remove a file unless somebody has said (with `share`) that it is in use; whether it is gone."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        if sys.platform != "win32":
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS and not isinstance(error, PermissionError):
            raise
        return False
    finally:
        os.close(handle)
    return True


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
