"""Folders as people bring them: every way to give captions, every mistake, and content keys."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from latentgen.core.errors import UserError
from latentgen.data.sources.folder import FolderSource
from latentgen.data.sources.folder_captions import caption_of_name
from latentgen.data.sources.folder_manifest import natural


def draw(path: Path, seed: int = 0, size: tuple[int, int] = (16, 16)) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(array).save(path)
    return array


def jsonl(folder: Path, *rows: dict) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def opened(folder: Path, **options) -> FolderSource:
    return FolderSource(path=folder, resolution=options.pop("resolution", 16), **options)


def captions(source: FolderSource) -> dict[str, tuple[str, ...]]:
    return {source.name(index): source.captions(index) for index in range(len(source))}


# ---- captions


def test_metadata_jsonl(tmp_path):
    pictures = [draw(tmp_path / name, seed) for seed, name in enumerate(["a.png", "b.png"])]
    jsonl(
        tmp_path,
        {"file_name": "b.png", "captions": ["two", " one ", "two"], "text": "one", "licence": 3},
        {"file_name": "./a.png", "caption": "x\n y"},
    )
    source = opened(tmp_path)
    assert captions(source) == {"a.png": ("x y",), "b.png": ("one", "two")}
    for index, picture in enumerate(pictures):
        np.testing.assert_array_equal(source.image(index), picture)
        assert source.image(index).dtype == np.uint8
    assert source.skipped == []


def test_metadata_csv(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        draw(tmp_path / name)
    with open(tmp_path / "metadata.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", "captions"])
        writer.writerow(["a.png", "a cat, asleep", json.dumps(["ein Kätzchen", "a cat, asleep"], ensure_ascii=False)])
        writer.writerow(["b.png", "[sic] two\nlines", ""])
        writer.writerow(["c.png", "", ""])
    source = opened(tmp_path)
    assert captions(source) == {"a.png": ("a cat, asleep", "ein Kätzchen"), "b.png": ("[sic] two lines",)}
    assert source.skipped == [("c.png", "no caption in metadata")]


def test_bom_crlf_blank_lines_repeated_rows_and_other_spellings(tmp_path):
    draw(tmp_path / "sub" / "a.png")
    draw(tmp_path / "caf\u00e9.png")
    lines = [
        '{"file_name": "sub\\\\a.png", "text": "one \u2028 caption"}',
        "",
        '{"file_name": "sub/a.png", "text": "another"}',
        '{"file_name": "cafe\u0301.png", "text": "half \\ud83d pair"}',
    ]
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    expected = {"caf\u00e9.png": ("half \ufffd pair",), "sub/a.png": ("one caption", "another")}
    assert captions(opened(tmp_path)) == expected


def test_jsonl_wins_over_csv_and_says_so(tmp_path, caplog):
    draw(tmp_path / "a.png")
    jsonl(tmp_path, {"file_name": "a.png", "text": "json"})
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,csv\n")
    assert captions(opened(tmp_path)) == {"a.png": ("json",)}
    assert "metadata.csv beside it is ignored" in caplog.text


def test_caption_columns(tmp_path):
    draw(tmp_path / "a.png")
    jsonl(tmp_path, {"file_name": "a.png", "text": "english", "de": "deutsch", "prompt": "p"})
    assert captions(opened(tmp_path)) == {"a.png": ("english", "p")}
    assert captions(opened(tmp_path, caption_columns=("de",))) == {"a.png": ("deutsch",)}


def test_sidecar_text(tmp_path):
    draw(tmp_path / "7.png")
    (tmp_path / "7.txt").write_bytes("\ufeffa heart\r\n\r\n  red   heart \r\na heart\r\n".encode())
    draw(tmp_path / "8.png")
    (tmp_path / "8.txt").write_text("\n")
    draw(tmp_path / "9.png")
    (tmp_path / "9.txt").write_bytes(b"caf\xe9")
    draw(tmp_path / "blue_star_2.png")
    source = opened(tmp_path)
    assert captions(source) == {"7.png": ("a heart", "red heart"), "blue_star_2.png": ("blue star",)}
    assert source.skipped == [("8.png", "no caption: 8.txt is empty"), ("9.png", "9.txt is not UTF-8 text")]


@pytest.mark.parametrize(
    ("stem", "caption"),
    [
        ("red_heart_02", "red heart"),
        ("red-heart", "red heart"),
        ("a cat (3)", "a cat"),
        ("heart02", "heart"),
        ("r2d2", "r2d2"),
        ("two 3 cats", "two 3 cats"),
        ("grün_Äpfel", "grün Äpfel"),
        ("红心_1", "红心"),
        ("facade", "facade"),
        ("decade of deadbeef1 cafes", "decade of deadbeef1 cafes"),
        ("000123", None),
        ("IMG_0042", None),
        ("3f2a9c0d1e", None),
        ("0b5e3e52-63f5-4c0e-9d5b-2d3f0a1b2c3d", None),
        ("_", None),
    ],
)
def test_file_names(tmp_path, stem, caption):
    assert caption_of_name(stem) == caption


def test_names_without_words_are_skipped_beside_others(tmp_path):
    draw(tmp_path / "0001.png")
    draw(tmp_path / "red_heart.png")
    source = opened(tmp_path)
    assert captions(source) == {"red_heart.png": ("red heart",)}
    assert source.skipped[0][0] == "0001.png"
    assert "no caption" in source.skipped[0][1]


def test_nested_folders_each_in_its_own_way(tmp_path):
    draw(tmp_path / "listed" / "1.png")
    draw(tmp_path / "listed" / "deep" / "2.png")
    jsonl(tmp_path / "listed", {"file_name": "deep/2.png", "text": "two"}, {"file_name": "1.png", "text": "one"})
    draw(tmp_path / "beside" / "3.PNG")
    (tmp_path / "beside" / "3.txt").write_text("three")
    draw(tmp_path / "named" / "a_4.jpg")
    draw(tmp_path / ".hidden" / "no.png")
    draw(tmp_path / "__MACOSX" / "no.png")
    (tmp_path / "named" / "._a_4.jpg").write_bytes(b"Mac")
    source = opened(tmp_path)
    assert list(captions(source).items()) == [
        ("beside/3.PNG", ("three",)),
        ("listed/1.png", ("one",)),
        ("listed/deep/2.png", ("two",)),
        ("named/a_4.jpg", ("a",)),
    ]
    assert source.skipped == []


def test_the_nearest_metadata_wins(tmp_path):
    draw(tmp_path / "sub" / "a.png")
    draw(tmp_path / "sub" / "b.png")
    jsonl(tmp_path, {"file_name": "sub/a.png", "text": "far"}, {"file_name": "sub/b.png", "text": "far b"})
    jsonl(tmp_path / "sub", {"file_name": "a.png", "text": "near"})
    assert captions(opened(tmp_path)) == {"sub/a.png": ("near",), "sub/b.png": ("far b",)}


# ---- what is left out


def test_skipped_are_named_and_counted(tmp_path, caplog):
    draw(tmp_path / "good.png")
    draw(tmp_path / "unlisted.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no")
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    names = ["good.png", "broken.jpg", "page.jpg", "gone.png"]
    jsonl(tmp_path, *({"file_name": name, "text": name} for name in names))
    with caplog.at_level(logging.INFO):
        source = opened(tmp_path)
    assert [source.name(index) for index in range(len(source))] == ["good.png"]
    assert [name for name, _ in source.skipped] == ["broken.jpg", "gone.png", "page.jpg", "unlisted.png"]
    reasons = dict(source.skipped)
    assert reasons["gone.png"] == "listed in metadata but missing on disk"
    assert reasons["page.jpg"] == "a web page saved under a picture's name"
    assert reasons["unlisted.png"] == "no caption in metadata"
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 4
    assert all(name in text for (name, _), text in zip(source.skipped, warnings, strict=True))
    assert "1 pictures with 1 captions, 4 skipped" in caplog.text


def test_many_skipped_are_counted_in_one_line(tmp_path, caplog):
    draw(tmp_path / "good one.png")
    for number in range(25):
        (tmp_path / f"bad thing {number}.png").write_bytes(b"")
    source = opened(tmp_path)
    assert len(source.skipped) == 25
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 11
    assert "bad thing 9.png" in warnings[9]
    assert warnings[10].endswith("skipped 25 files in all")


def test_paths_that_leave_the_folder_are_refused(tmp_path):
    draw(tmp_path / "secret.png")
    root = tmp_path / "set"
    draw(root / "good.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "inner.png").symlink_to(root / "good.png")
    (root / "up").symlink_to(tmp_path)
    bad = ["../secret.png", str(tmp_path / "secret.png"), "link.png", "up/secret.png", "..\\secret.png", "C:\\x.png"]
    jsonl(root, *({"file_name": name, "text": name} for name in ["good.png", "inner.png", *bad]))
    source = opened(root)
    assert list(captions(source)) == ["good.png", "inner.png"]
    reasons = dict(source.skipped)
    assert set(reasons) == {*bad, "up"}
    assert all("outside the folder" in reasons[name] for name in bad)


def test_strange_file_names_in_metadata_are_only_missing(tmp_path):
    draw(tmp_path / "a.png")
    strange = ["x" * 5000 + ".png", "half \ud83d.png", "a.png/b.png"]
    jsonl(tmp_path, {"file_name": "a.png", "text": "a"}, *({"file_name": name, "text": "t"} for name in strange))
    source = opened(tmp_path)
    assert len(source) == 1
    assert [reason for _, reason in source.skipped] == ["listed in metadata but missing on disk"] * 3


def test_a_picture_that_breaks_later_is_an_error_that_names_it(tmp_path):
    draw(tmp_path / "a cat.png")
    source = opened(tmp_path)
    (tmp_path / "a cat.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"a cat\.png.*empty.*restore"):
        source.image(0)


# ---- errors


def error_of(folder: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        opened(folder, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_folder_errors(tmp_path):
    assert "none: no such folder; check data.path" in error_of(tmp_path / "none")
    draw(tmp_path / "a file.png")
    assert "is a file, not a folder" in error_of(tmp_path / "a file.png")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{empty}: is empty; put pictures there" in error_of(empty)
    (empty / "notes.md").write_text("hello")
    assert "holds no pictures (1 other files)" in error_of(empty)
    assert "data.crop: 'oval'" in error_of(tmp_path, crop="oval")
    assert "data.resolution: 0" in error_of(tmp_path, resolution=0)


def test_all_broken(tmp_path):
    for number in range(3):
        (tmp_path / f"a cat {number}.png").write_bytes(b"")
    text = error_of(tmp_path)
    assert "none of its 3 pictures can be used (a cat 0.png: the file is empty (0 bytes))" in text
    assert "replace" in text


def test_no_captions_anywhere(tmp_path):
    for number in range(3):
        draw(tmp_path / f"{number:04d}.png")
    text = error_of(tmp_path)
    assert "no captions found (3 x no caption" in text
    assert all(form in text for form in ("metadata.jsonl", "metadata.csv", "a.txt", "red_heart.png"))
    jsonl(tmp_path, {"file_name": "other.png", "text": "t"})
    text = error_of(tmp_path)
    assert "3 x no caption in metadata; 1 x listed in metadata but missing on disk" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"file_name": "a.png", "text": "t"}\n{"file_name": "b.png" "text"}\n', "line 2: not valid JSON"),
        ('["a.png", "t"]\n', "line 1: a JSON list, not an object"),
        ('\n\n{"text": "t"}\n', "line 3: no file_name (found: text)"),
        ('{"file_name": "", "text": "t"}\n', "line 1: no file_name"),
        ('{"file_name": "a.png", "label": "t"}\n', "no captions found: its columns are file_name, label"),
        ('{"file_name": "a.png", "text": 5}\n', "line 1: text is int '5'"),
        ('{"file_name": "a.png", "captions": ["t", 5]}\n', "line 1: captions is list"),
        ('{"file_name": "a.png", "text": "t", "text": "u"}\n', "the key 'text' stands there twice"),
        ("\n \n", "has no rows"),
        ("[" * 100_000, "line 1: not valid JSON"),
    ],
)
def test_bad_jsonl(tmp_path, content, words):
    draw(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(content, encoding="utf-8")
    text = error_of(tmp_path)
    assert f"{tmp_path / 'metadata.jsonl'}" in text
    assert words in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"file_name,text\na.png,a cat, asleep\n", "line 2: more cells than the header has"),
        (b"name,text\na.png,t\n", "line 2: no file_name (found: name, text)"),
        (b"file_name,text\na.png,caf\xe9\n", "line 2: not UTF-8"),
        (b'file_name,text\na.png,"open\n', "not valid csv"),
        (b"", "has no rows"),
    ],
)
def test_bad_csv(tmp_path, content, words):
    draw(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_bytes(content)
    text = error_of(tmp_path)
    assert f"{tmp_path / 'metadata.csv'}" in text
    assert words in text


def test_index_out_of_range(tmp_path):
    draw(tmp_path / "a cat.png")
    source = opened(tmp_path)
    for index in (-1, 1):
        with pytest.raises(UserError, match=r"example -?1 does not exist; there are 1"):
            source.image(index)


# ---- a caption for those that have none


def test_pictures_without_captions_get_the_template(tmp_path):
    for name in ("IMG_0001.png", "sleeping dog.png", "with text.png", "empty.png"):
        draw(tmp_path / name)
    (tmp_path / "with text.txt").write_text("on a sofa\nasleep")
    (tmp_path / "empty.txt").write_text("\n")
    plain = "a photo of sks dog"
    source = opened(tmp_path, caption=plain)
    assert captions(source) == {
        "IMG_0001.png": (plain,),
        "empty.png": (plain,),
        "sleeping dog.png": (plain,),
        "with text.png": ("on a sofa", "asleep"),
    }
    assert source.skipped == []
    wrapped = captions(opened(tmp_path, caption=f"{plain}, {{caption}}, best quality"))
    assert wrapped["with text.png"] == (f"{plain}, on a sofa, best quality", f"{plain}, asleep, best quality")
    assert wrapped["IMG_0001.png"] == (f"{plain}, best quality",)
    assert captions(opened(tmp_path, caption=f"{plain}, {{caption}}"))["IMG_0001.png"] == (plain,)


def test_the_template_completes_metadata_too(tmp_path):
    for number, name in enumerate(["a.png", "b.png", "c.png"]):
        draw(tmp_path / name, number)
    jsonl(tmp_path, {"file_name": "a.png", "text": "a cat"}, {"file_name": "b.png", "text": ""})
    assert list(captions(opened(tmp_path))) == ["a.png"]
    assert captions(opened(tmp_path, caption="photo. {caption}")) == {
        "a.png": ("photo. a cat",),
        "b.png": ("photo.",),
        "c.png": ("photo.",),
    }
    (tmp_path / "d.txt").write_bytes(b"caf\xe9")
    (tmp_path / "metadata.jsonl").unlink()
    draw(tmp_path / "d.png")
    unreadable = opened(tmp_path, caption="x")
    assert unreadable.skipped == [("d.png", "d.txt is not UTF-8 text")], "a caption that is there is not passed over"


def test_the_template_is_part_of_the_key(tmp_path):
    draw(tmp_path / "1.png")
    assert opened(tmp_path, caption="a dog").key() == opened(tmp_path, caption="a  dog").key()
    assert opened(tmp_path, caption="a dog").key() != opened(tmp_path, caption="a cat").key()


def test_without_captions_the_error_names_the_key(tmp_path):
    draw(tmp_path / "IMG_0001.png")
    assert "data.caption=" in error_of(tmp_path)
    assert "data.caption: '{caption}, ' says nothing of a picture without" in error_of(tmp_path, caption="{caption}, ")


# ---- splits


def test_splits(tmp_path, caplog):
    draw(tmp_path / "train" / "red cat.png")
    draw(tmp_path / "validation" / "blue dog.png")
    with caplog.at_level(logging.INFO):
        assert captions(opened(tmp_path)) == {"red cat.png": ("red cat",)}
    assert "reading its subfolder train" in caplog.text
    assert captions(opened(tmp_path, split="validation")) == {"blue dog.png": ("blue dog",)}
    assert "no subfolder 'test'; set data.split to one of its subfolders (train, validation)" in error_of(
        tmp_path, split="test"
    )
    assert "no subfolder '..'" in error_of(tmp_path / "train", split="..")
    draw(tmp_path / "top one.png")
    assert list(captions(opened(tmp_path))) == ["top one.png", "train/red cat.png", "validation/blue dog.png"]


def test_metadata_above_the_splits(tmp_path):
    draw(tmp_path / "train" / "1.png")
    draw(tmp_path / "validation" / "1.png")
    jsonl(tmp_path, {"file_name": "train/1.png", "text": "t"}, {"file_name": "validation/1.png", "text": "v"})
    assert captions(opened(tmp_path)) == {"1.png": ("t",)}
    source = opened(tmp_path, split="validation")
    assert captions(source) == {"1.png": ("v",)}
    assert source.skipped == []


# ---- key and order


def test_key_follows_the_content(tmp_path):
    for number in range(3):
        draw(tmp_path / f"{number}.png", seed=number)
        (tmp_path / f"{number}.txt").write_text(f"picture {number}")
    first = opened(tmp_path).key()
    assert opened(tmp_path).key() == first
    keys = [first, opened(tmp_path, resolution=8).key(), opened(tmp_path, crop="stretch").key()]
    (tmp_path / "1.txt").write_text("picture 1!")
    keys.append(opened(tmp_path).key())
    (tmp_path / "1.txt").write_text("picture 1\nmore")
    keys.append(opened(tmp_path).key())
    (tmp_path / "1.txt").write_text("picture 1")
    content = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(content + b"\0")
    keys.append(opened(tmp_path).key())
    (tmp_path / "1.png").write_bytes(content)
    assert opened(tmp_path).key() == first
    for kind in (".png", ".txt"):  # the same examples in another order
        (tmp_path / f"0{kind}").rename(tmp_path / f"9{kind}")
    keys.append(opened(tmp_path).key())
    (tmp_path / "9.txt").unlink()
    keys.append(opened(tmp_path).key())
    assert len(set(keys)) == len(keys)


def test_key_does_not_depend_on_the_place(tmp_path):
    for place in ("here", "there"):
        draw(tmp_path / place / "a cat.png")
    assert opened(tmp_path / "here").key() == opened(tmp_path / "there").key()


def test_order_is_natural(tmp_path):
    for number in (10, 9, 1, 100):
        draw(tmp_path / f"cat {number}.png")
    assert list(captions(opened(tmp_path))) == [f"cat {number}.png" for number in (1, 9, 10, 100)]


@given(st.lists(st.text("ab019./é", max_size=8), unique=True), st.randoms())
def test_natural_order_is_one_order(names, random):
    shuffled = list(names)
    random.shuffle(shuffled)
    assert sorted(names, key=natural) == sorted(shuffled, key=natural)


@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_natural_order_counts(first, second):
    assert (natural(f"p{first}.png") < natural(f"p{second}.png")) == (first < second)


def test_pictures_are_fitted(tmp_path):
    draw(tmp_path / "wide cat.png", size=(64, 20))
    for crop in ("center", "stretch"):
        assert opened(tmp_path, crop=crop, resolution=8).image(0).shape == (8, 8, 3)
