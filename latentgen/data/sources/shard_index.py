"""What a shard holds: where each picture lies, its captions, and how it decoded. Made once, kept as JSON lines.

The first line tells of the shard: its size and SHA-256, and which limit of pixels held when its pictures were decoded.
The others are examples in the order of the shard, and what was left out of it. Reading an index trusts nothing in it:
places outside the shard and values of other types make it invalid.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from latentgen.core.files import file_sha256
from latentgen.data.checking import Checked, check_pictures
from latentgen.data.images import MAX_BYTES, BadPicture
from latentgen.data.sources.folder import EXTENSIONS
from latentgen.data.sources.folder_captions import clean, with_template
from latentgen.data.tar import Member, list_members, shown

log = logging.getLogger(__name__)

FORMAT, VERSION = "latentgen shard index", 1
ENDING = ".index.jsonl"
"""What the index of `X.tar` is called beside it: `X.tar.index.jsonl`."""
MAX_TEXT = 1 << 20
"""Bytes that a `.txt` or `.json` may have."""
KEPT = 1 << 14
"""Characters of a `.json` that are kept whatever it holds; of longer ones its texts are."""
SECONDS = ("control", "mask")
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
UNKNOWN = Checked("", (0, 0))


class Place(NamedTuple):
    """Where a file lies in the shard, in bytes."""

    offset: int
    size: int


@dataclass(frozen=True)
class Entry:
    """One example.

    Attributes:
        name: its files' name up to the first dot, with its folder.
        ending: of the picture's file.
        picture: where that lies.
        seconds: by "control" and "mask", where the second picture lies.
        text: what its `.txt` says.
        data: what its `.json` says.
        trouble: why one of these is not used.
        checked: how it decoded.
    """

    name: str
    ending: str
    picture: Place
    seconds: dict[str, Place] = field(default_factory=dict)
    text: str | None = None
    data: dict[str, Any] | None = None
    trouble: str = ""
    checked: Checked = UNKNOWN


@dataclass(frozen=True)
class ShardIndex:
    """A shard's examples.

    Attributes:
        bytes, sha256: of the whole shard.
        max_pixels: larger pictures were refused when it was made.
        entries: every picture, broken ones too.
        skipped: (name, reason) of what else was in the shard; a name is "" for the shard itself.
        notes: what the writer of the shard keeps here.
    """

    bytes: int
    sha256: str
    max_pixels: int
    entries: tuple[Entry, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)


class BadIndex(Exception):
    """An index that cannot be used; the text says why."""


def captions_of(entry: Entry, columns: tuple[str, ...], template: str | None) -> tuple[str, ...] | str:
    """The different captions of an example, those of its `.txt` first, a line each; or the reason why it has none."""
    found = list(filter(None, map(clean, (entry.text or "").splitlines())))
    trouble = entry.trouble
    for column in columns:
        value = (entry.data or {}).get(column)
        texts = [value] if isinstance(value, str) else [] if value is None else value
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            found += filter(None, map(clean, texts))
        else:
            trouble = f"{column} in its .json is {type(value).__name__}, not a text or a list of texts"
    captions = tuple(dict.fromkeys(found))
    if template is not None:
        return with_template(captions, template)
    return captions or f"no caption: {trouble or 'neither a .txt nor one in a .json (' + ', '.join(columns) + ')'}"


def make_index(path: Path, max_pixels: int, sha256: str | None = None) -> ShardIndex:
    """List a shard and decode every picture in it once.

    Args:
        sha256: of the file, where that is known already.

    Raises:
        OSError: it cannot be read.
    """
    digest = sha256 or file_sha256(path)
    handle = os.open(path, os.O_RDONLY)
    try:
        contents = list_members(handle)
        skipped = list(contents.refused)
        entries = _entries(handle, contents.members, skipped)
        reads = [partial(read_place, handle, entry.picture) for entry in entries]
        checked = check_pictures(reads, max_pixels)
        whole = tuple(_with(entry, found) for entry, found in zip(entries, checked, strict=True))
        return ShardIndex(os.fstat(handle).st_size, digest, max_pixels, whole, tuple(skipped))
    finally:
        os.close(handle)


def read_place(handle: int, place: Place) -> bytes:
    """A part of an open file. Raises `BadPicture` where it is not all there."""
    try:
        content = os.pread(handle, place.size, place.offset)
    except OSError as error:
        raise BadPicture(f"the shard cannot be read: {error.strerror}") from error
    if len(content) < place.size:
        raise BadPicture("the shard has become shorter")
    return content


def _with(entry: Entry, checked: Checked) -> Entry:
    return Entry(**{**vars(entry), "checked": checked})


def _entries(handle: int, members: Iterable[Member], skipped: list[tuple[str, str]]) -> list[Entry]:
    """Members grouped by the part of their names before the first dot, one entry for each group with a picture."""
    groups: dict[str, dict[str, Member]] = {}
    for member in members:
        found = _MEMBER.fullmatch(member.name)
        if found is not None:
            ending = found[2].lower()
            if groups.setdefault(found[1], {}).setdefault(ending, member) is not member:
                skipped.append((shown(member.name), "its name stands there twice; the first is used"))
    entries = []
    for name, files in groups.items():
        pictures = [ending for ending in files if f".{ending}" in EXTENSIONS]
        skipped += [
            (shown(f"{name}.{ending}"), f"a second picture of one name; {shown(name)}.{pictures[0]} is used")
            for ending in pictures[1:]
        ]
        if not pictures:
            skipped.append((shown(name), f"no picture, only {', '.join(shown(f'.{ending}') for ending in files)}"))
        elif files[pictures[0]].size > MAX_BYTES:
            skipped.append((shown(f"{name}.{pictures[0]}"), f"the file is larger than {MAX_BYTES >> 20} MiB"))
        else:
            entries.append(_entry(handle, name, pictures[0], files))
    return entries


def _entry(handle: int, name: str, ending: str, files: dict[str, Member]) -> Entry:
    trouble = ""
    text, data = None, None
    try:
        content = _small(handle, files.get("txt"))
        text = None if content is None else content.decode("utf-8-sig")
    except (UnicodeDecodeError, BadPicture) as error:
        trouble = "its .txt is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"its .txt: {error}"
    try:
        content = _small(handle, files.get("json"))
        data = None if content is None else _object(content)
    except (ValueError, RecursionError, BadPicture) as error:
        trouble = f"its .json: {' '.join(str(error).split())[:100]}"
    seconds = {}
    for kind in SECONDS:
        named = [e for e in files if e.startswith(f"{kind}.") and f".{e.removeprefix(kind + '.')}" in EXTENSIONS]
        if named and files[named[0]].size <= MAX_BYTES:
            seconds[kind] = Place(files[named[0]].offset, files[named[0]].size)
    member = files[ending]
    return Entry(name, ending, Place(member.offset, member.size), seconds, text, data, trouble)


def _small(handle: int, member: Member | None) -> bytes | None:
    if member is None:
        return None
    if member.size > MAX_TEXT:
        raise BadPicture(f"has {member.size} bytes, more than {MAX_TEXT}")
    return read_place(handle, Place(member.offset, member.size))


def _object(content: bytes) -> dict[str, Any]:
    """The JSON object in a member, of long ones its texts alone. Raises ValueError and RecursionError."""
    value = json.loads(content.decode("utf-8-sig"))
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object")
    if len(content) <= KEPT:
        return value
    return {key: text for key, text in value.items() if isinstance(text, str) or _texts(text)}


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def index_lines(index: ShardIndex) -> bytes:
    """An index as the content of its file."""
    head = {"format": FORMAT, "version": VERSION, "bytes": index.bytes, "sha256": index.sha256}
    lines: list[dict[str, Any]] = [{**head, "max_pixels": index.max_pixels, "notes": index.notes}]
    for entry in index.entries:
        checked = entry.checked
        line = {"name": entry.name, "ending": entry.ending, "picture": list(entry.picture)}
        line |= {kind: list(place) for kind, place in entry.seconds.items()}
        line |= {key: getattr(entry, key) for key in ("text", "data") if getattr(entry, key) is not None}
        line |= {"trouble": entry.trouble} if entry.trouble else {}
        line |= {"reason": checked.reason} if checked.reason else {"sha256": checked.digest, "size": checked.size}
        lines.append(line)
    lines += [{"skipped": name, "reason": reason} for name, reason in index.skipped]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def read_index(content: bytes) -> ShardIndex:
    """The index in a file.

    Raises:
        BadIndex: it is none, of another version, or says what cannot be.
    """
    try:
        lines = [json.loads(line) for line in content.splitlines()]
        head, *rest = lines
        if (head["format"], head["version"]) != (FORMAT, VERSION):
            raise BadIndex(f"of another kind or version ({str(head['version'])[:20]})")
        size = _count(head["bytes"])
        entries = tuple(_read_entry(line, size) for line in rest if "skipped" not in line)
        skipped = tuple((shown(_str(x["skipped"])), shown(_str(x["reason"]))) for x in rest if "skipped" in x)
        notes = head.get("notes") or {}
        return ShardIndex(size, _hash(head["sha256"]), _count(head["max_pixels"]), entries, skipped, notes)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadIndex(f"damaged ({type(error).__name__}: {str(error)[:80]})") from error


def _read_entry(line: dict[str, Any], size: int) -> Entry:
    reason = shown(_str(line.get("reason", "")))
    if reason:
        checked = Checked("", (0, 0), reason)
    else:
        height, width = map(_count, line["size"])
        if not height or not width:
            raise ValueError("a picture without pixels")
        checked = Checked(_hash(line["sha256"]), (height, width))
    data = line.get("data")
    if data is not None and not isinstance(data, dict):
        raise ValueError("data is no object")
    text = line.get("text")
    return Entry(
        _str(line["name"]),
        _str(line["ending"]),
        _place(line["picture"], size),
        {kind: _place(line[kind], size) for kind in SECONDS if kind in line},
        None if text is None else _str(text),
        data,
        _str(line.get("trouble", "")),
        checked,
    )


def _place(value: Any, size: int) -> Place:
    place = Place(*map(_count, value))
    if place.offset + place.size > size or place.size > MAX_BYTES:
        raise ValueError("a place outside the shard")
    return place


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError("no count")
    return value


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("no text")
    return value


def _hash(value: Any) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", _str(value)):
        raise ValueError("no SHA-256")
    return value
