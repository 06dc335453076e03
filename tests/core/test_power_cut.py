"""What a power cut leaves: only what was flushed. The disk here forgets everything else, after every operation."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from latentgen.core import files
from latentgen.engine import checkpoint as checkpoints
from latentgen.engine.checkpoint import Checkpoint, Keep, load_newest, save_checkpoint, tidy


class Disk:
    """Follows the operations below `root` and keeps, beside the present tree, what is safe of it.

    A file's content is safe as of its last fsync; a name in a folder as of the folder's last fsync; what is removed is
    not safe from the moment on. Files and folders
    are known by their inode numbers, which a rename does not change.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.contents, self.names = root, dict[int, bytes](), dict[int, dict[str, int]]()
        self.names[root.stat().st_ino] = {}
        self.cuts: list[dict[str, bytes]] = []

    def synced(self, handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        inode = path.stat().st_ino
        if path.is_dir():
            self.names[inode] = {entry.name: entry.stat().st_ino for entry in path.iterdir()}
        else:
            self.contents[inode] = path.read_bytes()

    def removed(self, *_: object) -> None:
        """What is removed may be gone at once: a disk may flush that, and nothing else, by itself."""
        alive = {self.root.stat().st_ino, *(path.stat().st_ino for path in self.root.rglob("*"))}
        self.contents = {inode: content for inode, content in self.contents.items() if inode in alive}
        self.names = {
            inode: {name: child for name, child in names.items() if child in alive}
            for inode, names in self.names.items()
            if inode in alive
        }

    def cut(self) -> None:
        """Note the files that a power cut at this moment would leave; what was never flushed has lost its content."""
        found: dict[str, bytes] = {}

        def visit(inode: int, prefix: str) -> None:
            for name, child in self.names[inode].items():
                if child in self.names:
                    visit(child, f"{prefix}{name}/")
                else:
                    found[prefix + name] = self.contents.get(child, b"")

        visit(self.root.stat().st_ino, "")
        self.cuts.append(found)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        def watched(plain: Callable[..., Any], then: Callable[..., object] = lambda *a: None) -> Callable[..., Any]:
            def operation(*arguments: Any, **named: Any) -> Any:
                result = plain(*arguments, **named)
                then(*arguments)
                self.cut()
                return result

            return operation

        for name in ("write", "mkdir", "rename", "replace"):
            patch.setattr(os, name, watched(getattr(os, name)))
        for name in ("unlink", "rmdir"):
            patch.setattr(os, name, watched(getattr(os, name), self.removed))
        patch.setattr(os, "fsync", watched(os.fsync, self.synced))


def made(step: int) -> Checkpoint:
    return Checkpoint(step, {"weights-x": {"a": torch.full((3,), float(step))}}, {"note": step})


def after_cuts(root: Path, keep: Keep, patch: pytest.MonkeyPatch) -> list[int | None]:
    """Step of the newest checkpoint after a power cut at each operation of three saves."""
    disk = Disk(root)
    with patch.context() as patched:
        disk.install(patched)
        for step in (1, 2, 3):
            save_checkpoint(root / "checkpoints" / "unet", made(step), keep)
    found: list[int | None] = []
    place = root.with_name("after")
    for tree in disk.cuts:
        for name, content in tree.items():
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        tidy(place / "checkpoints" / "unet")
        newest = load_newest(place / "checkpoints" / "unet")
        found.append(None if newest is None else newest.step)
        shutil.rmtree(place, ignore_errors=True)
    return found


def never_back(found: list[int | None]) -> bool:
    """The newest checkpoint only ever gets newer, and once there is one there is always one."""
    steps = [-1 if step is None else step for step in found]
    return steps == sorted(steps)


@pytest.mark.parametrize("last", [1, 2])
def test_a_power_cut_loses_no_checkpoint(last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    found = after_cuts(tmp_path / "run", Keep(last), monkeypatch)
    assert len(found) > 30
    assert found[-1] == 3, "what save_checkpoint has returned from is safe"
    assert set(found) == {None, 1, 2, 3}
    assert never_back(found)


def early_prune(folder: Path, step: int, data: Any, listing: Any, score: Any) -> None:
    """A mutant: the old ones go before the new one has its name."""
    shutil.rmtree(folder / f"{step - 1:08d}", ignore_errors=True)
    plain_commit(folder, step, data, listing, score)


plain_commit = checkpoints.commit

MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "files are not flushed": (files, "fsync_tree", lambda folder: files.fsync_folder(folder)),
    "names are not flushed": (files, "fsync_folder", lambda folder: None),
    "the old one goes first": (checkpoints, "commit", early_prune),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_disk_finds_out_mutants(mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    owner, name, replaced = MUTANTS[mutant]
    monkeypatch.setattr(owner, name, replaced)
    if mutant == "files are not flushed":  # neither one by one nor at the end
        monkeypatch.setattr(checkpoints, "write_file", unflushed)
    found = after_cuts(tmp_path / "run", Keep(1), monkeypatch)
    assert not (never_back(found) and found[-1] == 3)


def unflushed(path: Path, blocks: Any) -> str:
    content = b"".join(blocks)
    path.write_bytes(content)
    return checkpoints.sha256(content).hexdigest()
