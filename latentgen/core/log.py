"""How the programs speak: plain lines on standard error, rank 0 only unless it is a warning."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def setup_logging(main_process: bool = True) -> None:
    """Send the package's log lines to standard error; other libraries are heard from WARNING on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plain())
    logger = logging.getLogger("latentgen")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if main_process else logging.WARNING)
    # Libraries warn about their own internals on every run; a user can do nothing about those.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def progress(
    what: str,
    unit: str,
    *,
    over: Iterable[Any] | None = None,
    total: int | None = None,
    initial: int = 0,
    leave: bool = True,
    disable: bool = False,
) -> tqdm[Any]:
    """A progress bar on standard error; where that is no terminal, a line now and then instead of thousands."""
    every = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(
        over, what, total=total, initial=initial, unit=unit, leave=leave, disable=disable, mininterval=every, miniters=1
    )


def counted(number: float) -> str:
    """A count in a reader's units: 950, 12.3k, 4.31M, 1.20e+14."""
    if number < 1000:
        return f"{number:.0f}"
    for unit, size in (("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12)):
        if number < 1000 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.2e}"
