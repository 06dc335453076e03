"""A hundred files that break loaders: each gives a picture or a reason, in silence and in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from latentgen.data.sources.folder import FolderSource

ROOT = Path(__file__).parents[2]
NASTY = ROOT.parent / "shared" / "data" / "nasty"

pytestmark = pytest.mark.skipif(not NASTY.is_dir(), reason="needs ../shared/data/nasty")

# The index calls these readable, but their data is damaged: what a lenient reader shows is not the whole picture.
DAMAGED = (
    "069_trun_broken_data_stream.png",
    "088_trun_crash-0da013a13571cc8eb457a39fee8db18f8a3c7127.tif",
    "191_synt_flipped_byte.png",
)
NEWER_PILLOW = ("170_trun_ycbcr_lzw_broken.tif",)  # Pillow 13 reads it, 12 refuses it

SCRIPT = r"""
import json, re, sys
from pathlib import Path
from latentgen.data.images import BadPicture, decode

def peak():  # KiB; getrusage would count the parent's memory too
    status = Path("/proc/self/status")
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) if status.exists() else None

first = peak()
found = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        image = decode(path)
        found[path.name] = [image.mode, *image.size]
    except BadPicture as error:
        found[path.name] = str(error)
print(json.dumps({"found": found, "peak": [first, peak()]}))
"""


@pytest.fixture(scope="module")
def outcome():
    command = [sys.executable, "-W", "always", "-c", SCRIPT, str(NASTY / "files")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b"", "something wrote to the terminal"
    assert done.stdout.count(b"\n") == 1, "something wrote to standard output"
    return json.loads(done.stdout)


def test_every_file_gives_a_picture_or_a_reason(outcome):
    found = outcome["found"]
    assert set(found) == {path.name for path in (NASTY / "files").iterdir()}
    for name, result in found.items():
        if isinstance(result, str):
            assert len(result) > 10, name
            assert "\n" not in result, name
        else:
            assert result[0] == "RGB", name
            assert min(result[1:]) >= 1, name


def test_whole_pictures_are_not_refused(outcome):
    rows = [json.loads(line) for line in (NASTY / "index.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        name = row["file_name"].removeprefix("files/")
        result = outcome["found"][name]
        if name in DAMAGED or (name in NEWER_PILLOW and isinstance(result, str)):
            assert "damaged" in result
        elif row["rgb_ok"]:
            assert result[0] == "RGB", (name, result)
            assert sorted(result[1:]) == sorted(row["rgb_size"]), name  # upright, so perhaps turned
        else:
            assert isinstance(result, str), name


def test_memory(outcome):
    first, last = outcome["peak"]
    if first is None:
        pytest.skip("the peak is read from /proc")
    assert last - first < 300 * 1024


def test_as_a_folder(caplog):
    source = FolderSource(path=NASTY / "files", resolution=32)
    assert len(source) > 50
    assert {name for name, _ in source.skipped}.isdisjoint(source.name(index) for index in range(len(source)))
    assert all(source.image(index).shape == (32, 32, 3) for index in range(len(source)))
    assert "180_synt_empty.jpg" in dict(source.skipped)
    assert f"skipped {len(source.skipped)} files in all" in caplog.text
