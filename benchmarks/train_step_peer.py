"""Runs diffusers' train_text_to_image.py, unchanged, from a checkout; for train_step.py.

Only what is around it is replaced: the tracker reports steps, `datasets` is stood in for where it is not installed, and
with given draws the random functions return those.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import runpy
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import torch
from diffusers.models.autoencoders import vae as vae_module
from PIL import Image
from safetensors.torch import load_file
from train_step_pace import Pace


class Table:
    """A folder of pictures with captions in metadata.jsonl, decoded when looked at."""

    column_names = ("image", "text")

    def __init__(self, folder: Path, transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> None:
        self.folder, self.transform = folder, transform
        lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        self.lines = sorted(lines, key=lambda line: line["file_name"])

    def with_transform(self, transform: Callable[[dict[str, Any]], dict[str, Any]]) -> Table:
        return Table(self.folder, transform)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        assert self.transform is not None
        line = self.lines[index]
        with Image.open(self.folder / line["file_name"]) as picture:
            picture.load()
            row = self.transform({"image": [picture], "text": [line["text"]]})
        return {key: value[0] for key, value in row.items()}


def stand_in_for_datasets() -> None:
    """The little of `datasets` that the script asks for; it does less work than the library."""

    def load_dataset(kind: str, data_files: dict[str, str], cache_dir: str | None) -> dict[str, Table]:
        return {"train": Table(Path(data_files["train"]).parent)}

    module: Any = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    quiet = types.SimpleNamespace(set_verbosity_warning=lambda: None, set_verbosity_error=lambda: None)
    module.utils = types.SimpleNamespace(logging=quiet)
    module.__spec__ = importlib.util.spec_from_loader("datasets", None)
    sys.modules["datasets"] = module


def give_draws(file: Path) -> None:
    """Order, posterior noise, noise and times from a file, in the place of torch's random functions."""
    draws = load_file(file)
    turn = {"step": -1}
    plain_loader, plain_randint = torch.utils.data.DataLoader, torch.randint

    class Ordered(plain_loader):  # a class, because accelerate asks what it is given whether it is one
        def __init__(self, dataset: Any, shuffle: bool, **options: Any) -> None:
            super().__init__(dataset, sampler=draws["order"].flatten().tolist(), **options)

    def sample(self: Any, generator: Any = None) -> torch.Tensor:
        turn["step"] += 1
        return self.mean + self.std * draws["posterior"][turn["step"]]

    def randint(*given: Any, **named: Any) -> torch.Tensor:
        if given[:1] == (0,) and given[1:2] == (1000,):
            return draws["time"][turn["step"]]
        return plain_randint(*given, **named)

    torch.utils.data.DataLoader = Ordered  # type: ignore[misc]
    torch.randn_like = lambda like, **_: draws["noise"][turn["step"]]  # type: ignore[assignment]
    torch.randint = randint  # type: ignore[assignment]
    vae_module.DiagonalGaussianDistribution.sample = sample  # type: ignore[method-assign]


def report_steps(pace: Pace) -> None:
    """The script logs once a step, with the loss that it has just read."""

    def log(self: Any, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        if "train_loss" in values:
            pace.step(values["train_loss"])

    accelerate.Accelerator.log = log  # type: ignore[method-assign]
    accelerate.Accelerator.init_trackers = lambda self, *_, **__: None  # type: ignore[method-assign]


def compile_networks() -> None:
    """Every network that the script prepares is compiled."""
    plain = accelerate.Accelerator.prepare

    def prepare(self: Any, *things: Any, **named: Any) -> Any:
        return plain(self, *_compiled(things), **named)

    def _compiled(things: tuple[Any, ...]) -> Iterator[Any]:
        for thing in things:
            yield torch.compile(thing) if isinstance(thing, torch.nn.Module) else thing

    accelerate.Accelerator.prepare = prepare  # type: ignore[method-assign]


def main() -> None:
    """Everything after `--` is the script's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--turn", type=int, required=True)
    parser.add_argument("--draws", type=Path)
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--compile", action="store_true")
    split = sys.argv.index("--")
    options = parser.parse_args(sys.argv[1:split])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the script prints must not be taken for a report
    if importlib.util.find_spec("datasets") is None:
        stand_in_for_datasets()
    if options.draws:
        give_draws(options.draws)
    if options.compile:
        compile_networks()
    report_steps(Pace(options.turn, out, options.wall))
    script = options.peer / "examples" / "text_to_image" / "train_text_to_image.py"
    sys.argv = [str(script), *sys.argv[split + 1 :]]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
