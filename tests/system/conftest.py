"""Whole programs, and one trained run that many tests look at.

`programs` runs `latentgen ...` in forked processes, each a program of its own with its exit code and output, without
importing torch anew each time. Everything happens in temporary folders.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent

MINI = """\
name: mini
data: {size: 24, captions: 2, holdout: 4, flip: true, cache: CACHE}
autoencoder:
  channels: [4, 4, 8, 8]
  latent_channels: 4
  norm_groups: 4
  train: {steps: 6, global_batch: 8}
text_encoder:
  width: 16
  layers: 1
  heads: 2
  vocab_size: 514
  embed_dim: 16
  image: {width: 8, layers: 1, heads: 2}
  train: {steps: 6, global_batch: 8}
unet: {channels: [16, 16], layers_per_block: 1, heads: 2, norm_groups: 8}
diffusion: {caption_dropout: 0.3}
train: {steps: 6, global_batch: 8, warmup_steps: 2, log_every: 2, save_every: 3, validate_every: 3}
preview: {every: 3, num: 1, num_inference_steps: 1, prompts: ["a red circle"]}
"""
"""Trains all three networks in a second or two. An epoch is 3 steps, a checkpoint is written every 3."""


@dataclass(frozen=True)
class Done:
    """How a program ended. `code` is negative when a signal killed it."""

    code: int | None
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines of standard error; what a progress bar overwrote does not count."""
        lines = [line.rpartition("\r")[2].strip() for line in self.err.splitlines()]
        return [line for line in lines if line]


@dataclass(frozen=True)
class Running:
    """A program that was started, and the files of its output."""

    pid: int
    out: Path
    err: Path


class Programs:
    """Client of `forkserver.py`."""

    def __init__(self, server: subprocess.Popen[str], scratch: Path) -> None:
        self._server, self._scratch, self._count = server, scratch, 0

    def _ask(self, **request: Any) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def __call__(self, *argv: object, cwd: Path, timeout: float = 120, **hooks: Any) -> Done:
        """Run `latentgen ARGV` in `cwd` to its end; `hooks` as `forkserver.py` knows them."""
        return self.end(self.start(*argv, cwd=cwd, **hooks), timeout)

    def start(self, *argv: object, cwd: Path, **hooks: Any) -> Running:
        """The same, without waiting for its end."""
        self._count += 1
        out, err = (self._scratch / f"{self._count}.{kind}" for kind in ("out", "err"))
        words = [str(word) for word in argv]
        return Running(self._ask(argv=words, cwd=str(cwd), stdout=str(out), stderr=str(err), hooks=hooks), out, err)

    def end(self, running: Running, timeout: float = 120) -> Done:
        """Wait for the end of a program that was started."""
        return Done(self._ask(wait=running.pid, timeout=timeout), running.out.read_text(), running.err.read_text())


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Of every program: offline, one thread, this checkout."""
    own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **own}


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[Programs]:
    command = [sys.executable, str(HERE / "forkserver.py")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as server:
        yield Programs(server, tmp_path_factory.mktemp("output"))
        assert server.stdin is not None
        server.stdin.close()


@pytest.fixture(scope="session")
def mini() -> Callable[[Path], Path]:
    """Writer of the mini recipe into a folder, with its cache there."""

    def write(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        recipe = folder / "mini.yaml"
        recipe.write_text(MINI.replace("CACHE", str(folder / "cache")))
        return recipe

    return write


@pytest.fixture(scope="session")
def trained(programs: Programs, mini: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `runs/mini`, trained without interruption, and `draws`. Tests may read it but not change it."""
    folder = tmp_path_factory.mktemp("trained")
    done = programs("train", "--config", mini(folder), cwd=folder, draws=str(folder / "draws"))
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="session")
def model(trained: Path) -> Path:
    """The trained model folder; tests may read it but not change it."""
    return trained / "runs" / "mini" / "model"


@pytest.fixture(scope="session")
def weights() -> Callable[[Path], dict[str, str]]:
    """Every weight file of a run's results -> SHA-256."""

    def read(run: Path) -> dict[str, str]:
        files = [*run.glob("model/**/*.safetensors"), *run.glob("stages/**/*.safetensors")]
        return {str(file.relative_to(run)): sha256(file.read_bytes()).hexdigest() for file in sorted(files)}

    return read


@pytest.fixture(scope="session")
def measured() -> Callable[[Path], dict[tuple[str, str, int], dict[str, float]]]:
    """(stage, kind, step) -> what metrics.jsonl says, less the speed; every key must be there once."""

    def read(run: Path) -> dict[tuple[str, str, int], dict[str, float]]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found = {}
        for line in lines:
            key = (line.pop("stage"), line.pop("kind"), line.pop("step"))
            assert key not in found, f"{key} twice"
            line.pop("steps_per_second", None)
            found[key] = line
        return found

    return read


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, str]]:
    """Every file below a folder -> SHA-256, and every folder: to see that nothing was written."""

    def read(folder: Path) -> dict[str, str]:
        return {
            str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            for path in sorted(folder.rglob("*"))
        }

    return read
