"""A folder of the user's own pictures with captions, as a source of training examples."""

from __future__ import annotations

import logging
import os
import posixpath
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentgen.core.errors import UserError
from latentgen.data.checking import Checked
from latentgen.data.images import read_file
from latentgen.data.reading import Reading
from latentgen.data.sources.folder_captions import CAPTION, CAPTION_COLUMNS, csv_rows, jsonl_rows, with_template
from latentgen.data.sources.folder_manifest import MISSING, Listing, list_folder, natural
from latentgen.data.sources.stored import Pictures

log = logging.getLogger(__name__)

# HEIC and SVG are looked for so that they are named among the skipped, not overlooked.
_ENDINGS = ("png apng jpg jpeg jpe jfif mpo webp avif bmp gif tif tiff", "jp2 j2k tga qoi psd ico ppm pgm pbm pnm pfm")
EXTENSIONS = frozenset(f".{ending}" for line in (*_ENDINGS, "heic heif svg") for ending in line.split())
_HOW = (
    'write metadata.jsonl beside the pictures, a line each: {"file_name": "a.png", "text": "a red heart"}; '
    "or metadata.csv with the columns file_name,text; or a.txt beside a.png; or call the file red_heart.png; "
    "or give all one: data.caption='a photo of a red heart'"
)


class FolderStore:
    """Pictures below a folder, in natural order of their paths, each with one or more captions.

    One that has no caption or lies outside the folder is left out and stands in `skipped` as (name, reason).

    Args:
        path: the folder. Pictures in subfolders belong to it.
        split: subfolder to read ("train", "validation"). None reads the folder itself, or its subfolder "train" if
            that exists and no picture lies beside it.
        caption_columns: metadata columns that hold captions; all that are there are used, in this order.
        caption: of pictures that have none in metadata or beside them; its `{caption}` takes those that they have.
        extensions: endings (lower case, with the dot) that make a file a picture.

    Raises:
        UserError: no such folder, no pictures, no captions, bad metadata; `caption` is empty.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        split: str | None = None,
        caption_columns: tuple[str, ...] = CAPTION_COLUMNS,
        caption: str | None = None,
        extensions: frozenset[str] = EXTENSIONS,
    ) -> None:
        if caption is not None and not with_template((), caption)[0]:
            raise UserError(
                f"data.caption: {caption!r} says nothing of a picture without a caption; add words beside {CAPTION}"
            )
        self.root = _existing(Path(path))
        self.folder = _choose_split(self.root, split, extensions)
        self._listing = list_folder(self.root, self.folder, caption_columns, extensions, caption)
        _require_captions(self.folder, self._listing, extensions)
        self._inside = "" if self.folder == self.root else f"{self.folder.name}/"
        self._paths = list(self._listing.captions)
        left_out = sorted(self._listing.skipped, key=lambda item: natural(item[0]))
        self.skipped = [(_shown(name.removeprefix(self._inside)), reason) for name, reason in left_out]
        self._tell_of_names()

    groups = None

    @property
    def where(self) -> str:
        return str(self.folder)

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> Path:
        """Where picture `index` lies."""
        return self.root / self._paths[index]

    def name(self, index: int) -> str:
        """Path of picture `index` relative to the folder, with forward slashes."""
        return _shown(self._paths[index].removeprefix(self._inside))

    def content(self, index: int) -> bytes:
        return read_file(self.path(index))

    def captions(self, index: int) -> tuple[str, ...]:
        return self._listing.captions[self._paths[index]]

    def second(self, index: int, kind: str) -> bytes | None:
        """The picture that the metadata's column names, or that lies beside it as `NAME.control.png`."""
        found = self._listing.seconds(kind).get(self._paths[index])
        return None if found is None else read_file(self.root / found)

    def named_by_file(self, index: int) -> bool:
        """Whether the caption of picture `index` is nothing but the words of its name."""
        return self._paths[index] in self._listing.from_names

    def stray_texts(self) -> list[str]:
        """Text files beside no picture of their name."""
        return sorted((_shown(name.removeprefix(self._inside)) for name in self._listing.texts), key=natural)

    def rows_with(self, columns: tuple[str, ...]) -> set[str]:
        """Names of the pictures whose metadata have something in one of these columns."""
        found = set()
        for file in self._listing.metadata:
            path = self.root / file
            above = posixpath.dirname(file)
            for _, row in csv_rows(path) if path.suffix == ".csv" else jsonl_rows(path):
                if any(row.get(column) for column in columns) and isinstance(row.get("file_name"), str):
                    name = posixpath.normpath(posixpath.join(above, row["file_name"].strip()))
                    found.add(_shown(name.removeprefix(self._inside)))
        return found

    def soon(self, groups: Sequence[int]) -> None:
        """Nothing is done: all is at hand."""

    def known(self, index: int) -> Checked | None:
        """None: a folder has no index, and its files may change."""
        del index

    def _tell_of_names(self) -> None:
        listing = self._listing
        named = len(listing.from_names)
        if 0 < named < len(listing.captions):
            log.warning("%s: %d pictures have their captions from file names only", self.folder, named)
        elif listing.from_names:
            log.info("%s: captions are the words of the file names, such as %r", self.folder, self.captions(0)[0])


class FolderSource(Pictures):
    """The pictures of a `FolderStore`, each cut to a square of side `resolution` unless `reading` says otherwise.

    Args:
        path, split, caption_columns, caption, extensions: see `FolderStore`.
        resolution, crop, reading: see `Reading`; `reading` in place of the other two.
        more: as `Pictures` takes it.
    """

    def __init__(
        self,
        *,
        path: str | Path,
        resolution: int = 64,
        crop: str = "center",
        reading: Reading | None = None,
        split: str | None = None,
        caption_columns: tuple[str, ...] = CAPTION_COLUMNS,
        caption: str | None = None,
        extensions: frozenset[str] = EXTENSIONS,
        **more: Any,
    ) -> None:
        reading = reading or Reading(resolution, crop)
        store = FolderStore(path, split=split, caption_columns=caption_columns, caption=caption, extensions=extensions)
        self.folder = store.folder
        super().__init__(store, reading, **more)


def _shown(name: str) -> str:
    """A file name that can be printed: bytes that are no UTF-8 become question marks."""
    return name.encode("utf-8", "replace").decode()


def _existing(root: Path) -> Path:
    if not root.exists():
        raise UserError(f"{root}: no such folder; check data.path")
    if not root.is_dir():
        raise UserError(f"{root}: is a file, not a folder; set data.path to the folder that holds the pictures")
    if not os.access(root, os.R_OK | os.X_OK):
        raise UserError(f"{root}: may not be read by this user; change its permissions")
    return root


def _choose_split(root: Path, split: str | None, extensions: frozenset[str]) -> Path:
    if split is None:
        beside = any(entry.is_file() and entry.suffix.lower() in extensions for entry in root.iterdir())
        if beside or not (root / "train").is_dir():
            return root
        log.info("%s: reading its subfolder train (data.split chooses another)", root)
        return root / "train"
    if split in ("", ".", "..") or "/" in split or "\\" in split or not (root / split).is_dir():
        there = ", ".join(sorted(entry.name for entry in root.iterdir() if entry.is_dir())) or "none"
        raise UserError(f"{root}: no subfolder {split!r}; set data.split to one of its subfolders ({there}) or to null")
    return root / split


def _require_captions(folder: Path, listing: Listing, extensions: frozenset[str]) -> None:
    """Raise `UserError` unless a picture with a caption is there; the message says which of the two is missing."""
    if listing.captions:
        return
    if not listing.skipped:
        held = f"holds no pictures ({listing.other_files} other files)" if listing.other_files else "is empty"
        raise UserError(f"{folder}: {held}; put pictures there ({' '.join(sorted(extensions))})")
    counts = Counter(reason for _, reason in listing.skipped)
    why = "; ".join(f"{count} x {reason}" for reason, count in counts.most_common(3))
    why = f"{why}; the first is {_shown(listing.skipped[0][0])}"
    if any(reason.startswith(MISSING) for reason in counts):
        raise UserError(f"{folder}: no captions found ({why}); {_HOW}")
    raise UserError(f"{folder}: none of its {counts.total()} pictures can be used ({why}); check data.path")
