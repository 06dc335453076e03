"""What a preview of the data shows is what training is given."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentgen.cli.sample import SHIPPED
from latentgen.core.rand import Draw
from latentgen.data.fetch import PictureBatches
from latentgen.recipe.load import load_recipe
from latentgen.recipe.looking import MASKED, cards, sheet
from latentgen.recipe.schema import Recipe
from latentgen.recipe.sources import examples


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = []
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (16 + 8 * (number % 2), 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"p{number}.png")
        rows.append({"file_name": f"p{number}.png", "text": f"one, two, three, number {number}"})
        mask = np.zeros((16 + 8 * (number % 2), 16), dtype=np.uint8)
        Image.fromarray(mask).save(tmp_path / f"p{number}.mask.png")
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def recipe_of(folder: Path, *more: str) -> Recipe:
    data = f"data={{source: folder, path: '{folder}', resolution: 16, holdout: 1, flip: true}}"
    return load_recipe(None, [data, "train.global_batch=4", *more])


def test_pictures_and_captions_are_those_of_the_first_steps(folder: Path) -> None:
    recipe = recipe_of(folder, "data.tags={shuffle: true, dropout: 0.3}", "diffusion.caption_dropout=0.3")
    source, shown = examples(recipe).training, cards(recipe, 3, 3)
    assert [len(row) for row in shown] == [3, 3, 3]
    order, empty = source.order(4), 0
    for step, row in enumerate(shown):
        indices = order.at(range(4 * step, 4 * step + 4), 0, "unet")
        batch = PictureBatches(source, flip=True)(Draw(0, "unet", step, 4, range(4), indices))
        for number, card in enumerate(row):
            assert (np.asarray(card.picture) == batch["image"][number].permute(1, 2, 0).numpy()).all()
            assert card.name == source.name(indices[number])
            words = source.captions(indices[number])[0].split(", ")
            assert set(card.caption.split(", ")) <= {*words, ""}
            empty += card.caption == ""
    assert 0 < empty < 9
    assert cards(recipe, 3, 3)[2][0].caption == shown[2][0].caption
    assert sheet(shown).width > 3 * 160


def test_what_does_not_count_is_faded_and_what_is_cut_is_told(folder: Path) -> None:
    recipe = recipe_of(
        folder,
        "data.mask=beside",
        f"text_encoder.from={SHIPPED}",
        "data.suffix=' and so on, with many other words that nobody reads'",
        "data.flip=false",
    )
    ((card, *_),) = cards(recipe, 1, 2)
    number = int(card.name.removeprefix("p").removesuffix(".png"))
    picture = np.asarray(Image.open(folder / card.name)).astype(int)
    faded = (0.4 * picture + 0.6 * np.array(MASKED)).astype(int)
    top = 4 if number % 2 else 0
    assert np.abs(np.asarray(card.picture).astype(int) - faded[top : top + 16]).max() <= 1
    assert card.cut
    red = np.asarray(sheet([[card]]))
    assert ((red[..., 0] > 150) & (red[..., 1] < 90) & (red[..., 2] < 90)).any()
