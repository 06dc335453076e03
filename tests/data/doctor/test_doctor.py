"""Every kind of trouble is planted and found; a clean set gives silence; nothing of the set is touched."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from latentgen.cli.sample import SHIPPED
from latentgen.core.errors import UserError
from latentgen.data.doctor.checks import CHECKS, Patient
from latentgen.data.doctor.page import as_json, as_page, examine
from latentgen.data.sources.shapes import ShapesSource
from latentgen.recipe.doctoring import Case, case_of, write_clean
from latentgen.recipe.load import load_recipe

COUNT = 14


def picture(number: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Another one for each number, nothing alike."""
    pixels = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


class Planted:
    """A folder of good pictures with metadata, into which trouble is planted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows = folder, []
        self.more: dict[str, object] = {}
        folder.mkdir()
        for number in range(COUNT):
            self.add(f"p{number}.png", picture(number), f"a small blue thing, number {number}")

    def add(self, name: str, image: Image.Image | bytes, text: str | None, **columns: str) -> None:
        path = self.folder / name
        if isinstance(image, bytes):
            path.write_bytes(image)
        else:
            image.save(path)
        if text is not None:
            self.rows.append({"file_name": name, "text": text, **columns})

    def write(self) -> None:
        if self.rows:
            lines = [json.dumps(row) + "\n" for row in self.rows]
            (self.folder / "metadata.jsonl").write_text("".join(lines))

    def without_metadata(self) -> None:
        """Captions beside the pictures instead."""
        for row in self.rows:
            (self.folder / row["file_name"]).with_suffix(".txt").write_text(row["text"])
        self.rows = []

    def case(self, **more: object) -> Case:
        self.write()
        overrides = [f"data={{source: folder, path: '{self.folder}', resolution: 64}}", *self.more.pop("recipe", [])]  # type: ignore[misc]
        return case_of(load_recipe(None, overrides), *(more.get(key) for key in ("against", "clip")))  # type: ignore[arg-type]


def jpeg(image: Image.Image, **more: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, **more)
    return file.getvalue()


def rotated(p: Planted) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    p.add("turned.jpg", jpeg(picture(50), exif=exif.tobytes()), "turned")


def outside(p: Planted) -> None:
    picture(51).save(p.folder.parent / "out.png")
    p.rows.append({"file_name": "../out.png", "text": "outside"})


def leaked(p: Planted) -> None:
    other = p.folder.parent / "validation"
    other.mkdir()
    (other / "v.png").write_bytes((p.folder / "p3.png").read_bytes())
    (other / "v.txt").write_text("the same")
    p.more["against"] = str(other)


def nearly_leaked(p: Planted) -> None:
    other = p.folder.parent / "validation"
    other.mkdir()
    (other / "v.jpg").write_bytes(jpeg(picture(3, (96, 96))))
    (other / "v.txt").write_text("nearly the same")
    p.more["against"] = str(other)


def no_caption(p: Planted) -> None:
    p.add("extra.png", picture(52), None)


def empty_caption(p: Planted) -> None:
    p.without_metadata()
    (p.folder / "p1.txt").write_text(" \n")


def duplicate(p: Planted) -> None:
    p.add("again.png", (p.folder / "p2.png").read_bytes(), "again")


def colour_space(p: Planted) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    p.add("profile.jpg", jpeg(picture(53), icc_profile=profile), "with a profile")


def transparent(p: Planted) -> None:
    image = picture(54).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((64, 64)))
    p.add("glass.png", image, "see through")


def animated(p: Planted) -> None:
    file = io.BytesIO()
    picture(55).save(file, "WEBP", save_all=True, append_images=[picture(56)], lossless=True)
    p.add("moves.webp", file.getvalue(), "moving")


def common_caption(p: Planted) -> None:
    for row in p.rows[:5]:
        row["text"] = "a thing"


def names_only(p: Planted) -> None:
    p.without_metadata()
    picture(57).save(p.folder / "green_bottle.png")


def long_caption(p: Planted) -> None:
    p.rows[2]["text"] = "a red circle above a blue square and " * 8
    p.more["recipe"] = [f"text_encoder.from={SHIPPED}"]


def unknown_word(p: Planted) -> None:
    p.rows[2]["text"] = "a red xylqzk"
    p.more["recipe"] = [f"text_encoder.from={SHIPPED}"]


def stray_text(p: Planted) -> None:
    (p.folder / "lost.txt").write_text("where is my picture")


def licence(p: Planted) -> None:
    for row in p.rows[:-1]:
        row["license"] = "CC0"


def mismatched(p: Planted) -> None:
    """Thirty pictures of the shapes world with their captions, but for one."""
    p.rows = []
    for path in p.folder.iterdir():
        path.unlink()
    source = ShapesSource(seed=5, size=400)
    chosen = [i for i in range(400) if len(source.scene(i).items) == 1][:30]
    for number in chosen:
        p.add(f"s{number}.png", Image.fromarray(source.image(number)), source.captions(number)[0])
    first = source.scene(chosen[0]).items[0]
    p.rows[0]["text"] = "three green hearts" if first.shape != "heart" else "three black crosses"
    p.more["clip"] = SHIPPED


PLANTERS: dict[str, Callable[[Planted], None]] = {
    "unreadable": lambda p: p.add("broken.png", b"no picture", "broken"),
    "missing": lambda p: p.rows.append({"file_name": "gone.png", "text": "gone"}),
    "outside": outside,
    "leaked": leaked,
    "nearly_leaked": nearly_leaked,
    "no_caption": no_caption,
    "empty_caption": empty_caption,
    "duplicate": duplicate,
    "near_duplicate": lambda p: p.add("near.jpg", jpeg(picture(4, (80, 80))), "nearly"),
    "tiny": lambda p: p.add("tiny.png", picture(58, (20, 64)), "tiny"),
    "extreme_aspect": lambda p: p.add("long.png", picture(59, (400, 64)), "long"),
    "upscaled": lambda p: p.add("little.png", picture(60, (40, 40)), "little"),
    "blank": lambda p: p.add("blank.png", Image.new("RGB", (64, 64), (10, 90, 40)), "blank"),
    "long_caption": long_caption,
    "mismatched": mismatched,
    "stray_text": stray_text,
    "rotated": rotated,
    "colour_space": colour_space,
    "transparent": transparent,
    "grey": lambda p: p.add("grey.png", picture(61).convert("L"), "grey"),
    "animated": animated,
    "wrong_ending": lambda p: p.add("really.png", jpeg(picture(62)), "really a jpeg"),
    "common_caption": common_caption,
    "names_only": names_only,
    "unknown_word": unknown_word,
    "licence": licence,
}


def test_every_kind_has_a_planter() -> None:
    assert set(PLANTERS) == set(CHECKS)


def test_a_clean_set_gives_silence(tmp_path: Path) -> None:
    planted = Planted(tmp_path / "set")
    assert examine(planted.case().patient) == []
    assert "Nothing was found" in as_page("set", COUNT, [])


@pytest.mark.parametrize("kind", PLANTERS)
def test_what_is_planted_is_found(kind: str, tmp_path: Path) -> None:
    planted = Planted(tmp_path / "set")
    PLANTERS[kind](planted)
    more = {key: planted.more[key] for key in ("against", "clip") if key in planted.more}
    found = examine(planted.case(**more).patient)
    kinds = {finding.kind for finding in found}
    assert kind in kinds
    # A tiny picture is enlarged as well, and of one thing there may be more to say.
    assert kinds - {kind} <= {
        "upscaled",
        "extreme_aspect",
        "mismatched",
        "common_caption",
        "unknown_word",
        "near_duplicate",
    }
    (finding,) = (finding for finding in found if finding.kind == kind)
    assert 1 <= len(finding.troubles) <= 3
    assert all(trouble.names and trouble.why for trouble in finding.troubles)
    told = as_json("set", COUNT, found)
    assert json.loads(json.dumps(told)) == told
    assert sum(told["counts"].values()) == sum(len(each.troubles) for each in found)


def state(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        str(path): (sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_clean_table_is_written_and_nothing_else(tmp_path: Path) -> None:
    planted = Planted(tmp_path / "set")
    for kind in ("unreadable", "duplicate", "blank", "leaked", "missing"):
        PLANTERS[kind](planted)
    case = planted.case(against=planted.more["against"])
    before, findings = state(tmp_path), examine(case.patient)
    target = planted.folder / "clean.jsonl"
    count = write_clean(case, findings, target)
    after = state(tmp_path)
    assert {path for path in after if path not in before} == {str(target)}
    assert {path: after[path] for path in before} == before
    assert count == COUNT - 1  # p3 is in validation; of p2 one stays
    clean = load_recipe(None, [f"data={{source: table, path: '{target}', resolution: 64}}"])
    left = examine(case_of(clean, str(target), None).patient)
    assert {f.kind for f in left} == {"leaked"}, "it is itself"
    assert examine(case_of(clean, None, None).patient) == []
    with pytest.raises(UserError, match="is there already"):
        write_clean(case, findings, target)
    with pytest.raises(UserError, match="a table names files below its own folder"):
        write_clean(case, findings, tmp_path / "elsewhere" / "clean.jsonl")


def test_names_and_captions_cannot_write_the_page(tmp_path: Path) -> None:
    planted = Planted(tmp_path / "set")
    evil = '"><script>alert(1)</script>'
    for row in planted.rows[:6]:
        row["text"] = evil
    planted.rows.append({"file_name": "<img src=x onerror=alert(2)>.png", "text": "x"})
    found = examine(planted.case().patient)
    page = as_page(evil, COUNT, found)
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page.replace("http-equiv", "")


def test_pictures_are_compared_with_few_others(tmp_path: Path) -> None:
    patient = Planted(tmp_path / "set").case().patient
    turned = [replace(p, name=f"copy {p.name}", digest=f"{p.digest}x") for p in patient.looked]
    both = examine(Patient([*patient.looked, *turned]))
    (finding,) = both
    assert finding.kind == "near_duplicate"
    assert len(finding.troubles) == COUNT
