"""Mistakes become one line and an exit code; only faults of the program itself show a traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

import typer
from safetensors import SafetensorError

from latentgen.core.errors import LOST, STOPPED, Elsewhere, Interrupted, Lost, UserError

USER_ERROR, NOT_FINITE, INTERRUPTED = 2, 3, 130
"""Exit codes: the user's to mend; training went wrong and stopped itself; left at once. The others are LOST, another
process is gone, and STOPPED, stopped on request with the state saved (EX_TEMPFAIL: the same command continues)."""


def guarded(program: Callable[[], object]) -> None:
    """Run a whole program and end the process with the exit code that says how it went."""
    try:
        program()
    except Elsewhere:
        _leave("", USER_ERROR)
    except UserError as error:
        _leave(f"error: {error}", USER_ERROR)
    except FloatingPointError as error:
        _leave(f"error: {error}", NOT_FINITE)
    except Lost:
        _leave("", LOST)
    except Interrupted as stop:
        # All processes stopped at the same step: one says so.
        _leave(str(stop) if os.environ.get("RANK", "0") == "0" else "", STOPPED)
    except KeyboardInterrupt:
        _leave("interrupted", INTERRUPTED)
    except SafetensorError as error:
        # The library wraps the system's error; its number is in the text.
        if f"os error {errno.ENOSPC}" not in str(error):
            raise
        _leave("error: no space left on the disk; make room and run the same command again", USER_ERROR)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        where = f" ({error.filename})" if error.filename else ""
        _leave(f"error: {error.strerror}{where}; mend that and run the same command again", USER_ERROR)


def _leave(line: str, code: int) -> None:
    if line:
        print(line, file=sys.stderr)
    raise SystemExit(code)


def run_app(app: typer.Typer) -> None:
    """Run a typer app under `guarded`; its own usage errors exit with 2 as well."""

    def program() -> None:
        try:
            app()
        except SystemExit as end:
            raise _swallowed(end) or end from None

    guarded(program)


def _swallowed(end: SystemExit) -> KeyboardInterrupt | None:
    """The interrupt that typer turned into a silent exit, or None when it was another exit."""
    cause: BaseException | None = end
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__ or cause.__context__
    return cause
