"""How the programs speak: plain lines on standard error, rank 0 only unless it is a warning."""

from __future__ import annotations

import logging
import sys
import warnings


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


def counted(number: float) -> str:
    """A count in a reader's units: 950, 12.3k, 4.31M, 1.20e+14."""
    if number < 1000:
        return f"{number:.0f}"
    for unit, size in (("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12)):
        if number < 1000 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.2e}"
