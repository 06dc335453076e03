"""The mathematics of diffusion: pure functions of tensors, no networks, no files, no devices.

Everything works in variance-exploding coordinates, `x = x0 + sigma * noise`. `parameterization.py` translates between
these and what a network sees; every other module knows `sigma` alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

from latentgen.core.errors import UserError

T = TypeVar("T")


def lookup(registry: Mapping[str, T], name: str, what: str, aliases: Mapping[str, str] | None = None) -> T:
    """The entry of a registry that a user named, in any case and under its aliases.

    `what` is the word for it in the message, such as "sampler". Raises UserError naming the nearest valid name.
    """
    key = str(name).strip().lower()
    key = (aliases or {}).get(key, key)
    if key in registry:
        return registry[key]
    near = difflib.get_close_matches(key, list(registry), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"unknown {what} {name!r}: {hint}Choose one of {', '.join(registry)}.")
