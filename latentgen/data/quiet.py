"""Pillow and libtiff kept off the terminal: warnings are dropped, libtiff's messages are collected for the caller."""

from __future__ import annotations

import ctypes
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from PIL import ImageFile, _imaging

log = logging.getLogger(__name__)

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)


class _PillowState:
    """No warnings and no half-read pictures, whatever another library asked of Pillow.

    Counted, for both are process-wide states and several threads decode at once: the first changes, the last restores.
    """

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.caught, self.lenient = warnings.catch_warnings(), False

    def enter(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.caught = warnings.catch_warnings()
                self.caught.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
                self.lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.caught.__exit__(None, None, None)
                ImageFile.LOAD_TRUNCATED_IMAGES = self.lenient


_state = _PillowState()
_messages = threading.local()
_installing = threading.Lock()


@contextmanager
def quiet_pillow() -> Iterator[list[str]]:
    """While inside, Pillow drops its Python warnings and refuses truncated files; libtiff's errors join the list.

    Safe to use from several threads: each gets the messages of its own thread.
    """
    with _installing:  # two threads at once would make two handlers, and libtiff call the one that is not kept
        _libtiff_handler()
    heard: list[str] = []
    _messages.heard = heard
    _state.enter()
    try:
        yield heard
    finally:
        _state.leave()
        _messages.heard = None


def _hear(module: bytes | None, form: bytes | None, arguments: Any) -> None:
    """libtiff's error handler; `arguments` (a C va_list) stays unread, the format string says enough."""
    heard = getattr(_messages, "heard", None)
    if heard is not None:
        text = (form or module or b"error").decode("utf-8", "replace")
        heard.append(re.sub(r"%[-+#0-9.]*[a-zA-Z]+", "?", text))


@lru_cache(maxsize=1)
def _libtiff_handler() -> Any:
    """Point libtiff's error output, which would go to the terminal from C, at `_hear`; the result keeps it alive.

    The library is found through Pillow's own extension module, whose dependency it is. Where the platform does not
    look symbols up that way, libtiff stays as it is and the log says so.
    """
    try:
        library = ctypes.CDLL(_imaging.__file__)
        set_handler, set_extended = library.TIFFSetErrorHandler, library.TIFFSetErrorHandlerExt
    except (OSError, AttributeError) as error:
        log.debug("libtiff's messages cannot be caught here: %s", error)
        return None
    handler = _Handler(_hear)
    for function in (set_handler, set_extended):
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
    set_handler(ctypes.cast(handler, ctypes.c_void_p))
    set_extended(None)
    return handler
