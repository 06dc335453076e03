"""A folder of the user's own pictures with captions, as a source of training examples."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from latentgen.core.errors import UserError
from latentgen.core.files import content_key
from latentgen.data.images import CROPS, MAX_PIXELS, BadPicture, decode, fit, read_file
from latentgen.data.sources.folder_captions import CAPTION, with_template
from latentgen.data.sources.folder_manifest import MISSING, Listing, list_folder, natural

log = logging.getLogger(__name__)

VERSION = 1
"""Part of every content key; to be raised whenever the same file would give other pixels or captions."""

CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
# HEIC and SVG are looked for so that they are named among the skipped, not overlooked.
_ENDINGS = ("png apng jpg jpeg jpe jfif mpo webp avif bmp gif tif tiff", "jp2 j2k tga qoi psd ico ppm pgm pbm pnm pfm")
EXTENSIONS = frozenset(f".{ending}" for line in (*_ENDINGS, "heic heif svg") for ending in line.split())
_SHOWN = 10
_HOW = (
    'write metadata.jsonl beside the pictures, a line each: {"file_name": "a.png", "text": "a red heart"}; '
    "or metadata.csv with the columns file_name,text; or a.txt beside a.png; or call the file red_heart.png; "
    "or give all one: data.caption='a photo of a red heart'"
)


class FolderSource:
    """Pictures below a folder, in natural order of their paths, each with one or more captions.

    Every picture is decoded once at construction. One that is broken, has no caption or lies outside the folder is
    left out and stands in `skipped` as (name, reason).

    Args:
        path: the folder. Pictures in subfolders belong to it.
        resolution: side of the pictures handed out, in pixels.
        crop: "center" or "stretch", see `images.fit`.
        split: subfolder to read ("train", "validation"). None reads the folder itself, or its subfolder "train" if
            that exists and no picture lies beside it.
        caption_columns: metadata columns that hold captions; all that are there are used, in this order.
        caption: of pictures that have none in metadata or beside them; its `{caption}` takes those that they have.
        extensions: endings (lower case, with the dot) that make a file a picture.
        max_pixels: larger pictures are skipped.

    Raises:
        UserError: no such folder, no pictures, no captions, bad metadata, or every picture broken; `caption` is empty.
    """

    def __init__(
        self,
        *,
        path: str | Path,
        resolution: int,
        crop: str = "center",
        split: str | None = None,
        caption_columns: tuple[str, ...] = CAPTION_COLUMNS,
        caption: str | None = None,
        extensions: frozenset[str] = EXTENSIONS,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if crop not in CROPS:
            raise UserError(f"data.crop: {crop!r} is unknown; choose one of {', '.join(CROPS)}")
        if resolution < 1:
            raise UserError(f"data.resolution: {resolution} is too small; choose at least 1 pixel")
        if caption is not None and not with_template((), caption)[0]:
            raise UserError(
                f"data.caption: {caption!r} says nothing of a picture without a caption; add words beside {CAPTION}"
            )
        self.resolution, self.crop, self.max_pixels = resolution, crop, max_pixels
        root = _existing(Path(path))
        self.folder = _choose_split(root, split, extensions)
        listing = list_folder(root, self.folder, caption_columns, extensions, caption)
        _require_captions(self.folder, listing, extensions)
        inside = "" if self.folder == root else f"{self.folder.name}/"
        names = [name.removeprefix(inside) for name in listing.captions]
        checked = _check_all([self.folder / name for name in names], max_pixels)
        self._names = [name for name, (digest, _) in zip(names, checked, strict=True) if digest]
        self._digests = [digest for digest, _ in checked if digest]
        self._captions = [listing.captions[inside + name] for name in self._names]
        broken = [(name, reason) for name, (digest, reason) in zip(names, checked, strict=True) if not digest]
        left_out = [(name.removeprefix(inside), reason) for name, reason in listing.skipped]
        skipped = sorted(left_out + broken, key=lambda item: natural(item[0]))
        self.skipped = [(_shown(name), reason) for name, reason in skipped]
        if not self._names:
            first = f"{_shown(broken[0][0])}: {broken[0][1]}"
            raise UserError(
                f"{self.folder}: none of its {len(names)} pictures can be used ({first}); replace the broken files"
            )
        self._report(listing)

    def __len__(self) -> int:
        return len(self._names)

    def key(self) -> str:
        """The content key: equal keys mean the same pictures and captions in the same order, wherever the folder is."""
        examples = [[digest, *captions] for digest, captions in zip(self._digests, self._captions, strict=True)]
        return content_key("folder", VERSION, self.resolution, self.crop, examples)

    @property
    def digests(self) -> tuple[str, ...]:
        """SHA-256 of every picture's file."""
        return tuple(self._digests)

    def image(self, index: int) -> np.ndarray:
        """Picture `index`, uint8 [resolution, resolution, 3], sRGB, upright, transparency on white."""
        path = self.folder / self._names[self._number(index)]
        try:
            return fit(decode(path, max_pixels=self.max_pixels, short_side=self.resolution), self.resolution, self.crop)
        except BadPicture as error:
            raise UserError(f"{path}: was fine when training began, now {error}; restore it and run again") from error

    def captions(self, index: int) -> tuple[str, ...]:
        """Captions of picture `index`, at least one, all different."""
        return self._captions[self._number(index)]

    def contrasts(self, index: int, caption: str) -> tuple[tuple[str, ...], ...]:
        """None: what else is true of a photograph nobody has written down."""
        del index, caption
        return ()

    def name(self, index: int) -> str:
        """Path of picture `index` relative to the folder, with forward slashes."""
        return _shown(self._names[self._number(index)])

    def _number(self, index: int) -> int:
        if not 0 <= index < len(self._names):
            raise UserError(f"{self.folder}: example {index} does not exist; there are {len(self)}, numbered from 0")
        return index

    def _report(self, listing: Listing) -> None:
        for name, reason in self.skipped[:_SHOWN]:
            log.warning("%s: skipped %s: %s", self.folder, name, reason)
        if len(self.skipped) > _SHOWN:
            log.warning("%s: skipped %d files in all", self.folder, len(self.skipped))
        if 0 < listing.from_names < len(listing.captions):
            log.warning("%s: %d pictures have their captions from file names only", self.folder, listing.from_names)
        elif listing.from_names:
            log.info("%s: captions are the words of the file names, such as %r", self.folder, self._captions[0][0])
        captions = sum(map(len, self._captions))
        log.info("%s: %d pictures with %d captions, %d skipped", self.folder, len(self), captions, len(self.skipped))


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


def _check_all(paths: list[Path], max_pixels: int) -> list[tuple[str, str]]:
    """(sha256, "") of every picture that decodes, ("", reason) of the others, in order; several at a time."""

    def check(path: Path) -> tuple[str, str]:
        try:
            content = read_file(path)
            decode(content, max_pixels=max_pixels)
        except BadPicture as error:
            return "", str(error)
        return hashlib.sha256(content).hexdigest(), ""

    # Pillow decodes without the interpreter's lock. Few threads, for each may hold a large picture.
    pool = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1))
    try:
        return list(pool.map(check, paths))
    finally:  # after Ctrl-C nothing that waits is begun
        pool.shutdown(cancel_futures=True)
