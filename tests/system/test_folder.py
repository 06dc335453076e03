"""A folder of the user's own pictures, from files to samples."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def pictures(tmp_path):
    """Six pictures of several sizes and kinds with metadata.jsonl, and one broken file."""
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    rows = []
    sizes = [(64, 64), (80, 100), (120, 70), (64, 64), (90, 90), (64, 65)]
    for number, (size, kind) in enumerate(zip(sizes, ["png", "jpg", "png", "webp", "bmp", "png"], strict=True)):
        name = f"{number:02d}.{kind}"
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)
        rows.append({"file_name": name, "text": f"a picture of the number {number}"})
    content = (folder / "00.png").read_bytes()
    (folder / "broken.png").write_bytes(content[: len(content) // 2])
    rows.append({"file_name": "broken.png", "text": "a broken picture"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_folder_to_samples(programs, mini, pictures, tmp_path):
    steps = [f"{stage}train.steps=2" for stage in ("", "autoencoder.", "text_encoder.")]
    batch = [f"{stage}train.global_batch=4" for stage in ("", "autoencoder.", "text_encoder.")]
    data = ["name=own", "data.source=folder", f"data.path={pictures}", "data.captions=null"]
    done = programs("train", "--config", mini(tmp_path), *data, *steps, *batch, cwd=tmp_path)
    assert done.code == 0, done.err
    named = [line for line in done.errors if "broken.png" in line]
    assert set(named) == {named[0]}, "one reason; said again where the folder is read again, to measure on"
    assert named[0].startswith("warning: ")
    assert any("6 pictures with 6 captions, 1 skipped" in line for line in done.errors), done.err
    run = tmp_path / "runs/own"
    assert {path.name for path in (run / "stages").iterdir()} == {"vae", "clip", "unet"}
    sampled = programs("sample", "a picture of the number 3", "--num", 1, "--steps", 2, cwd=tmp_path)
    assert sampled.code == 0, sampled.err
    assert Image.open(tmp_path / sampled.out.strip()).size == (64, 64)
