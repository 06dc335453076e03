"""Tables and data sets: what rows give, what is left out and why, and mistakes in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentgen.core.errors import UserError
from latentgen.data.reading import Reading
from latentgen.data.sources.hub import DatasetsStore, streamed_paths
from latentgen.data.sources.stored import Pictures
from latentgen.data.sources.table import TableStore, table_paths
from latentgen.recipe import sources
from latentgen.recipe.load import load_recipe

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def picture(path: Path, number: int = 0) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "PNG")
    return path.read_bytes()


def write_rows(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        columns = list(rows[0])
        lines = [columns, *([row.get(column) or "" for column in columns] for row in rows)]
        path.write_text("".join(",".join(f'"{cell}"' for cell in line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_rows_that_cannot_be_used_are_named_with_the_reason(name: str, tmp_path: Path) -> None:
    inner = tmp_path / "in"
    inner.mkdir()
    picture(inner / "a.png")
    picture(tmp_path / "outside.png", 1)
    (inner / "link.png").symlink_to(tmp_path / "outside.png")
    files = ["a.png", "../outside.png", str(tmp_path / "outside.png"), "link.png", "gone.png", "", "a.png"]
    texts = ["a cat", "b", "c", "d", "e", "f", " "]
    rows = [{"path": file, "caption": text} for file, text in zip(files, texts, strict=True)]
    store = TableStore([write_rows(inner / name, rows)])
    assert [store.name(i) for i in range(len(store))] == ["a.png"]
    assert store.captions(0) == ("a cat",)
    reasons = [reason for _, reason in store.skipped]
    assert sum("leads outside" in reason for reason in reasons) == 3
    assert sum("missing on disk" in reason for reason in reasons) == 1
    assert sum("no file in the column path" in reason for reason in reasons) == 1
    assert sum(reason.startswith("no caption") for reason in reasons) == 1
    given = TableStore([str(inner / name)], caption="a pet, {caption}")
    assert [given.captions(i) for i in range(len(given))] == [("a pet, a cat",), ("a pet",)]


def test_columns_are_those_that_are_asked_for(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", 1)
    rows = [{"file_name": "a.png", "other": "b.png", "text": "one", "long": ["two", "one"]}]
    path = write_rows(tmp_path / "t.jsonl", rows)
    assert TableStore([path]).name(0) == "a.png"
    chosen = TableStore([path], image_column="other", caption_columns=("long", "text"))
    assert chosen.name(0) == "b.png"
    assert chosen.captions(0) == ("two", "one")
    with pytest.raises(UserError, match=r"no column of pictures; name it in data.image_column \(columns: file_name"):
        TableStore([path], image_column="picture")
    with pytest.raises(UserError, match=r"no column of captions; name them in data.caption_columns"):
        TableStore([path], caption_columns=("title",))


def test_second_pictures_are_named_by_columns(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    follow, mask = picture(tmp_path / "edges.png", 1), picture(tmp_path / "m.png", 2)
    rows = [{"file_name": "a.png", "text": "x", "conditioning_image": "edges.png", "mask": "m.png"}]
    store = TableStore([write_rows(tmp_path / "t.csv", rows)])
    assert store.second(0, "control") == follow
    assert store.second(0, "mask") == mask


def test_pictures_in_parquet_are_decoded_beforehand_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = [picture(tmp_path / f"{i}.png", i) for i in range(3)]
    rows = [{"image": content, "text": "x"} for content in (*good[:2], b"no picture", None, good[2])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=2)

    def opened() -> Pictures:
        store = TableStore([str(tmp_path / "t.parquet")], local=tmp_path / "local", window=1)
        assert store.groups == (2, 2, 1)
        return Pictures(store, Reading(8))

    first = opened()
    assert [name for name, _ in first.skipped] == ["t.parquet, row 2", "t.parquet, row 3"]
    assert [first.image(i).tobytes() for i in range(3)] == [
        np.asarray(Image.open(tmp_path / f"{i}.png")).tobytes() for i in range(3)
    ]

    def refuse(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr("latentgen.data.sources.parquet.check_pictures", refuse)
    assert opened().key() == first.key()
    monkeypatch.undo()
    rows[0]["image"] = good[2]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=2)
    assert opened().key() != first.key(), "a changed file is noticed"


def test_elsewhere_by_fsspec(tmp_path: Path) -> None:
    import fsspec

    rows = [{"image": {"bytes": picture(tmp_path / f"{i}.png", i), "path": None}, "text": f"no. {i}"} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=2)
    fsspec.filesystem("memory").pipe("/set/t.parquet", (tmp_path / "t.parquet").read_bytes())
    far = Pictures(TableStore(["memory://set/t.parquet"], local=tmp_path / "local"), Reading(8))
    near = Pictures(TableStore([str(tmp_path / "t.parquet")], local=tmp_path / "local"), Reading(8))
    assert far.key() == near.key()
    assert (far.image(3) == near.image(3)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: table_paths(str(path / "none.csv")), "no such table"),
        (lambda path: TableStore([str(path / "text.csv"), str(path / "rows.jsonl")]), "all of one kind"),
        (lambda path: TableStore([str(path / "text.csv")]), "has no rows|no column|no row"),
        (lambda path: TableStore([str(path / "bad.jsonl")]), "bad.jsonl, line 1: not valid JSON"),
        (lambda path: TableStore([str(path / "bad.parquet")]), "cannot be read as parquet"),
        (lambda path: DatasetsStore("nobody/such-a-set"), "cannot be opened as a data set"),
        (lambda path: DatasetsStore(str(path / "set"), split="test"), "split"),
        (lambda path: streamed_paths(str(path / "set"), None, None), "not kept as parquet"),
    ],
)
def test_mistakes_are_told_in_one_line(
    make: Callable, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("datasets.config.HF_HUB_OFFLINE", "huggingface_hub.constants.HF_HUB_OFFLINE"):
        monkeypatch.setattr(name, True)
    for name in ("text.csv", "rows.jsonl", "bad.jsonl", "bad.parquet"):
        (tmp_path / name).write_text("file_name,text\n" if name == "text.csv" else "{")
    (tmp_path / "set").mkdir()
    picture(tmp_path / "set" / "a.png")
    write_rows(tmp_path / "set" / "metadata.jsonl", [{"file_name": "a.png", "text": "x"}])
    with pytest.raises(UserError, match=message) as told:
        make(tmp_path)
    assert "\n" not in str(told.value)


def test_a_recipe_reads_them(tmp_path: Path) -> None:
    rows = [{"file_name": f"{i}.png", "text": f"no. {i}"} for i in range(90)]
    for number in range(90):
        picture(tmp_path / f"{number}.png", number)
    write_rows(tmp_path / "metadata.jsonl", rows)
    write_rows(tmp_path / "t.csv", rows)
    found = {
        kind: sources.examples(
            load_recipe(None, [f"data={{source: {kind}, path: '{path}', resolution: 16, holdout: 8}}", "name=t"])
        )
        for kind, path in (("folder", tmp_path), ("table", tmp_path / "t.csv"), ("datasets", tmp_path))
    }
    assert len({each.training.key() for each in found.values()}) == 1, "the same pictures, captions and order"
    assert all(len(each.held_out) == 8 for each in found.values())
    mixed = load_recipe(
        None,
        [
            f"data={{source: mixture, resolution: 64, holdout: 8, mixture: [{{path: '{tmp_path}', share: 3}}, "
            "{source: shapes, size: 100}]}",
        ],
    )
    training = sources.examples(mixed).training
    seen = training.order(8).at(range(400), 0, "unet")
    ours = sum(i < len(found["folder"].training) for i in seen)
    assert ours == 300
