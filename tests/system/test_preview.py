"""`latentgen data preview` from a folder and from a recipe."""

from __future__ import annotations

from PIL import Image


def test_a_sheet_of_a_recipe_and_of_a_folder(programs, mini, tmp_path):
    done = programs("data", "preview", mini(tmp_path), "--steps", 2, "--num", 3, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "preview.png: 6 examples of 2 steps" in done.out
    assert Image.open(tmp_path / "preview.png").width > 400
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(3):
        Image.new("RGB", (70, 64), (60 * number, 90, 120)).save(pictures / f"red_thing_{number}.png")
    done = programs("data", "preview", pictures, "train.global_batch=4", "--out", "own.png", cwd=tmp_path)
    assert done.code == 0, done.err
    assert (tmp_path / "own.png").is_file()
    lost = programs("data", "preview", tmp_path / "nowhere", cwd=tmp_path)
    assert lost.code == 2
    assert "Traceback" not in lost.err
