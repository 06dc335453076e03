"""Tensors to pictures, grids, and what is written into a PNG."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentgen.data.fetch import to_tensor
from latentgen.pipelines.pictures import LINE, cells, grid, save_png, to_pictures

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9), (200, 100, 50)]


def plain(number: int, size: tuple[int, int] = (8, 6)) -> Image.Image:
    return Image.new("RGB", size, COLOURS[number])


def test_to_pictures_inverts_to_tensor() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    levels[..., 1] = 255 - levels[..., 1]
    (picture,) = to_pictures(to_tensor([levels]))
    assert np.array_equal(np.asarray(picture), levels)


def test_to_pictures_clips_and_rounds() -> None:
    values = torch.tensor([-3.0, -1.0, 0.0, 0.999, 7.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    (picture,) = to_pictures(values)
    assert np.asarray(picture)[0, :, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize(("captions", "scale"), [((), 1), ((), 3), (("one", "two"), 1)])
def test_grid_geometry(captions: tuple[str, ...], scale: int) -> None:
    sheet = grid([plain(n) for n in range(5)], 3, captions, scale=scale, gap=2)
    width, height, head = 8 * scale, 6 * scale, (LINE + 2 if captions else 0)
    assert sheet.size == (3 * (width + 2) + 2, 2 * (height + 2 + head) + 2)
    for number in range(5):
        row, column = divmod(number, 3)
        left, top = 2 + column * (width + 2), 2 + row * (height + 2 + head) + head
        part = np.asarray(sheet.crop((left, top, left + width, top + height)))
        assert (part == COLOURS[number]).all(), f"picture {number}"
        assert sheet.getpixel((left - 1, top)) == (255, 255, 255)
        assert sheet.getpixel((left + width, top)) == (255, 255, 255)
    last = np.asarray(sheet)[-height - 2 :, 2 + 2 * (width + 2) :]
    assert (last == 255).all(), "the empty place stays white"


def test_captions_stand_above_their_row() -> None:
    sheet = np.asarray(grid([plain(3)] * 2, 1, ("WWW", "MMM")).convert("L"))
    for row in range(2):
        top = 4 + row * (6 + 4 + LINE + 4)
        assert sheet[top : top + LINE].min() < 100
    blank = np.asarray(grid([plain(3)] * 2, 1, ("", "")).convert("L"))
    assert blank[4 : 4 + LINE].min() == 255


def test_png_text_chunks_round_trip(tmp_path: Path) -> None:
    recipe = {"prompt": "a naïve 星", "steps": 20, "nested": {"a": [1, None]}}
    parameters = "a naïve 星\nSteps: 20, Sampler: euler"
    save_png(plain(0), tmp_path / "deep" / "x.png", parameters=parameters, recipe=recipe)
    with Image.open(tmp_path / "deep" / "x.png") as picture:
        picture.load()
        text = picture.text  # type: ignore[attr-defined]
        assert text["parameters"] == parameters
        assert json.loads(text["latentgen"]) == recipe
        assert picture.getpixel((0, 0)) == COLOURS[0]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.png"]


def test_png_without_texts(tmp_path: Path) -> None:
    save_png(plain(0), tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        picture.load()
        assert picture.text == {}  # type: ignore[attr-defined]


@pytest.mark.parametrize("captions", [(), ("one", "two", "three")])
def test_the_pictures_of_a_grid_come_back(captions: tuple[str, ...]) -> None:
    pictures = [Image.effect_noise((10, 6), 80).convert("RGB") for _ in range(6)]
    rows = cells(grid(pictures, 2, captions, scale=3), 3, 2, captions=bool(captions))
    back = [picture for row in rows for picture in row]
    assert [picture.size for picture in back] == [(30, 18)] * 6
    for picture, before in zip(back, pictures, strict=True):
        assert picture.resize((10, 6), Image.Resampling.NEAREST).tobytes() == before.tobytes()
