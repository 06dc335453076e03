"""Captions out of metadata.jsonl, metadata.csv, side-car text files and file names."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentgen.core.errors import UserError

METADATA = ("metadata.jsonl", "metadata.csv")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
CAPTION = "{caption}"
"""Where a template takes a picture's own caption."""
CONTROL_COLUMN = "conditioning_image"
"""Of metadata: the picture for a ControlNet to follow; the name is that of diffusers' training scripts."""
# Names that cameras and programs give; alone they say nothing about a picture.
_NO_WORDS = frozenset(
    (
        "img",
        "image",
        "imag",
        "mvimg",
        "pxl",
        "dsc",
        "dscn",
        "dscf",
        "gopr",
        "frame",
        "screenshot",
        "untitled",
        "unnamed",
    )
)

Row = tuple[int, dict[str, Any]]


def clean(text: str) -> str:
    """White space of every kind -> single spaces; half of a UTF-16 pair (possible in JSON) -> the replacement mark."""
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return " ".join(whole.split())


def read_metadata(path: Path, columns: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """`file_name` -> captions in the order of `columns`, each once; several rows of one file add up.

    Raises:
        UserError: not UTF-8, a line that is no JSON object, a csv row of the wrong length, no rows, no `file_name`,
            no caption column in any row, a caption that is not text. The message names the file and the line.
    """
    rows = list(csv_rows(path) if path.suffix == ".csv" else jsonl_rows(path))
    if not rows:
        raise UserError(
            f"{path}: has no rows; give each picture one, with file_name and {columns[0]}, or remove the file"
        )
    found: dict[str, tuple[str, ...]] = {}
    for line, row in rows:
        name = row.get("file_name")
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            seen = ", ".join(map(str, row)) or "nothing"
            raise UserError(f"{path}, line {line}: no file_name (found: {seen}); every row must name its picture there")
        texts = [text for column in columns for text in texts_of(row.get(column), f"{path}, line {line}: {column}")]
        found[name.strip()] = tuple(dict.fromkeys((*found.get(name.strip(), ()), *texts)))
    present = dict.fromkeys(str(key) for _, row in rows for key in row)
    if not any(column in present for column in columns):
        raise UserError(
            f"{path}: no captions found: its columns are {', '.join(present)}; name the caption's column "
            f"{' or '.join(columns)}"
        )
    return found


def read_controls(path: Path) -> dict[str, str]:
    """`file_name` -> what stands in the column `conditioning_image` of its last row that has one; rows that
    `read_metadata` would refuse are passed over.

    Raises:
        UserError: the file cannot be understood, or a cell is not text.
    """
    found: dict[str, str] = {}
    for line, row in csv_rows(path) if path.suffix == ".csv" else jsonl_rows(path):
        name, control = row.get("file_name"), row.get(CONTROL_COLUMN)
        if control is None or control == "" or not isinstance(name, str):
            continue
        if not isinstance(control, str) or "\0" in control:
            raise UserError(f"{path}, line {line}: {CONTROL_COLUMN} is no file name; write the name of a picture")
        found[name.strip()] = control.strip()
    return found


def read_sidecar(path: Path) -> tuple[str, ...] | str:
    """Each non-empty line of a text file as a caption, or the reason why there is none."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return f"{path.name} is not UTF-8 text"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    captions = tuple(dict.fromkeys(filter(None, map(clean, text.splitlines()))))
    return captions or f"no caption: {path.name} is empty"


def with_template(captions: tuple[str, ...], template: str) -> tuple[str, ...]:
    """The captions of a picture where `template` is given for a folder, at least one.

    A picture without captions gets the template, which then loses its `{caption}` and the signs that joined it;
    captions are put into it where it has one, and stay as they are where it has none.
    """
    if not captions:
        return (clean(re.sub(rf"[\s,;:-]*{re.escape(CAPTION)}", "", template)).strip(" ,;:-"),)
    if CAPTION not in template:
        return captions
    return tuple(clean(template.replace(CAPTION, caption)) for caption in captions)


def caption_of_name(stem: str) -> str | None:
    """The words in a file's stem: "red_heart_02" -> "red heart"; None for numbers, hashes and "IMG_0042"."""
    if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", stem.lower()):
        return None
    text = clean(re.sub(r"[_\-.+]+", " ", stem))
    text = re.sub(r"(\s*\(?\b[0-9]+\)?)+$|[0-9]{2,}$", "", text).strip()
    words = [word for word in text.lower().split() if re.search(r"[^\W\d_]", word) and not _hash_like(word)]
    return text if any(word not in _NO_WORDS for word in words) else None


def _hash_like(word: str) -> bool:
    return bool(re.fullmatch(r"[0-9a-f]{8,}", word) and re.search(r"[0-9]", word))


def texts_of(value: Any, where: str) -> list[str]:
    """The captions in one cell: text, a list of texts, or (csv) a JSON list of texts written as text."""
    if value is None:
        return []
    if isinstance(value, str):
        return [text for text in [clean(value)] if text]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return [text for text in map(clean, value) if text]
    raise UserError(f"{where} is {type(value).__name__} {str(value)[:40]!r}; write a text or a list of texts")


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from error


def jsonl_rows(path: Path) -> Iterator[Row]:
    """(line, object) of every line that is not empty.

    Raises:
        UserError: a line that is no JSON object, a key that stands twice, text that is not UTF-8.
    """
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            text = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise UserError(f"{path}, line {number}: not valid JSON ({text}); write one object a line") from error
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, line {number}: a JSON {type(row).__name__}, not an object; write one object a line"
            )
        yield number, row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return row


def csv_rows(path: Path) -> Iterator[Row]:
    """(line, cells by column) of every row; a cell that holds a JSON list of texts is that list.

    Raises:
        UserError: more cells than columns, quotes that do not close, text that is not UTF-8.
    """
    reader = csv.DictReader(io.StringIO(_decoded(path), newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                raise UserError(
                    f"{path}, line {reader.line_num}: more cells than the header has; "
                    'put captions that contain a comma in quotes: "a cat, asleep"'
                )
            yield reader.line_num, {key: _json_list(cell) for key, cell in row.items()}
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not valid csv ({error}); check the quotes") from error


def _json_list(cell: str | None) -> Any:
    """A csv cell as it is, or the list if it holds a JSON list of texts."""
    if cell is None or not cell.lstrip().startswith("["):
        return cell
    try:
        value = json.loads(cell)
    except ValueError:
        return cell  # a caption that merely begins with a bracket
    return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else cell
