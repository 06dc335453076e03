"""The one exception that is the user's to mend."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in a recipe, a path or an option: one line that says what, where and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop, has saved its state and may be continued by the same command."""
