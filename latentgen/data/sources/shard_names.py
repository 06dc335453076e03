"""Which shards a pattern means."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from latentgen.core.errors import UserError
from latentgen.data.remote import is_remote, remote_names
from latentgen.data.sources.folder_manifest import natural

MOST = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")


def shard_names(patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Every shard that the patterns mean, in their order, each once.

    A pattern is a path or an address with `{00000..00009}` or `{a,b}` in it, or with `*`, or a folder of `.tar` files.

    Raises:
        UserError: there is none, or a shard is missing here (elsewhere it is noticed when it is asked for).
    """
    found: dict[str, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for name in expand(pattern):
            found.update(dict.fromkeys(_there(name)))
    if not found:
        raise UserError("data.path: names no shards; write it like train-{00000..00009}.tar")
    return tuple(found)


def expand(pattern: str) -> list[str]:
    """`a-{0..2}.{x,y}` -> the six names; numbers keep their leading zeros. Braces in braces are opened from inside."""
    names = [pattern]
    while any(_BRACES.search(name) for name in names):
        names = list(itertools.islice(itertools.chain.from_iterable(map(_opened, names)), MOST + 1))
        if len(names) > MOST:
            raise UserError(f"data.path: {pattern} means more than {MOST} shards")
    return names


def _opened(name: str) -> Iterator[str]:
    """The first innermost braces of a name replaced by each of what they hold."""
    found = _BRACES.search(name)
    if found is None:
        yield name
        return
    numbers = _RANGE.fullmatch(found[1])
    if numbers is None and "," not in found[1]:
        raise UserError(f"data.path: cannot understand {found[0]}; write {{00000..00009}} or {{a,b}}")
    head, tail = name[: found.start()], name[found.end() :]
    if numbers is None:
        yield from (f"{head}{word}{tail}" for word in found[1].split(","))
        return
    first, last = int(numbers[1]), int(numbers[2])
    if first > last:
        raise UserError(f"data.path: {found[0]} runs backwards")
    width = len(numbers[1])
    yield from (f"{head}{number:0{width}d}{tail}" for number in range(first, last + 1))


def _there(name: str) -> list[str]:
    if is_remote(name):
        return remote_names(name)
    path = Path(name)
    if path.is_file():
        return [name]
    if path.is_dir():
        found = sorted((str(entry) for entry in path.glob("*.tar")), key=natural)
        if not found:
            raise UserError(f"{path}: holds no .tar files; set data.path to the folder that holds the shards")
        return found
    magic = any(sign in name for sign in "*?[")
    matches = Path(path.anchor).glob(str(path.relative_to(path.anchor))) if magic else ()
    found = sorted((str(match) for match in matches if match.is_file()), key=natural)
    if not found:
        raise UserError(f"{name}: no such shard; check data.path")
    return found
