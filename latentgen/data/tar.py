"""What lies where in a tar file. Nothing is ever unpacked: members are read by offset, so no name can lead anywhere.

The formats are POSIX ustar and pax and GNU's long names. Python's own reader trusts headers more than a file from
elsewhere deserves: it reads extended headers of any size, and follows sparse maps.
"""

from __future__ import annotations

import os
import re
from pathlib import PureWindowsPath
from typing import NamedTuple

BLOCK = 512
MAX_HEADER = 1 << 16
"""Bytes that an extended header may have: longer ones hold no file name that anyone gave."""
MAX_NAME = 1024
_NUMBER = re.compile(rb"[0-7]+")
_REFUSED = {
    b"1": "a hard link, not followed",
    b"2": "a link, not followed",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
}
_FOLDER, _LONG_NAME, _LONG_LINK, _PAX, _PAX_ALL = b"5", b"L", b"K", b"x", b"g"
_FILES = (b"0", b"\0", b"7")


class Member(NamedTuple):
    """A file in the archive: its bytes are `[offset, offset + size)`."""

    name: str
    offset: int
    size: int


class Contents(NamedTuple):
    """The files of an archive in their order, and (name, reason) of what is refused; a name is "" for the whole."""

    members: list[Member]
    refused: list[tuple[str, str]]


class _Header(NamedTuple):
    name: str
    size: int
    kind: bytes
    raw: bytes


def list_members(handle: int) -> Contents:
    """Every file of an open tar archive, by its headers alone.

    Names that climb out of the archive, links, devices and sparse files are refused. What a damaged header hides, and
    what was cut off at the end, is lost; all before it is not.

    Args:
        handle: file descriptor of a file that can be read anywhere.
    """
    end = os.fstat(handle).st_size
    found = Contents([], [])
    seen: set[str] = set()
    at, more = 0, {}  # `more`: what an extended header says of the member after it
    while at < end:
        raw = _read(handle, at, BLOCK)
        if raw.count(0) == len(raw) == BLOCK:
            return found
        header = _parse(raw)
        if header is None:
            found.refused.append(("", f"damaged at byte {at}: what follows cannot be found"))
            return found
        at += BLOCK
        if header.kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_ALL):
            more |= _extended(handle, at, header, end)
            at += _padded(header.size)
            continue
        if header.kind == b"S":
            at = _after_sparse_map(handle, at, header.raw)
        name, size = more.get("path", header.name), more.get("size", header.size)
        reason, more = more.get("reason", ""), {}
        name = name.removeprefix("./")
        if header.kind == _FOLDER or (header.kind == b"\0" and name.endswith("/")):
            continue
        has_data = header.kind in (*_FILES, b"S") or header.kind not in _REFUSED
        reason = reason or _REFUSED.get(header.kind) or _refusal(name)
        if header.kind not in (*_FILES, *_REFUSED):
            reason = "of a kind that is not known"
        if has_data and at + size > end:
            found.refused.append((shown(name), f"cut short: {max(0, end - at)} of {size} bytes are there"))
            return found
        if not reason and name in seen:
            reason = "its name stands there twice; the first is used"
        if reason:
            found.refused.append((shown(name), reason))
        else:
            seen.add(name)
            found.members.append(Member(name, at, size))
        at += _padded(size) if has_data else 0
    found.refused.append(("", "has no end mark: it may have been cut short"))
    return found


def shown(name: str) -> str:
    """A name from an archive, in a form that can be printed on one line."""
    text = "".join(sign if sign.isprintable() else "?" for sign in name)
    return text if len(text) <= 200 else text[:197] + "..."


def _read(handle: int, at: int, count: int) -> bytes:
    return os.pread(handle, count, at)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _parse(raw: bytes) -> _Header | None:
    """The header in a block of 512 bytes; None where it is none."""
    if len(raw) < BLOCK:
        return None
    total = sum(raw[:148]) + 8 * ord(" ") + sum(raw[156:])
    size = _number(raw[124:136])
    if size is None or _number(raw[148:156]) != total:
        return None
    name = _text(raw[:100])
    prefix = _text(raw[345:500]) if raw[257:263] == b"ustar\0" else ""  # GNU keeps times there
    return _Header(f"{prefix}/{name}" if prefix else name, size, raw[156:157], raw)


def _number(field: bytes) -> int | None:
    """An octal number, or (GNU) a large one in base 256; None where it is none or negative."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.split(b"\0")[0].strip()
    return int(text, 8) if _NUMBER.fullmatch(text) else None if text else 0


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "replace")


def _extended(handle: int, at: int, header: _Header, end: int) -> dict:
    """What an extended header says of the member after it: `path`, `size`, or a `reason` to refuse it."""
    if header.kind in (_LONG_LINK, _PAX_ALL):
        return {}
    if header.size > MAX_HEADER or at + header.size > end:
        return {"reason": f"its header has {header.size} bytes"}
    content = _read(handle, at, header.size)
    if header.kind == _LONG_NAME:
        return {"path": content.rstrip(b"\0").decode("utf-8", "replace")}
    found = {}
    while content:
        length, space, _ = content.partition(b" ")
        if not space or not length.isdigit() or len(length) > 6 or not 0 < int(length) <= len(content):
            return {"reason": "its header is damaged"}
        record, content = content[len(length) + 1 : int(length)], content[int(length) :]
        key, _, value = record.removesuffix(b"\n").partition(b"=")
        if key.startswith(b"GNU.sparse"):
            return {"reason": _REFUSED[b"S"]}
        if key == b"path":
            found["path"] = value.decode("utf-8", "replace")
        if key == b"size":
            if not value.isdigit() or len(value) > 18:
                return {"reason": "its header is damaged"}
            found["size"] = int(value)
    return found


def _after_sparse_map(handle: int, at: int, raw: bytes) -> int:
    """Where the data of an old GNU sparse file begin, behind the blocks that go on with its map."""
    goes_on = raw[482]
    while goes_on:
        block = _read(handle, at, BLOCK)
        at += BLOCK
        goes_on = len(block) == BLOCK and block[504]
    return at


def _refusal(name: str) -> str:
    """Why a name is not to be used; "" where it may be."""
    if "\0" in name:
        return "its name holds a NUL"
    if not name or len(name) > MAX_NAME:
        return f"its name has {len(name)} characters"
    if name.startswith(("/", "\\")) or PureWindowsPath(name).drive or ".." in name.replace("\\", "/").split("/"):
        return "its name leads outside the archive"
    return ""
