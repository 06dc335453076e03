"""Shards elsewhere: fetched whole though connections break, kept within bounds, the same pictures in the same order."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentgen.core.errors import UserError
from latentgen.data import remote
from latentgen.data.loader import Cut, Loader
from latentgen.data.reading import Reading
from latentgen.data.sources import shard_files
from latentgen.data.sources.folder import FolderStore
from latentgen.data.sources.shard_writer import write_shards
from latentgen.data.sources.shards import ShardStore
from latentgen.data.sources.stored import Pictures

DROP = 10
"""Of so many requests the server answers one with a part only, and another with nothing."""


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        number = self.server.requests
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        start, end = int(first), int(last) + 1 if last else len(content)
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if number % DROP == DROP // 2:
            self.close_connection = True
            return  # without a word
        body = content[start:end]
        self.send_response(206)
        self.send_header("ETag", hashlib.sha256(content).hexdigest())
        self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if number % DROP == 0 else body)
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    requests = 0

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Six shards of two or three pictures each."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(14):
        pixels = np.random.default_rng(number).integers(0, 256, (8 + 8 * (number % 2), 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"p{number}.png")
        (folder / f"p{number}.txt").write_text(f"picture {number}")
    written = write_shards([FolderStore(folder)], tmp_path / "out", size=8500, max_pixels=10_000)
    assert len(written.shards) > 3
    return tmp_path / "out"


@pytest.fixture
def server(out: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "PAUSE", 0.001)
    with Server(out) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def names(out: Path) -> str:
    return f"train-{{00000..{len(list(out.glob('*.tar'))) - 1:05d}}}.tar"


def pictures(where: str, local: Path, **more: Any) -> Pictures:
    return Pictures(ShardStore(where, local=local, window=2, **more), Reading(8), window=2)


def shown(source: Pictures, world: int = 1, workers: int = 0, start: int = 0) -> list[tuple[str, int]]:
    found = []
    for rank in range(world):
        order, cut = source.order(4), Cut(4, None, rank, world)
        for step, parts in Loader(_Sums(source), order, 0, "unet", cut, 9, workers).iterate(start):
            found += [(step, rank, name, total) for _, rows in parts for name, total in rows]  # type: ignore[misc]
    return [(name, total) for _, _, name, total in sorted(found, key=lambda row: row[:2])]


class _Sums:
    def __init__(self, source: Pictures) -> None:
        self.source = source

    def __call__(self, draw: Any) -> Any:
        return [(self.source.name(i), int(self.source.image(i).sum())) for i in draw.indices]


def test_a_server_that_drops_connections_gives_what_the_disk_gives(server: Server, out: Path, tmp_path: Path) -> None:
    near = pictures(f"{out}/{names(out)}", tmp_path / "near")
    far = pictures(f"{server.address}/{names(out)}", tmp_path / "far")
    assert far.key() == near.key()
    expected = shown(near)
    assert shown(far, world=2) == expected
    assert shown(far, workers=2) == expected
    assert shown(pictures(f"{server.address}/{names(out)}", tmp_path / "other"), start=5) == expected[5 * 4 :]
    assert server.requests > 2 * DROP, "connections were dropped"
    for shard in out.glob("*.tar"):
        (copy,) = (tmp_path / "far").glob(f"{shard.stem}-*/{shard_files.SHARD}")
        assert copy.read_bytes() == shard.read_bytes()


def test_without_an_index_beside_it_a_shard_is_fetched_and_indexed_once(
    server: Server, out: Path, tmp_path: Path
) -> None:
    near = pictures(f"{out}/{names(out)}", tmp_path / "near")
    for index in out.glob("*.index.jsonl"):
        index.unlink()
    far = pictures(f"{server.address}/{names(out)}", tmp_path / "far")
    assert far.key() == near.key()
    before = server.requests
    assert pictures(f"{server.address}/{names(out)}", tmp_path / "far").key() == near.key()
    assert server.requests - before <= 3 * len(list(out.glob("*.tar"))), "asked whether they changed, not fetched"


def test_a_cut_off_download_goes_on(server: Server, out: Path, tmp_path: Path) -> None:
    content = (out / "train-00000.tar").read_bytes()
    half = tmp_path / f"x{remote.PARTIAL}"
    half.write_bytes(content[:1000])
    remote.download(f"{server.address}/train-00000.tar", tmp_path / "x", size=len(content))
    assert (tmp_path / "x").read_bytes() == content
    assert not half.exists()


def test_what_changed_on_the_way_is_not_used(server: Server, out: Path, tmp_path: Path) -> None:
    far = pictures(f"{server.address}/train-00000.tar", tmp_path / "far")
    shard = bytearray((out / "train-00000.tar").read_bytes())
    shard[700] ^= 1
    (out / "train-00000.tar").write_bytes(shard)
    with pytest.raises(UserError, match="is not the shard that its index was made of"):
        far.image(0)


def test_the_local_folder_stays_within_its_bound(server: Server, out: Path, tmp_path: Path) -> None:
    sizes = [path.stat().st_size for path in out.glob("*.tar")]
    bound = 3 * max(sizes)
    far = pictures(f"{server.address}/{names(out)}", tmp_path / "far", local_gib=bound / 2**30)
    for step in range(9):
        for index in far.order(4).at(range(4 * step, 4 * step + 4), 0, "unet"):
            far.image(index)
            there = sum(path.stat().st_size for path in (tmp_path / "far").glob(f"*/{shard_files.SHARD}"))
            assert there <= bound


def test_the_next_window_is_fetched_while_this_one_is_read(server: Server, out: Path, tmp_path: Path) -> None:
    far = pictures(f"{server.address}/{names(out)}", tmp_path / "far")
    there = {path.parent for path in (tmp_path / "far").glob(f"*/{shard_files.SHARD}")}
    assert not there, "indexes lie beside the shards"
    (index, *_) = far.order(4).at(range(4), 0, "unet")
    files = far.store.files  # type: ignore[attr-defined]
    files._ahead.join()
    assert len(list((tmp_path / "far").glob(f"*/{shard_files.SHARD}"))) == 2
    far.order(4).at(range(4), 0, "unet")
    files._ahead.join()
    far.image(index)
    assert len(list((tmp_path / "far").glob(f"*/{shard_files.SHARD}"))) == 3, "one that is read, two ahead"


def test_what_cannot_be_fetched_ahead_is_told_when_it_is_read(server: Server, out: Path, tmp_path: Path) -> None:
    far = pictures(f"{server.address}/{names(out)}", tmp_path / "far")
    for shard in out.glob("*.tar"):
        shard.unlink()
    (index, *_) = far.order(4).at(range(4), 0, "unet")
    far.store.files._ahead.join()  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="not there"):
        far.image(index)


def test_object_stores_by_fsspec(out: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in out.iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    near = pictures(f"{out}/{names(out)}", tmp_path / "near")
    far = pictures("memory://bucket/train-*.tar", tmp_path / "far")
    assert far.key() == near.key()
    assert shown(far) == shown(near)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("/gone.tar", "gone.tar: not there; check data.path"),
        ("/train-*.tar", "a web server does not list its files"),
    ],
)
def test_mistakes(address: str, message: str, server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        pictures(server.address + address, tmp_path / "far")


def test_no_address_leads_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A redirect of a web server must not make this process read its own disk."""

    class Sneaky(_Handler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.send_header("Content-Length", "0")
            self.end_headers()

    monkeypatch.setattr(remote, "PAUSE", 0.001)
    with ThreadingHTTPServer(("127.0.0.1", 0), Sneaky) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        with pytest.raises(UserError):
            pictures(f"http://127.0.0.1:{running.server_address[1]}/a.tar", tmp_path / "far")
        running.shutdown()
    assert not any(path.is_file() and b"root:" in path.read_bytes() for path in tmp_path.rglob("*"))


def test_an_empty_archive_is_told(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w", fileobj=io.FileIO(tmp_path / "t.tar", "w")):
        pass
    with pytest.raises(UserError, match="no pictures with captions in 1 shards"):
        pictures(str(tmp_path / "t.tar"), tmp_path / "local")
