"""Laws that hold for every source: a new one is tested by being listed in `SOURCES`."""

from __future__ import annotations

import csv
import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentgen.core.rand import Draw
from latentgen.data.loader import Cut, Loader
from latentgen.data.order import ByShape, Interleaved, ReadAhead, WindowedByShape
from latentgen.data.reading import Reading
from latentgen.data.sources.base import Source
from latentgen.data.sources.drawn import DrawnStore
from latentgen.data.sources.folder import FolderSource, FolderStore
from latentgen.data.sources.hub import DatasetsStore, streamed_paths
from latentgen.data.sources.mixture import Mixture, counts_of
from latentgen.data.sources.shapes import ShapesSource
from latentgen.data.sources.shard_writer import write_shards
from latentgen.data.sources.shards import ShardStore
from latentgen.data.sources.stored import Pictures
from latentgen.data.sources.subset import Subset
from latentgen.data.sources.table import TableStore, table_paths

SIZES = ((12, 8), (8, 12), (10, 10), (9, 8), (16, 8), (8, 15), (24, 9))
"""Width and height of the pictures that are written."""
BATCH = 4


def write_pictures(folder: Path) -> list[dict[str, Any]]:
    """Pictures of `SIZES`, and a row of metadata for each."""
    folder.mkdir()
    rows = []
    for number, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"p{number}.png")
        rows.append({"file_name": f"p{number}.png", "text": f"picture {number}", "captions": [f"no. {number}"]})
    return rows


def folder(path: Path) -> Source:
    rows = write_pictures(path / "in")
    (path / "in" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FolderSource(path=path / "in", resolution=8)


def bucketed(path: Path) -> Source:
    folder(path)
    return Pictures(FolderStore(path / "in"), Reading(16), buckets=3, step=8)


def csv_table(path: Path) -> Source:
    rows = write_pictures(path / "in")
    with open(path / "in" / "all.csv", "w", newline="") as file:
        table = csv.DictWriter(file, ["file_name", "text"], extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    return Pictures(TableStore([str(path / "in" / "all.csv")]), Reading(8))


def jsonl_table(path: Path) -> Source:
    folder(path)
    return Pictures(TableStore([str(path / "in" / "metadata.jsonl")]), Reading(8))


def parquet_paths(path: Path) -> Source:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(write_pictures(path / "in")), path / "in" / "all.parquet")
    return Pictures(TableStore([str(path / "in" / "all.parquet")]), Reading(8))


def write_parquet(path: Path) -> None:
    """Two files with the pictures inside, row groups of two."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"image": {"bytes": (path / "in" / row["file_name"]).read_bytes(), "path": None}, "text": row["text"]}
        for row in write_pictures(path / "in")
    ]
    (path / "tables").mkdir()
    for number, part in enumerate((rows[:4], rows[4:])):
        name = path / "tables" / f"train-{number:05d}-of-00002.parquet"
        pq.write_table(pa.Table.from_pylist(part), name, row_group_size=2)


def parquet_bytes(path: Path) -> Source:
    write_parquet(path)
    store = TableStore(table_paths(str(path / "tables")), local=path / "local", window=2)
    return Pictures(store, Reading(8), window=2)


def arrow(path: Path) -> Source:
    import datasets

    rows = write_pictures(path / "in")
    columns = {"image": [str(path / "in" / row["file_name"]) for row in rows], "text": [row["text"] for row in rows]}
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(path / "saved")
    return Pictures(DatasetsStore(str(path / "saved")), Reading(8))


def streamed(path: Path) -> Source:
    write_parquet(path)
    store = TableStore(streamed_paths(str(path / "tables"), None, None), local=path / "local", window=1)
    return Pictures(store, Reading(8), window=1)


def write_tars(path: Path) -> str:
    folder(path)
    write_shards([FolderStore(path / "in")], path / "out", size=6_000, max_pixels=10_000)
    return str(path / "out" / "*.tar")


def shards(path: Path) -> Source:
    return Pictures(ShardStore(write_tars(path), local=path / "local", window=2), Reading(8), window=2)


def bucketed_shards(path: Path) -> Source:
    store = ShardStore(write_tars(path), local=path / "local", window=2)
    return Pictures(store, Reading(16), buckets=3, step=8, window=2)


def drawn_shards(path: Path) -> Source:
    write_shards([DrawnStore(ShapesSource(size=5), "shapes")], path / "out", size=1 << 14, max_pixels=10_000)
    return Pictures(ShardStore(str(path / "out"), local=path / "local"), Reading(64))


def mixture(path: Path) -> Source:
    parts = (folder(path), Subset(ShapesSource(size=9), (1, 5, 8)))
    small = Pictures(FolderStore(path / "in"), Reading(64))
    return Mixture((small, parts[1]), counts_of((len(small), 3), (2.0, 1.0)), (1.0, 0.5))


def mixed_shapes(path: Path) -> Source:
    return Mixture((bucketed(path), ShapesSource(size=6)), (7, 6))


SOURCES: dict[str, Callable[[Path], Source]] = {
    "shapes": lambda path: ShapesSource(size=11),
    "one example": lambda path: ShapesSource(size=1),
    "fewer than a batch": lambda path: ShapesSource(size=3),
    "folder": folder,
    "bucketed folder": bucketed,
    "csv": csv_table,
    "jsonl": jsonl_table,
    "parquet of paths": parquet_paths,
    "parquet of pictures": parquet_bytes,
    "data set on the disk": arrow,
    "data set streamed": streamed,
    "shards": shards,
    "bucketed shards": bucketed_shards,
    "shards of the shapes": drawn_shards,
    "subset": lambda path: Subset(folder(path), (4, 1, 6)),
    "subset of shards": lambda path: Subset(shards(path), (0, 2, 3, 5)),
    "mixture": mixture,
    "mixture of shapes and sizes": mixed_shapes,
}

WORKERS = ("folder", "parquet of pictures", "bucketed shards", "mixture of shapes and sizes")
"""Sources that are read by other processes too; those take a second each."""


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    return SOURCES[request.param](tmp_path)


def epoch_of(source: Source) -> int:
    order = source.order(BATCH)
    order = order.order if isinstance(order, ReadAhead) else order
    if isinstance(order, ByShape):
        return order.batches * BATCH
    if isinstance(order, WindowedByShape):
        return order.epoch(3, "unet")
    return sum(order.counts) if isinstance(order, Interleaved) else len(source)


def test_every_example_is_what_is_known_of_it_and_always_the_same(source: Source) -> None:
    copy = pickle.loads(pickle.dumps(source))
    for index in range(len(source)):
        image = source.image(index)
        assert image.dtype == np.uint8
        assert image.shape == (*source.shape(index), 3)
        assert (copy.image(index) == image).all(), "a worker reads what the main process reads"
        assert copy.captions(index) == source.captions(index)
        assert all(source.captions(index))
        assert len(set(source.captions(index))) == len(source.captions(index)) >= 1
        assert copy.digest(index) == source.digest(index)
        assert copy.picture_key(index) == source.picture_key(index)
        assert source.name(index)
        height, width = source.frame(index).original
        assert height > 0
        assert width > 0
    assert copy.key() == source.key()


def test_keys_tell_pictures_apart(source: Source) -> None:
    seen: dict[str, bytes] = {}
    for index in range(len(source)):
        pixels = source.image(index).tobytes()
        assert seen.setdefault(source.picture_key(index), pixels) == pixels
    assert len(set(seen.values())) == len(seen), "these pictures are all different"


def test_an_epoch_shows_every_example_and_any_position_resumes(source: Source) -> None:
    order, epoch = source.order(BATCH), epoch_of(source)
    whole = order.at(range(2 * epoch + 5), 3, "unet")
    for start in range(2 * epoch + 5):
        assert order.at(range(start, min(start + 6, 2 * epoch + 5)), 3, "unet") == whole[start : start + 6]
    # The parts of a mixture go on through epochs of their own.
    for number in (0,) if isinstance(order, Interleaved) else (0, 1):
        shown = Counter(whole[number * epoch : (number + 1) * epoch])
        assert set(shown) == set(range(len(source)))
    if len(source) > 3:
        assert whole[:epoch] != whole[epoch : 2 * epoch]


def named(source: Source, world: int, workers: int, steps: int, start: int = 0) -> list[list[str]]:
    """The names of each global batch, put together from all processes."""
    batches: list[list[str]] = [[] for _ in range(steps - start)]
    for rank in range(world):
        cut = Cut(6, None, rank, world)
        loader = Loader(_Names(source), source.order(6), 1, "unet", cut, steps, workers)
        for step, parts in loader.iterate(start):
            batches[step - start] += [name for _, names in parts for name in names]
    return batches


class _Names:
    def __init__(self, source: Source) -> None:
        self.source = source

    def __call__(self, draw: Draw) -> Any:
        (shape,) = {self.source.shape(index) for index in draw.indices}
        return [f"{self.source.name(index)} {self.source.image(index).sum()} {shape}" for index in draw.indices]


def test_processes_and_resuming_change_nothing(source: Source) -> None:
    alone = named(source, 1, 0, 4)
    assert named(source, 2, 0, 4) == alone
    assert named(source, 3, 0, 4) == alone
    assert named(source, 2, 0, 4, start=3) == alone[3:]


@pytest.mark.parametrize("name", WORKERS)
def test_workers_change_nothing(name: str, tmp_path: Path) -> None:
    source = SOURCES[name](tmp_path)
    alone = named(source, 1, 0, 4)
    assert named(source, 2, 1, 4) == alone
    assert named(source, 1, 3, 4, start=1) == alone[1:]


def test_a_mixture_has_exact_shares_over_an_epoch(tmp_path: Path) -> None:
    source = mixture(tmp_path)
    assert isinstance(source, Mixture)
    assert source.counts == (7, 4)
    seen = source.order(BATCH).at(range(source.epoch), 0, "unet")
    assert Counter(source.part_of(index)[0] for index in seen) == {0: 7, 1: 4}
