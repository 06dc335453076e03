"""`latentgen data doctor`: exit codes, the two files, and mistakes in one line."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image


def test_it_ends_with_1_where_there_are_errors(programs, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"thing number {number}")
    done = programs("data", "doctor", folder, "--out", "found", cwd=tmp_path)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "found/doctor.json").read_text())["counts"] == {"error": 0, "warning": 0, "note": 0}
    (folder / "3.png").write_bytes(b"no picture")
    (folder / "3.txt").write_text("broken")
    done = programs("data", "doctor", folder, "--fix", folder / "clean.jsonl", cwd=tmp_path)
    assert done.code == 1, done.err
    assert "error: unreadable, 1" in done.out
    assert "3.png" in (tmp_path / "doctor/doctor.html").read_text()
    assert len((folder / "clean.jsonl").read_text().splitlines()) == 3
    for words, told in (
        ((tmp_path / "nowhere",), "nowhere"),
        ((folder, "--fix", "clean.csv"), "name a file that ends with .jsonl"),
        ((folder, "--clip", tmp_path), "has no clip/"),
    ):
        done = programs("data", "doctor", *words, cwd=tmp_path)
        assert done.code == 2, done.err
        assert told in done.errors[-1]
        assert "Traceback" not in done.err
