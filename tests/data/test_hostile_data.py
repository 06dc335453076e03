"""Archives, tables and recipes made to do harm: refused or harmless, and nothing is written, run or sent."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (10, 200, 30)).save(file, "PNG")
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of a few hundred bytes whose header promises 40,000 x 40,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


def member(name: str, content: bytes = b"", **more: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in more.items():
        setattr(info, key, value)
    return info, content


def archive(path: Path, *members: tuple[tarfile.TarInfo, bytes], good: bool = True) -> None:
    """A tar of these members, with a whole example after them."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        for info, content in (*members, *((member("good.png", png()), member("good.txt", b"fine")) if good else ())):
            file.addfile(info, io.BytesIO(content))


def tars(folder: Path) -> None:
    archive(folder / "climbs.tar", member("../../evil.png", png()), member("../../evil.txt", b"x"))
    archive(folder / "absolute.tar", member("/tmp/evil.png", png()), member("/tmp/evil.txt", b"x"))
    archive(folder / "windows.tar", member("C:\\evil.png", png()), member("C:\\evil.txt", b"x"))
    for kind, sort in (("symlink", tarfile.SYMTYPE), ("hardlink", tarfile.LNKTYPE)):
        archive(folder / f"{kind}.tar", member("a.png", type=sort, linkname="/etc/passwd"), member("a.txt", b"x"))
    archive(folder / "device.tar", member("a.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5), member("a.txt", b"x"))
    archive(folder / "pax.tar", member("a.png", png(), pax_headers={"comment": "x" * (1 << 20)}), member("a.txt", b"x"))
    archive(folder / "bomb.tar", member("a.png", bomb()), member("a.txt", b"x"))
    deep = b'{"caption":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    archive(folder / "deep.tar", member("a.png", png()), member("a.json", deep))
    archive(folder / "long.tar", member("a.png", png()), member("a.txt", b"x" * (1 << 21)))
    archive(
        folder / "pickle.tar",
        member("a.png", png()),
        member("a.txt", b"x"),
        member("a.pkl", b"cos\nsystem\n(S'id'\ntR."),
    )
    archive(folder / "liar.tar", good=True)
    content = bytearray((folder / "liar.tar").read_bytes())
    content[124:136] = b"77777777777\0"  # the first member claims 8 GiB
    info = bytes(content[:148]) + b" " * 8 + bytes(content[156:512])
    content[148:156] = f"{sum(info):06o}\0 ".encode()
    (folder / "liar.tar").write_bytes(content)


def tables(folder: Path) -> None:
    (folder / "good.png").write_bytes(png())
    (folder / "link.png").symlink_to("/etc/passwd")
    files = ["good.png", "../outside.png", "/etc/passwd", "link.png", "..\\outside.png", "good.png/../../outside.png"]
    (folder / "t.csv").write_text("file_name,text\n" + "".join(f"{file},x\n" for file in files))
    (folder / "t.jsonl").write_text("".join(json.dumps({"file_name": file, "text": "x"}) + "\n" for file in files))
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"file_name": files, "text": ["x"] * len(files)}), folder / "t.parquet")
    inner = folder / "pictures"
    inner.mkdir()
    (inner / "good.png").write_bytes(png())
    (inner / "zip.png").write_bytes(b"PK\x03\x04" + os.urandom(100))
    (inner / "bomb.png").write_bytes(bomb())
    (inner / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f, "text": "x"}) + "\n" for f in (*files[:3], "zip.png", "bomb.png"))
    )


def recipes(folder: Path) -> None:
    (folder / "tag.yaml").write_text("name: !!python/object/apply:os.system ['touch evil']\n")
    (folder / "new.yaml").write_text("data: !!python/object/new:subprocess.Popen [['touch', 'evil']]\n")
    (folder / "name.yaml").write_text("name: ../../evil\n")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("hostile")
    (place / "in").mkdir()
    (place / "out").mkdir()
    for write in (tars, tables, recipes):
        write(place / "in")
    (place / "outside.png").write_bytes(png())
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*") if "out" not in path.parts[-2:]}
    command = [
        sys.executable,
        str(Path(__file__).with_name("hostile_script.py")),
        str(place / "in"),
        str(place / "out"),
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=place / "out", env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path.is_file())
    assert not list(place.rglob("*evil*"))
    return json.loads(done.stdout)


def test_nothing_is_written_run_or_sent(outcome: dict[str, Any]) -> None:
    assert outcome["deeds"] == []
    assert outcome["proof"] == ["writes", "socket.connect"], "such deeds would be seen"


CASES: dict[str, Callable[[dict[str, str]], bool]] = {
    "climbs.tar": lambda why: any("evil" in name for name in why),
    "absolute.tar": lambda why: any("evil" in name for name in why),
    "windows.tar": lambda why: any("evil" in name for name in why),
    "symlink.tar": lambda why: "link" in why["symlink.tar/a.png"],
    "hardlink.tar": lambda why: "link" in why["hardlink.tar/a.png"],
    "device.tar": lambda why: "device" in why["device.tar/a.png"],
    "bomb.tar": lambda why: "too large" in why["bomb.tar/a.png"],
    "deep.tar": lambda why: "no caption" in why["deep.tar/a.png"],
    "long.tar": lambda why: "no caption" in why["long.tar/a.png"],
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_bad_in_an_archive_is_refused_with_a_reason_and_the_rest_is_read(
    name: str, outcome: dict[str, Any]
) -> None:
    found = json.loads(outcome["results"][name])
    assert found["names"] == [f"{name}/good.png"]
    assert CASES[name](dict(found["skipped"])), found["skipped"]


def test_lies_about_sizes_and_other_files_do_no_harm(outcome: dict[str, Any]) -> None:
    assert "liar.tar" in outcome["results"]["liar.tar"]
    assert json.loads(outcome["results"]["pickle.tar"])["names"] == ["pickle.tar/a.png", "pickle.tar/good.png"]
    assert "pax.tar/good.png" in json.loads(outcome["results"]["pax.tar"])["names"]


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_tables_lead_nowhere_else(name: str, outcome: dict[str, Any]) -> None:
    found = json.loads(outcome["results"][name])
    assert found["names"] == ["good.png"]
    assert len(found["skipped"]) == 5
    assert all("leads outside" in reason for _, reason in found["skipped"])


def test_a_folder_with_hostile_files_gives_its_good_one(outcome: dict[str, Any]) -> None:
    found = json.loads(outcome["results"]["pictures"])
    assert found["names"] == ["good.png"]
    assert {"zip.png", "bomb.png"} <= {name for name, _ in found["skipped"]}


@pytest.mark.parametrize("name", ["tag.yaml", "new.yaml", "name.yaml"])
def test_recipes_run_nothing(name: str, outcome: dict[str, Any]) -> None:
    assert outcome["results"][name].startswith("error: ")
