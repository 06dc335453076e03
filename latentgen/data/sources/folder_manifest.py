"""What a folder of pictures holds and which captions belong to which picture; no pixel is read here.

The metadata layout is that of Hugging Face's `imagefolder`: `metadata.jsonl` or `metadata.csv`, with a
column `file_name`.
"""

from __future__ import annotations

import logging
import os
import posixpath
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

from latentgen.data.sources.folder_captions import (
    METADATA,
    caption_of_name,
    read_controls,
    read_metadata,
    read_sidecar,
    with_template,
)

log = logging.getLogger(__name__)

MISSING = "no caption"
"""How reasons begin that a caption for all would do away with."""
NO_CAPTION = f"{MISSING} in metadata"
NO_WORDS = f"{MISSING}: no .txt beside it, and no words in its name"
CONTROL, MASK = ".control", ".mask"
"""End of the stem of a picture for a ControlNet to follow, and of one that says which pixels count."""
OUTSIDE = "leads outside the folder of pictures; put a copy of the file inside"

Captions = tuple[str, ...]


@dataclass
class Listing:
    """Captions by the picture's path relative to the root, and what was left out and why; both in natural order.

    `controls` and `masks`: by the same path, that of the second picture for a ControlNet to follow, and of the one that
    says which pixels count, where there is one. `from_names`: pictures whose captions are words of their names.
    `texts`: `.txt` files beside no picture. `metadata`: files that were read.
    """

    captions: dict[str, Captions] = field(default_factory=dict)
    controls: dict[str, str] = field(default_factory=dict)
    masks: dict[str, str] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    other_files: int = 0
    from_names: set[str] = field(default_factory=set)
    texts: set[str] = field(default_factory=set)
    metadata: list[str] = field(default_factory=list)

    def seconds(self, kind: str) -> dict[str, str]:
        """Second pictures of the kind "control" or "mask"."""
        return {"control": self.controls, "mask": self.masks}[kind]


def natural(name: str) -> tuple[tuple[str | int, ...], str]:
    """Sort key: "img2" before "img10"; the text itself decides between equals such as "img01" and "img1"."""
    parts = re.split(r"([0-9]+)", name)
    return tuple(int(part) if index % 2 else part for index, part in enumerate(parts)), name


def list_folder(
    root: Path, base: Path, columns: tuple[str, ...], extensions: frozenset[str], template: str | None = None
) -> Listing:
    """The pictures below `base` and their captions.

    The nearest metadata file that lists a picture, going up from its own folder to `root`, gives its captions. Where no
    metadata file is met on that way, a text file of the same stem does, and else the words of the file's name.

    `NAME.control.png` (or another ending) beside `NAME.png` is not a picture of its own but the one that a ControlNet
    follows; so is what the metadata's column `conditioning_image` names. `NAME.mask.png` says which pixels count.

    Args:
        template: takes the place of the words of names: it is the caption of pictures for which none is written, and
            its `{caption}` takes those that are.

    Raises:
        UserError: a metadata file that cannot be understood.
    """
    listing = Listing()
    files = _walk(base, root, listing)
    folders = _folders(root, base, files)
    tables = {folder: _table(root, folder, names, columns, listing) for folder, names in folders}
    tables = {folder: table for folder, table in tables.items() if table is not None}
    inside = posixpath.join(_relative(base, root), "")
    listed = {name for table in tables.values() for name in table if name.startswith(inside)}
    on_disk = {posixpath.join(folder, name) for folder, names in files.items() for name in names}
    pictures = {name for name in on_disk if posixpath.splitext(name)[1].lower() in extensions}
    controls = _controls(root, folders, pictures, listed)
    masks = _beside(MASK, pictures, listed)
    pictures -= {*controls.values(), *masks.values()}
    real_root = os.path.realpath(root)
    listing.other_files = len(on_disk - pictures)
    for name in sorted(pictures | listed, key=natural):
        found = _caption(root, real_root, name, tables, on_disk)
        if template is not None:
            found = _templated(found, template)
        if isinstance(found, str):
            listing.skipped.append((name, found))
            continue
        captions, from_name = found
        listing.captions[name] = captions
        if name in controls:
            listing.controls[name] = controls[name]
        if name in masks:
            listing.masks[name] = masks[name]
        if from_name:
            listing.from_names.add(name)
    stems = {posixpath.splitext(name)[0] for name in pictures}
    texts = {name for name in on_disk if name.endswith(".txt")}
    listing.texts = {name for name in texts if posixpath.splitext(name)[0] not in stems}
    listing.metadata = [posixpath.join(folder, name) for folder, names in folders for name in METADATA if name in names]
    listing.skipped.sort(key=lambda item: natural(item[0]))
    return listing


def _walk(base: Path, root: Path, listing: Listing) -> dict[str, list[str]]:
    """Folder (relative to `root`, "" for itself) -> file names; hidden files and folders are left out."""
    files: dict[str, list[str]] = {}

    def unreadable(error: OSError) -> None:
        listing.skipped.append((_relative(Path(error.filename), root), f"the folder cannot be read: {error.strerror}"))

    for parent, folders, names in os.walk(base, onerror=unreadable):
        folder = _relative(Path(parent), root)
        visible = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        links = [name for name in visible if Path(parent, name).is_symlink()]
        listing.skipped += [(posixpath.join(folder, name), "a link to a folder, not followed") for name in links]
        folders[:] = sorted(set(visible) - set(links))
        files[folder] = [name for name in names if not name.startswith(".")]
    return files


def _relative(path: Path, root: Path) -> str:
    return "" if path == root else path.relative_to(root).as_posix()


def _folders(root: Path, base: Path, files: dict[str, list[str]]) -> list[tuple[str, list[str]]]:
    """The walked folders, and those between `base` and `root` (a metadata file may stand above the splits)."""
    above = [] if base == root else [folder for folder in base.parents if folder == root or root in folder.parents]
    extra = [(_relative(folder, root), [entry.name for entry in folder.iterdir()]) for folder in above]
    return [*files.items(), *extra]


def _table(
    root: Path, folder: str, names: list[str], columns: tuple[str, ...], listing: Listing
) -> dict[str, Captions] | None:
    """Picture (relative to the root) -> captions of one folder's metadata file; None where there is none."""
    kind = next((name for name in METADATA if name in names), None)
    if kind is None:
        return None
    if kind == METADATA[0] and METADATA[1] in names:
        log.warning("%s: %s is used, %s beside it is ignored", root / folder, *METADATA)
    table: dict[str, Captions] = {}
    for file_name, captions in read_metadata(root / folder / kind, columns).items():
        name = inside(root, folder, file_name)
        if name is None:
            listing.skipped.append((posixpath.join(folder, file_name), OUTSIDE))
        else:
            table[name] = tuple(dict.fromkeys((*table.get(name, ()), *captions)))
    return table


def _controls(root: Path, folders: list[tuple[str, list[str]]], pictures: set[str], listed: set[str]) -> dict[str, str]:
    """Picture -> the picture to follow, both relative to the root: by the nearest metadata file that names one, else by
    its name, unless it is `listed` as a picture of its own. What leads outside or is missing is none."""
    found = _beside(CONTROL, pictures, listed)
    for folder, names in sorted(folders):  # deeper folders come later, and win
        kind = next((name for name in METADATA if name in names), None)
        for file_name, control in read_controls(root / folder / kind).items() if kind is not None else ():
            picture, path = (inside(root, folder, text) for text in (file_name, control))
            if picture is not None and path is not None and path != picture and _is_file(root / path):
                found[picture] = path
    real_root = os.path.realpath(root)
    return {k: path for k, path in found.items() if Path(os.path.realpath(root / path)).is_relative_to(real_root)}


def _beside(ending: str, pictures: set[str], listed: set[str]) -> dict[str, str]:
    """Picture -> the picture beside it whose stem has `ending` more, unless that is `listed` as one of its own."""
    of_stem = {posixpath.splitext(name)[0]: name for name in sorted(pictures, key=natural, reverse=True)}
    found: dict[str, str] = {}
    for stem, name in of_stem.items():
        picture = of_stem.get(stem.removesuffix(ending))
        if stem.endswith(ending) and picture is not None and name not in listed:
            found[picture] = name
    return found


def inside(root: Path, folder: str, file_name: str) -> str | None:
    """The listed file relative to the root; None if it is absolute or climbs out of the metadata file's folder."""
    if PureWindowsPath(file_name).drive or file_name.startswith(("/", "\\")):
        return None
    # A list made on Windows or macOS may spell the same name otherwise.
    slashed = file_name.replace("\\", "/")
    spellings = (file_name, slashed, *(unicodedata.normalize(form, slashed) for form in ("NFC", "NFD")))
    found = next((text for text in spellings if _is_file(root / folder / text)), file_name)
    name = posixpath.normpath(found)
    return None if ".." in slashed.split("/") else posixpath.join(folder, name)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name longer than the file system allows
        return False


def _caption(
    root: Path, real_root: str, name: str, tables: dict[str, dict[str, Captions]], on_disk: set[str]
) -> tuple[Captions, bool] | str:
    """A picture's captions and whether they come from its name, or the reason why it cannot be used."""
    path = root / name
    if name not in on_disk and not _is_file(path):
        return "listed in metadata but missing on disk"
    if not Path(os.path.realpath(path)).is_relative_to(real_root):
        return OUTSIDE
    above = [parent for parent in _parents(name) if parent in tables]
    if above:
        captions = next((tables[parent][name] for parent in above if name in tables[parent]), ())
        return (captions, False) if captions else NO_CAPTION
    sidecar = posixpath.splitext(name)[0] + ".txt"
    if sidecar in on_disk:
        read = read_sidecar(root / sidecar)
        return read if isinstance(read, str) else (read, False)
    words = caption_of_name(posixpath.splitext(posixpath.basename(name))[0])
    return ((words,), True) if words else NO_WORDS


def _templated(found: tuple[Captions, bool] | str, template: str) -> tuple[Captions, bool] | str:
    if isinstance(found, str):
        return (with_template((), template), False) if found.startswith(MISSING) else found
    captions, from_name = found
    return with_template(() if from_name else captions, template), False


def _parents(name: str) -> list[str]:
    """Folders of a relative path, nearest first: "a/b/c.png" -> "a/b", "a", ""."""
    parts = name.split("/")[:-1]
    return ["/".join(parts[:count]) for count in range(len(parts), -1, -1)]
