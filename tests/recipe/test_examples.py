"""What is trained on and what is held out, of a folder of pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentgen.data.sources.base import Source
from latentgen.recipe import sources
from latentgen.recipe.schema import Recipe
from latentgen.recipe.sizes import sizes_of, tell
from latentgen.recipe.validation import validation, wanted


def picture(number: int) -> np.ndarray:
    return np.kron(np.random.default_rng(number).integers(0, 256, (2, 2, 3), dtype=np.uint8), np.ones((8, 8, 1), "u1"))


def write(folder: Path, numbers: range) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in numbers:
        Image.fromarray(picture(number)).save(folder / f"{number:03d}.png")
        rows.append(json.dumps({"file_name": f"{number:03d}.png", "text": f"picture {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def of_folder(recipe: Recipe, path: Path, **more: object) -> Recipe:
    values = recipe.model_dump()
    values["data"] |= {"source": "folder", "path": str(path), "resolution": 16, "holdout": 10, **more}
    return Recipe(**values)


def names(source: Source) -> set[str]:
    return {source.captions(i)[0] for i in range(len(source))}


def test_a_part_of_the_folder_is_held_out_and_not_trained_on(tiny_recipe: Recipe, tmp_path: Path) -> None:
    found = sources.examples(of_folder(tiny_recipe, write(tmp_path, range(120))))
    assert found.apart
    assert (len(found.training), len(found.held_out)) == (110, 10)
    assert names(found.training) | names(found.held_out) == {f"picture {n}" for n in range(120)}
    pictures = {found.training.image(i).tobytes() for i in range(110)}
    assert not any(found.held_out.image(i).tobytes() in pictures for i in range(10))
    assert found.training.key() != found.held_out.key()


def test_the_seed_does_not_move_the_border(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = of_folder(tiny_recipe, write(tmp_path, range(120)))
    other = recipe.model_copy(update={"seed": 7})
    assert sources.examples(recipe).training.key() == sources.examples(other).training.key()


def test_few_pictures_are_all_trained_on(tiny_recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = of_folder(tiny_recipe, write(tmp_path, range(30)))
    found = sources.examples(recipe)
    assert not found.apart
    assert len(found.training) == 30
    assert len(found.held_out) == 10, "pictures to measure on all the same"
    assert "nothing is held out" in caplog.text
    assert not wanted(recipe, found, "unet"), "a held-out loss of training pictures would lie"


def test_a_folder_of_others_is_taken_and_the_rest_left_whole(tiny_recipe: Recipe, tmp_path: Path) -> None:
    path, others = write(tmp_path / "a", range(90)), write(tmp_path / "b", range(100, 140))
    given = sources.examples(of_folder(tiny_recipe, path, validation=str(others)))
    assert given.apart
    assert (len(given.training), len(given.held_out)) == (90, 10)
    assert names(given.held_out) <= {f"picture {n}" for n in range(100, 140)}
    same = sources.examples(of_folder(tiny_recipe, path, validation=str(path)))
    assert not same.apart, "who names the same folder trains on all of it"
    assert len(same.training) == 90
    write(path / "validation", range(200, 205))
    beside = sources.examples(of_folder(tiny_recipe, path, split=None))
    assert names(beside.held_out) == {f"picture {n}" for n in range(200, 205)}


def test_what_is_measured_is_fixed_and_as_much_of_either(tiny_recipe: Recipe) -> None:
    found = sources.examples(tiny_recipe)
    assert wanted(tiny_recipe, found, "unet")

    def made(recipe: Recipe, stage: str) -> tuple[tuple[int, ...], ...]:
        measured = validation(recipe, found, stage, lambda *_: {}, held_out=lambda draw: draw, seen=lambda draw: draw)
        return measured.sets["held_out"].indices, measured.sets["seen"].indices

    held_out, seen = made(tiny_recipe, "unet")
    assert held_out == (0, 1, 2, 3)
    assert len(set(seen)) == 4
    assert set(seen) <= set(range(32))
    assert made(tiny_recipe, "unet") == (held_out, seen)
    assert made(tiny_recipe.model_copy(update={"seed": 1}), "unet")[1] != seen


def test_validation_can_be_left_out_of_a_stage(tiny_recipe: Recipe) -> None:
    values = tiny_recipe.model_dump()
    values["text_encoder"]["train"]["validate_every"] = 0
    recipe = Recipe(**values)
    found = sources.examples(recipe)
    assert [wanted(recipe, found, stage) for stage in ("vae", "clip", "unet")] == [True, False, True]


def test_what_is_measured_stands_together_by_shape(tiny_recipe: Recipe, few: Callable[..., Source]) -> None:
    shapes = ((16, 16), (8, 24), (24, 8))
    found = sources.Examples(few(40, shapes=shapes), few(10, 1, shapes=shapes[:2]))
    made = validation(tiny_recipe, found, "unet", lambda *_: {}, held_out=lambda draw: draw, seen=lambda draw: draw)
    for name, source in (("held_out", found.held_out), ("seen", found.training)):
        examples = made.sets[name]
        assert examples.kinds == tuple(source.shape(i) for i in examples.indices)
        assert list(examples.kinds) == sorted(examples.kinds)
        assert len(set(examples.indices)) == 10
        assert all(examples.kinds[at] != examples.kinds[at - 1] for at in examples.borders())
    assert set(made.borders) == made.sets["held_out"].borders() | made.sets["seen"].borders()
    assert made.sets["held_out"].indices == (1, 3, 5, 7, 9, 0, 2, 4, 6, 8), "in their order otherwise"


def test_the_sizes_of_pictures(tiny_recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tmp_path.joinpath("pictures").mkdir()
    for number, (width, height) in enumerate([(40, 20), (20, 40), (20, 40), (8, 8)]):
        Image.new("RGB", (width, height)).save(tmp_path / "pictures" / f"{number}.png")
        (tmp_path / "pictures" / f"{number}.txt").write_text("a picture")
    more = {"buckets": 2, "bucket_step": 8, "max_upscale": 1.5}
    data = of_folder(tiny_recipe, tmp_path / "pictures", **more).data
    sizes = sizes_of(sources.pictures_of(data), data)
    assert sizes.shapes() == {(16, 8): 2, (16, 16): 1, (8, 16): 1} or len(sizes.shapes()) == 2
    assert sizes.enlarged(1.5) == (1, "3.png", 2.0)
    assert sizes.document()["pictures"][0][:3] == [40, 20, 2], "the most frequent first"
    assert sum(row[2] for row in sizes.document()["shapes"]) == 4
    squares = of_folder(tiny_recipe, tmp_path / "pictures").data
    assert sizes_of(sources.pictures_of(squares), squares).cut_off() == pytest.approx(3 / 8)
    assert sizes.cut_off((16, 16)) == pytest.approx(3 / 8)
    stretched = squares.model_copy(update={"crop": "stretch"})
    assert sizes_of(sources.pictures_of(stretched), stretched).cut_off() == 0
    with caplog.at_level("INFO"):
        tell(sizes, data)
    assert "1 of 4 pictures are enlarged by more than data.max_upscale, 1.5" in caplog.text
    assert "squares would cut off 37.5%" in caplog.text
    shapes = sources.examples(tiny_recipe).training
    assert sizes_of(shapes, tiny_recipe.data).plain()
