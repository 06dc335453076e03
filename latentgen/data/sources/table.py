"""Tables of pictures and captions: csv and jsonl with names of files, parquet with names or the files themselves."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentgen.core.errors import UserError
from latentgen.data.checking import Checked
from latentgen.data.images import MAX_PIXELS, read_file
from latentgen.data.sources.folder_captions import CAPTION_COLUMNS, CONTROL_COLUMN, csv_rows, jsonl_rows, texts_of
from latentgen.data.sources.folder_captions import with_template as templated
from latentgen.data.sources.folder_manifest import NO_CAPTION, OUTSIDE, inside, natural
from latentgen.data.sources.parquet import ParquetFiles, is_remote

log = logging.getLogger(__name__)

IMAGE_COLUMNS = ("file_name", "image", "image_path", "path", "file", "filename", "img")
"""Where pictures are looked for; the first that is there is taken."""
MASK_COLUMN = "mask"
ENDINGS = (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class _Row:
    """One usable row.

    Attributes:
        name: what a person finds it by.
        captions: at least one.
        path: of the picture's file; None where the picture is in the table.
        place: number of the row among all rows of parquet files.
        seconds: by "control" and "mask", the file of the second picture.
        filled: columns in which there is something.
    """

    name: str
    captions: tuple[str, ...]
    path: Path | None
    place: int
    seconds: dict[str, Path] = field(default_factory=dict)
    filled: frozenset[str] = frozenset()


class TableStore:
    """The rows of tables whose pictures are there.

    Names of files are relative to the table and must not lead out of its folder. Parquet may hold the pictures, as
    bytes or as Hugging Face's `{bytes, path}`; then row groups are read when needed, and shuffled in windows.

    Args:
        paths: tables of one kind, one or several.
        image_column: of pictures; None takes the first of `IMAGE_COLUMNS` that is there.
        caption_columns: all that are there are used, in this order; a cell is a text or a list of texts.
        caption: of pictures that have none; its `{caption}` takes those that they have.
        local: folder for what is known of pictures in parquet, so that they are decoded beforehand only once.
        window: row groups that are at hand at once.
        max_pixels: larger pictures are refused.

    Raises:
        UserError: no such table, a row that cannot be read, no column of pictures or of captions, nothing usable.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        image_column: str | None = None,
        caption_columns: tuple[str, ...] = CAPTION_COLUMNS,
        caption: str | None = None,
        local: str | Path = "runs/.shards",
        window: int = 4,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.where = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
        self.skipped: list[tuple[str, str]] = []
        self._rows: list[_Row] = []
        self._columns, self._template = caption_columns, caption
        kinds = {Path(path).suffix.lower() for path in paths}
        if len(kinds) != 1 or not kinds <= set(ENDINGS):
            raise UserError(f"data.path: {self.where}: tables are {', '.join(ENDINGS)} files, all of one kind")
        self._parquet: ParquetFiles | None = None
        self.groups: tuple[int, ...] | None = None
        if kinds == {".parquet"}:
            self._take_parquet(paths, image_column, Path(local), window, max_pixels)
        else:
            for path in paths:
                self._take_lines(_existing(path), image_column)
        if not self._rows:
            why = f"; {self.skipped[0][0]}: {self.skipped[0][1]}" if self.skipped else ""
            raise UserError(f"{self.where}: no row can be used{why}")

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """The file's name; of a picture in the table the table's, and the number of the row, counted from 0."""
        return self._rows[index].name

    def content(self, index: int) -> bytes:
        row = self._rows[index]
        if row.path is not None:
            return read_file(row.path)
        assert self._parquet is not None
        return self._parquet.picture(row.place)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._rows[index].captions

    def path(self, index: int) -> Path | None:
        """Where picture `index` lies; None where it is in the table."""
        return self._rows[index].path

    def rows_with(self, columns: tuple[str, ...]) -> set[str]:
        """Names of the pictures whose rows have something in one of these columns."""
        return {row.name for row in self._rows if not row.filled.isdisjoint(columns)}

    def second(self, index: int, kind: str) -> bytes | None:
        """The file that the column `conditioning_image` or `mask` names."""
        path = self._rows[index].seconds.get(kind)
        return None if path is None else read_file(path)

    def soon(self, groups: Sequence[int]) -> None:
        """Nothing is done: files are at hand, and a row group is soon read."""

    def known(self, index: int) -> Checked | None:
        """Pictures in parquet have been decoded once; files may have changed since."""
        row = self._rows[index]
        if row.path is not None or self._parquet is None:
            return None
        return self._parquet.known(row.place)

    def _take_lines(self, path: Path, column: str | None) -> None:
        rows = list(csv_rows(path) if path.suffix == ".csv" else jsonl_rows(path))
        present = list(dict.fromkeys(str(key) for _, row in rows for key in row))
        column = self._require_columns(str(path), present, column)
        for line, row in rows:
            self._take(row, column, path.parent, f"{path.name}, line {line}", -1)

    def _take_parquet(self, paths: Sequence[str], column: str | None, local: Path, window: int, pixels: int) -> None:
        files = ParquetFiles(paths, local, window, pixels)
        column = self._require_columns(self.where, files.columns, column)
        pictures = files.choose(column)
        kept = [name for name in (*self._columns, CONTROL_COLUMN, MASK_COLUMN) if name in files.columns]
        places = files.rows([*kept, *([] if pictures else [column])])
        counts: list[int] = []
        for place, (group, folder, title, row) in enumerate(places):
            counts += [0] * (group + 1 - len(counts))
            before = len(self._rows)
            self._take(row, None if pictures else column, folder, title, place)
            counts[group] += len(self._rows) - before
        if pictures:
            self._parquet, self.groups = files, tuple(counts)

    def _take(self, row: dict[str, Any], column: str | None, folder: Path | None, title: str, place: int) -> None:
        """Keep one row, or say why not; `column` None: its picture is in the table."""
        name, path = title, None
        if column is not None:
            text = row.get(column)
            if not isinstance(text, str) or not text.strip() or "\0" in text:
                self.skipped.append((title, f"no file in the column {column}"))
                return
            name, path = text.strip(), _file(folder, text.strip())
            if isinstance(path, str):
                self.skipped.append((name, path))
                return
        captions = self._captions(row, title)
        if not captions:
            self.skipped.append((name, NO_CAPTION))
            return
        seconds: dict[str, Path] = {}
        for kind, key in (("control", CONTROL_COLUMN), ("mask", MASK_COLUMN)):
            text = row.get(key)
            found = _file(folder, text.strip()) if isinstance(text, str) and text.strip() else None
            if isinstance(found, Path):
                seconds[kind] = found
        filled = frozenset(str(key) for key, cell in row.items() if cell not in (None, ""))
        self._rows.append(_Row(name, captions, path, place, seconds, filled))

    def _captions(self, row: dict[str, Any], title: str) -> tuple[str, ...]:
        texts = (text for key in self._columns for text in texts_of(row.get(key), f"{title}: {key}"))
        captions = tuple(dict.fromkeys(texts))
        return captions if self._template is None else templated(captions, self._template)

    def _require_columns(self, where: str, present: Sequence[str], column: str | None) -> str:
        """The column of pictures, where there is one, and one of captions too unless all are given one."""
        there = ", ".join(present) or "none"
        found = [name for name in ([column] if column is not None else IMAGE_COLUMNS) if name in present]
        if not found:
            raise UserError(f"{where}: no column of pictures; name it in data.image_column (columns: {there})")
        if self._template is None and not any(name in present for name in self._columns):
            raise UserError(f"{where}: no column of captions; name them in data.caption_columns (columns: {there})")
        return found[0]


def table_paths(pattern: str) -> list[str]:
    """The tables that `data.path` means: one, those of a pattern with `*`, or the parquet files of a folder.

    Raises:
        UserError: there are none.
    """
    if is_remote(pattern):
        return [pattern]
    path = Path(pattern)
    if path.is_dir():
        found = sorted(map(str, path.rglob("*.parquet")), key=natural)
    elif "*" in pattern:
        found = sorted(map(str, Path(path.anchor or ".").glob(str(path.relative_to(path.anchor)))), key=natural)
    else:
        found = [pattern] if path.is_file() else []
    if not found:
        raise UserError(f"data.path: {pattern}: no such table")
    return found


def _existing(path: str) -> Path:
    if not Path(path).is_file():
        raise UserError(f"data.path: {path}: no such table")
    return Path(path)


def _file(folder: Path | None, name: str) -> Path | str:
    """Where a file lies that a table names, or why it cannot be used."""
    if folder is None:
        return "names a file, but the table lies elsewhere"
    found = inside(folder, "", name)
    if found is None:
        return OUTSIDE
    path = folder / found
    if not path.is_file():
        return "listed in the table but missing on disk"
    return path if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)) else OUTSIDE
