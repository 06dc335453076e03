"""Second pictures of a folder, which ControlNets follow: beside the first, or named by the metadata."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image

from latentgen.core.errors import UserError
from latentgen.data.sources.folder import FolderSource
from tests.data.test_folder import captions, draw, jsonl, opened


def followed(source: FolderSource) -> dict[str, np.ndarray | None]:
    return {source.name(index): source.control(index) for index in range(len(source))}


def test_a_second_picture_beside_the_first(tmp_path):
    expected = {}
    for seed, (name, control) in enumerate(
        {"a cat.png": "a cat.control.png", "deep/a dog.jpg": "deep/a dog.control.webp"}.items()
    ):
        draw(tmp_path / name, seed)
        draw(tmp_path / control, 10 + seed)
        expected[name] = np.asarray(Image.open(tmp_path / control).convert("RGB"))
    source = opened(tmp_path, controls=True)
    assert source.skipped == []
    found = followed(source)
    assert found.keys() == expected.keys()
    for name, picture in found.items():
        np.testing.assert_array_equal(picture, expected[name])
    plain = opened(tmp_path)
    assert len(plain) == 2, "nor is it an example where nobody follows it"
    assert set(map(type, followed(plain).values())) == {type(None)}
    assert plain.key() != source.key()


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_second_picture_by_the_metadata(kind, tmp_path):
    folder = tmp_path / "train"
    first, second = draw(folder / "poses/a.png", 5), draw(folder / "b.control.png", 6)
    for name in ("a.png", "b.png"):
        draw(folder / name)
    rows = [
        {"file_name": "a.png", "text": "one", "conditioning_image": "poses/a.png"},
        {"file_name": "b.png", "text": "two"},
    ]
    if kind == "jsonl":
        jsonl(folder, *rows)
    else:
        with open(folder / "metadata.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    source = opened(tmp_path, controls=True)
    found = followed(source)
    assert found.keys() == {"a.png", "b.png"}
    np.testing.assert_array_equal(found["a.png"], first)
    np.testing.assert_array_equal(found["b.png"], second)
    assert source.skipped == [], "they are no pictures without captions"


def test_another_second_picture_is_other_content(tmp_path):
    draw(tmp_path / "a cat.png")
    draw(tmp_path / "a cat.control.png", 1)
    before = opened(tmp_path, controls=True).key()
    draw(tmp_path / "a cat.control.png", 2)
    assert opened(tmp_path, controls=True).key() != before


def test_a_listed_picture_is_one_of_its_own(tmp_path):
    for name in ("a.png", "a.control.png"):
        draw(tmp_path / name)
    jsonl(tmp_path, {"file_name": "a.png", "text": "one"}, {"file_name": "a.control.png", "text": "two"})
    assert captions(opened(tmp_path)) == {"a.control.png": ("two",), "a.png": ("one",)}


def test_every_picture_needs_a_second_one(tmp_path):
    for name in ("a cat.png", "a dog.png", "a cow.png", "a cat.control.png"):
        draw(tmp_path / name)
    with pytest.raises(UserError, match=r"2 of 3 pictures have none to follow, the first is a cow.png; put a cow"):
        opened(tmp_path, controls=True)
    for name in ("a dog.control.png", "a cow.control.png"):
        (tmp_path / name).write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"the control of a cow.png: not a picture.*; replace that picture"):
        opened(tmp_path, controls=True)


@pytest.mark.parametrize("path", ["gone.png", "../outside.png", "/etc/outside.png", "a cat.png"])
def test_a_second_picture_that_is_none(path, tmp_path):
    folder = tmp_path / "pictures"
    draw(folder / "a cat.png")
    draw(tmp_path / "outside.png")
    jsonl(folder, {"file_name": "a cat.png", "text": "a cat", "conditioning_image": path})
    with pytest.raises(UserError, match=r"1 of 1 pictures have none to follow, the first is a cat.png"):
        opened(folder, controls=True)
    assert len(opened(folder)) == 1


def test_a_second_picture_that_is_no_name(tmp_path):
    draw(tmp_path / "a.png")
    jsonl(tmp_path, {"file_name": "a.png", "text": "a cat", "conditioning_image": 3})
    with pytest.raises(UserError, match=r"metadata.jsonl, line 1: conditioning_image is no file name; write the name"):
        opened(tmp_path)
