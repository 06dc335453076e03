"""Hugging Face `datasets` as a store of pictures: on the disk at random, or piece by piece where it does not fit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentgen.core.errors import UserError
from latentgen.data.checking import Checked
from latentgen.data.images import BadPicture, read_file
from latentgen.data.sources.folder_captions import CAPTION_COLUMNS, CONTROL_COLUMN, texts_of, with_template
from latentgen.data.sources.folder_manifest import NO_CAPTION
from latentgen.data.sources.table import IMAGE_COLUMNS, MASK_COLUMN

log = logging.getLogger(__name__)

_SECONDS = {"control": CONTROL_COLUMN, "mask": MASK_COLUMN}


class DatasetsStore:
    """The rows of a data set that is on the disk, or comes to it: a name on the hub, a folder of pictures or tables, or
    what `save_to_disk` wrote. No code of a data set is run, and pictures are decoded by this package alone.

    Args:
        path: its name or folder.
        subset: its configuration, where it has several.
        split: of it.
        image_column, caption_columns, caption: as `TableStore` takes them.

    Raises:
        UserError: there is no such data set, split or column; nothing is usable; `datasets` is missing.
    """

    groups = None

    def __init__(
        self,
        path: str,
        *,
        subset: str | None = None,
        split: str | None = None,
        image_column: str | None = None,
        caption_columns: tuple[str, ...] = CAPTION_COLUMNS,
        caption: str | None = None,
    ) -> None:
        self.where, self.skipped = path, []
        data = _opened(path, subset, split or "train")
        names = list(data.column_names)
        self._image = _image_column(path, names, image_column)
        present = [name for name in caption_columns if name in names]
        if not present and caption is None:
            raise UserError(
                f"{path}: no column of captions; name them in data.caption_columns (columns: {', '.join(names)})"
            )
        seconds = [name for name in _SECONDS.values() if name in names]
        self._data = _undecoded(data.select_columns([self._image, *seconds]), [self._image, *seconds])
        self._numbers: list[int] = []
        self._captions: list[tuple[str, ...]] = []
        texts = data.select_columns(present) if present else ({} for _ in range(len(data)))
        for number, row in enumerate(texts):
            found = (t for name in present for t in texts_of(row[name], f"{path}, row {number}: {name}"))
            captions = tuple(dict.fromkeys(found))
            captions = captions if caption is None else with_template(captions, caption)
            if captions:
                self._numbers.append(number)
                self._captions.append(captions)
            else:
                self.skipped.append((f"row {number}", NO_CAPTION))
        if not self._numbers:
            raise UserError(f"{path}: none of its {len(data)} rows has a caption; give all one in data.caption")

    def __len__(self) -> int:
        return len(self._numbers)

    def name(self, index: int) -> str:
        """The number of the row, counted from 0."""
        return f"row {self._numbers[index]}"

    def content(self, index: int) -> bytes:
        return _bytes_of(self._data[self._numbers[index]][self._image])

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions[index]

    def second(self, index: int, kind: str) -> bytes | None:
        """The picture in the column `conditioning_image` or `mask`."""
        cell = self._data[self._numbers[index]].get(_SECONDS[kind])
        return None if cell is None else _bytes_of(cell)

    def soon(self, groups: Sequence[int]) -> None:
        """Nothing is done: all is at hand."""

    def known(self, index: int) -> Checked | None:
        """None: nothing is kept of it."""
        del index


def streamed_paths(path: str, subset: str | None, split: str | None) -> list[str]:
    """The parquet files of one split of a data set, as paths or addresses, in their order.

    Raises:
        UserError: there is no such data set or split, or it is not kept as parquet.
    """
    split = split or "train"
    files = _builder(path, subset).config.data_files or {}
    if split not in files:
        raise UserError(f"data.split: {path} has no split {split!r}; choose one of {', '.join(map(str, files))}")
    found = [str(file) for file in files[split]]
    if not all(file.lower().endswith(".parquet") for file in found):
        raise UserError(f"data.streaming: {path} is not kept as parquet, which streaming reads; leave it out")
    return found


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError("data.source: datasets: the library is missing; pip install latentgen[data]") from error
    datasets.disable_progress_bars()
    return datasets


def _failures() -> tuple[type[Exception], ...]:
    """What the library raises where a data set cannot be had: it is not there, there is no network, or no such part."""
    return (OSError, ValueError, KeyError, RuntimeError)


def _builder(path: str, subset: str | None) -> Any:
    datasets = _library()
    try:
        return datasets.load_dataset_builder(path, subset)
    except _failures() as error:
        raise _refusal(path, error) from error


def _refusal(path: str, error: Exception) -> UserError:
    text = " ".join(str(error).split())[:300]
    return UserError(f"data.path: {path}: cannot be opened as a data set ({text}); check its name, subset and split")


def _opened(path: str, subset: str | None, split: str) -> Any:
    datasets, folder = _library(), Path(path)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        data = datasets.load_from_disk(path)
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                raise UserError(f"data.split: {path} has no split {split!r}; choose one of {', '.join(data)}")
            data = data[split]
        return data
    try:
        return datasets.load_dataset(path, subset, split=split)
    except _failures() as error:
        raise _refusal(path, error) from error


def _image_column(path: str, names: Sequence[str], column: str | None) -> str:
    found = [name for name in ([column] if column is not None else ("image", *IMAGE_COLUMNS)) if name in names]
    if not found:
        raise UserError(f"{path}: no column of pictures; name it in data.image_column (columns: {', '.join(names)})")
    return found[0]


def _undecoded(data: Any, columns: Sequence[str]) -> Any:
    """The same rows with pictures as `{bytes, path}`."""
    datasets = _library()
    for column in columns:
        if isinstance(data.features[column], datasets.Image):
            data = data.cast_column(column, datasets.Image(decode=False))
    return data


def _bytes_of(cell: Any) -> bytes:
    """The file in a cell. Raises `BadPicture` where there is none."""
    content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if isinstance(content, bytes):
        return content
    if isinstance(path, str) and path:
        return read_file(Path(path))
    raise BadPicture("no picture in the data set")
