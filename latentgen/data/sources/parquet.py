"""Parquet files read by row groups, here or elsewhere: a group is at hand only while it is needed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from latentgen.core.errors import UserError
from latentgen.core.files import content_key, write_text
from latentgen.core.log import progress
from latentgen.data.checking import Checked, check_pictures
from latentgen.data.images import BadPicture

log = logging.getLogger(__name__)

VERSION = 1
"""Of what is kept of pictures; to be raised when other ones would be refused."""


def is_remote(path: str) -> bool:
    """Whether a path is an address, such as hf://datasets/NAME/train.parquet."""
    return "://" in path


class ParquetFiles:
    """Row groups of several files as one sequence of rows.

    Args:
        paths: files here, or addresses that fsspec opens.
        local: folder for what is known of pictures.
        window: row groups of pictures that are kept in memory.
        max_pixels: larger pictures are refused.

    Raises:
        UserError: a file is missing or is no parquet; files have other columns than the first; pyarrow is missing.
    """

    def __init__(self, paths: Sequence[str], local: Path, window: int, max_pixels: int) -> None:
        self.paths, self.local, self.window, self.max_pixels = list(paths), local, window, max_pixels
        self._handles: dict[tuple[int, str], Any] = {}
        self._groups: OrderedDict[int, list[Any]] = OrderedDict()
        self._lock = threading.Lock()
        self._picture = ""
        self._known: list[Checked] = []
        self._of: list[tuple[str, int]] = []  # of each row group: its file, and its number there
        self._starts = [0]
        self.columns: list[str] = []
        for path in self.paths:
            file = self._open(path)
            names = list(file.schema_arrow.names)
            if self.columns and names != self.columns:
                raise UserError(f"{path}: its columns are {', '.join(names)}, not {', '.join(self.columns)}")
            self.columns = names
            for group in range(file.num_row_groups):
                self._of.append((path, group))
                self._starts.append(self._starts[-1] + file.metadata.row_group(group).num_rows)

    def __getstate__(self) -> dict[str, Any]:
        """Without open files and what was read of them: a worker opens its own."""
        return {**self.__dict__, "_handles": {}, "_groups": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def choose(self, column: str) -> bool:
        """Take the pictures from a column; False where it holds the names of files."""
        import pyarrow as pa

        kind = self._open(self.paths[0]).schema_arrow.field(column).type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            return False
        binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        if not binary and not (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0):
            raise UserError(f"{self.paths[0]}: the column {column} is {kind}, neither names of files nor pictures")
        self._picture = column
        self._known = [found for path in self.paths for found in self._checked(path)]
        return True

    def rows(self, columns: list[str]) -> Iterator[tuple[int, Path | None, str, dict[str, Any]]]:
        """Of every row: the number of its group, its file's folder (None: elsewhere), its name, its cells."""
        for number, (path, group) in enumerate(self._of):
            table = self._open(path).read_row_group(group, columns=columns).to_pylist() if columns else []
            count = self._starts[number + 1] - self._starts[number]
            folder = None if is_remote(path) else Path(path).parent
            first = self._starts[number] - self._starts[self._first_group(path)]
            for at in range(count):
                yield number, folder, f"{Path(path).name}, row {first + at}", table[at] if table else {}

    def picture(self, place: int) -> bytes:
        """The file of the picture in a row. Raises `BadPicture` where there is none."""
        number = bisect_right(self._starts, place) - 1
        cell = self._cells(number)[place - self._starts[number]]
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(content, bytes):
            raise BadPicture("no picture in the table")
        return content

    def known(self, place: int) -> Checked:
        return self._known[place]

    def _cells(self, number: int) -> list[Any]:
        with self._lock:
            if number in self._groups:
                self._groups.move_to_end(number)
                return self._groups[number]
            path, group = self._of[number]
            try:
                cells = self._open(path).read_row_group(group, columns=[self._picture]).column(0).to_pylist()
            except OSError as error:
                raise BadPicture(f"{path} cannot be read: {error}") from error
            self._groups[number] = cells
            while len(self._groups) > self.window:
                self._groups.popitem(last=False)
            return cells

    def _first_group(self, path: str) -> int:
        return next(number for number, (own, _) in enumerate(self._of) if own == path)

    def _open(self, path: str) -> Any:
        """A file of its own for each process: handles do not outlive a fork."""
        key = (os.getpid(), path)
        if key not in self._handles:
            self._handles[key] = open_parquet(path)
        return self._handles[key]

    def _checked(self, path: str) -> list[Checked]:
        """What decoding each picture of a file has shown, now or when it was first read."""
        kept = self.local / "parquet" / f"{self._file_key(path)}.jsonl"
        groups = [number for number, (own, _) in enumerate(self._of) if own == path]
        count = self._open(path).metadata.num_rows
        if kept.is_file():
            lines = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
            if len(lines) == count:
                return [Checked(digest, (height, width), reason) for digest, height, width, reason in lines]
        found: list[Checked] = []
        for number in progress(f"decoding {Path(path).name}", "row group", over=groups, leave=False):
            rows = range(self._starts[number], self._starts[number + 1])
            found += check_pictures([partial(self.picture, row) for row in rows], self.max_pixels)
        write_text(kept, "".join(json.dumps([c.digest, *c.size, c.reason]) + "\n" for c in found))
        return found

    def _file_key(self, path: str) -> str:
        """Of the footer, which says where each column lies and how large it is, and of what else counts."""
        footer = self._open(path).metadata
        parts = [footer.row_group(g).to_dict() for g in range(footer.num_row_groups)]
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()
        status = None if is_remote(path) else Path(path).stat()
        stamp = None if status is None else [status.st_size, status.st_mtime_ns]
        return content_key("parquet", VERSION, path, stamp, digest, self._picture, self.max_pixels)


def open_parquet(path: str) -> Any:
    """A `pyarrow.parquet.ParquetFile`.

    Raises:
        UserError: it is not there, is no parquet, or pyarrow is missing.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"{path}: parquet needs pyarrow; pip install latentgen[data]") from error
    try:
        if not is_remote(path):
            return pq.ParquetFile(path)
        import fsspec

        system, name = fsspec.core.url_to_fs(path)
        return pq.ParquetFile(system.open(name, "rb"))
    except (OSError, ValueError, ImportError, pa.ArrowException) as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(f"data.path: {path}: cannot be read as parquet ({text})") from error
