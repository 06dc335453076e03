"""The one exception that is the user's to mend."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in a recipe, a path or an option: one line that says what, where and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class Elsewhere(UserError):
    """Another process has met a mistake and says what it is; this one ends with it, in silence."""


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop, has saved its state and may be continued by the same command."""


class Lost(RuntimeError):
    """Another process is gone, so that this one cannot go on; that has been said."""


LOST, STOPPED = 4, 75
"""Exit codes that a process may have to leave with on its own: see `cli.errors`, which has all of them."""
