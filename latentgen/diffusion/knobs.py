"""What users write to choose something and set it: NAME[,key=value]..., as `--sampler` and `--guidance` take it."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from latentgen.core.errors import UserError

KINDS: Mapping[str, Callable[[str], Any]] = {"float": float, "int": int, "str": str}
"""Annotations of what can be written as text."""


def split(text: str) -> tuple[str, list[str]]:
    """NAME and the pairs `key=value` after it."""
    name, *pairs = (piece.strip() for piece in str(text).split(","))
    return name, pairs


def settable(function: Callable[..., Any], supplied: Collection[str] = ()) -> dict[str, inspect.Parameter]:
    """The parameters of a function that text can set: numbers and words, but not what others supply."""
    parameters = inspect.signature(function).parameters
    return {key: p for key, p in parameters.items() if p.annotation in KINDS and key not in supplied}


def read(pairs: list[str], said: str, name: str, allowed: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """The knobs that pairs `key=value` set, in their order.

    `said` is the option as the user wrote it, for messages; `name` what has these knobs. Raises UserError for unknown
    keys, keys given twice or without a value, and values of another kind.
    """
    knobs: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = (piece.strip() for piece in pair.partition("="))
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            has = f"it has {', '.join(allowed)}." if allowed else f"{name} has nothing to set."
            raise UserError(f"{said}: {name} has no {key!r}: {hint}{has}")
        if not equals or not value or key in knobs:
            raise UserError(f"{said}: write {key}=VALUE, once")
        kind = KINDS[allowed[key].annotation]
        try:
            knobs[key] = kind(value)
        except ValueError:
            knobs[key] = math.nan
        if knobs[key] != knobs[key]:  # not a number, by mistake or as "nan"
            raise UserError(f"{said}: {key}={value}: give {'a whole number' if kind is int else 'a number'}")
    return knobs


def written(name: str, knobs: Iterable[tuple[str, Any]], allowed: Mapping[str, inspect.Parameter]) -> str:
    """NAME[,key=value]... with the knobs that differ from their defaults, in the order of the parameters."""
    given = dict(knobs)
    changed = [f"{key}={given[key]}" for key, p in allowed.items() if key in given and given[key] != p.default]
    return ",".join([name, *changed])
