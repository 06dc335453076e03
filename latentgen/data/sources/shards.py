"""WebDataset tar shards as a store of pictures: read at random, by an index, wherever they lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from latentgen.core.errors import UserError
from latentgen.data.checking import Checked
from latentgen.data.images import MAX_PIXELS
from latentgen.data.sources.folder_captions import CAPTION_COLUMNS
from latentgen.data.sources.shard_files import ShardFiles
from latentgen.data.sources.shard_index import Entry, Place, captions_of
from latentgen.data.sources.shard_names import shard_names
from latentgen.data.tar import shown


class _Example(NamedTuple):
    shard: int
    name: str
    picture: Place
    seconds: dict[str, Place]
    captions: tuple[str, ...]
    checked: Checked


class ShardStore:
    """The pictures of tar shards with their captions, in the order of the shards.

    Files of one name up to the first dot are one example, as WebDataset has it: a picture, captions in `.txt` (a line
    each) and `.json` (the keys `caption_columns`), second pictures `.control.png` and `.mask.png`. Nothing is unpacked,
    and nothing that a shard holds is run.

    Args:
        patterns: paths or addresses of shards: `train-{00000..00009}.tar`, `*.tar`, a folder of them, or several.
        caption_columns: keys of `.json` that hold captions.
        caption: of pictures that have none; its `{caption}` takes those that they have.
        local: folder of indexes, and of shards that lie elsewhere.
        local_gib: how large the shards in it may become.
        window: shards that are at hand at once.
        max_pixels: larger pictures are refused.

    Raises:
        UserError: a shard is not there or cannot be fetched; there are no pictures with captions.
    """

    def __init__(
        self,
        patterns: str | Sequence[str],
        *,
        caption_columns: tuple[str, ...] = CAPTION_COLUMNS,
        caption: str | None = None,
        local: str | Path = "runs/.shards",
        local_gib: float = 20.0,
        window: int = 4,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.where = patterns if isinstance(patterns, str) else " ".join(patterns)
        self.max_pixels = max_pixels
        names = shard_names(patterns)
        self.files = ShardFiles(names, Path(local), gib=local_gib, window=window, max_pixels=max_pixels)
        self._titles = [Path(name).name for name in names]
        self._examples: list[_Example] = []
        self.skipped: list[tuple[str, str]] = []
        self.groups = tuple(self._take(number, caption_columns, caption) for number in range(len(names)))
        if not self._examples:
            why = f" ({self.skipped[0][0]}: {self.skipped[0][1]})" if self.skipped else ""
            raise UserError(f"{self.where}: no pictures with captions in {len(names)} shards{why}; check data.path")

    def __len__(self) -> int:
        return len(self._examples)

    def name(self, index: int) -> str:
        """The shard's name and the picture's in it, such as `train-00000.tar/a/0001.png`."""
        example = self._examples[index]
        return f"{self._titles[example.shard]}/{example.name}"

    def content(self, index: int) -> bytes:
        example = self._examples[index]
        return self.files.read(example.shard, example.picture)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._examples[index].captions

    def second(self, index: int, kind: str) -> bytes | None:
        example = self._examples[index]
        place = example.seconds.get(kind)
        return None if place is None else self.files.read(example.shard, place)

    def soon(self, groups: Sequence[int]) -> None:
        """See `ShardFiles.soon`."""
        self.files.soon(groups)

    def known(self, index: int) -> Checked | None:
        """What the index says; None of a picture that was refused under a smaller limit of pixels than there is now."""
        example = self._examples[index]
        height, width = example.checked.size
        if height * width > self.max_pixels:
            return Checked("", (0, 0), f"too large: {width} x {height} pixels, at most {self.max_pixels} are allowed")
        refused_earlier = self.files.indexes[example.shard].max_pixels < self.max_pixels
        return None if example.checked.reason and refused_earlier else example.checked

    def _take(self, shard: int, columns: tuple[str, ...], template: str | None) -> int:
        """Number the usable examples of a shard; returns how many there are."""
        index, title, before = self.files.indexes[shard], self._titles[shard], len(self._examples)
        self.skipped += [(f"{title}/{name}" if name else title, reason) for name, reason in index.skipped]
        for entry in index.entries:
            captions = captions_of(entry, columns, template)
            if isinstance(captions, str):
                self.skipped.append((f"{title}/{_name(entry)}", captions))
            else:
                self._examples.append(
                    _Example(shard, _name(entry), entry.picture, entry.seconds, captions, entry.checked)
                )
        return len(self._examples) - before


def _name(entry: Entry) -> str:
    return shown(f"{entry.name}.{entry.ending}")
