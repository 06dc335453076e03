"""Write down which random draws training used, one JSON line a row of the global batch.

Not a test: loaded into the training process, by `forkserver.py` or `recorded_train.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from latentgen.core.rand import Draw
from latentgen.data import fetch
from latentgen.data.captions import CachedWords
from latentgen.data.latents import CachedLatents
from latentgen.tasks.diffusion import DiffusionTask, Noised


def digest(value: Tensor) -> str:
    """Short name of a tensor's exact bytes."""
    return hashlib.sha256(np.ascontiguousarray(value.detach().cpu().numpy()).tobytes()).hexdigest()[:16]


class Spy:
    """An array that remembers which rows were read last."""

    def __init__(self, array: Any) -> None:
        self.array, self.rows = array, []

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, rows: Any) -> Any:
        self.rows = [int(row) for row in rows]
        return self.array[rows]


class Asked:
    """Latents that remember of which examples mirror images were asked for."""

    def __init__(self, latents: CachedLatents) -> None:
        self.latents, self.mirrors, self.mirrored = latents, latents.mirrors, []

    def __call__(self, indices: Any, mirrored: Any) -> Any:
        self.mirrored = mirrored.tolist()
        return self.latents(indices, mirrored)


def record(folder: str) -> None:
    """From now on this process appends its draws to `folder/PID.jsonl`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = open(Path(folder) / f"{os.getpid()}.jsonl", "a", buffering=1)

    def write(draw: Draw, **columns: list[Any]) -> None:
        if draw.stage.endswith(" validation"):  # the same draws every time
            return
        for at, row in enumerate(draw.rows):
            values = {name: column[at] for name, column in columns.items()}
            file.write(json.dumps({"stage": draw.stage, "step": draw.step, "row": row, **values}) + "\n")

    plain_pictures, plain_cached, plain_draws = (
        fetch.PictureBatches.__call__,
        fetch.CachedBatches.__call__,
        DiffusionTask.draws,
    )

    def pictures(self: fetch.PictureBatches, draw: Draw) -> dict[str, Any]:
        batch = plain_pictures(self, draw)
        captions = batch.get("caption", [""] * len(draw.rows))
        write(draw, example=list(draw.indices), picture=[digest(x) for x in batch["image"]], caption=captions)
        return batch

    def cached(self: fetch.CachedBatches, draw: Draw) -> dict[str, Tensor]:
        assert isinstance(self.words, CachedWords)
        states = Spy(self.words.texts["context"])
        words = dataclasses.replace(self.words, texts={"context": states})  # type: ignore[arg-type]
        spied = dataclasses.replace(self, words=words)
        asked = None if self.latents is None else Asked(self.latents)
        if asked is not None:
            spied = dataclasses.replace(spied, latents=asked)  # type: ignore[arg-type]
        batch = plain_cached(spied, draw)
        seen = {name: [digest(x) for x in batch[name]] for name in ("image", "loss_mask", "sizes") if name in batch}
        if asked is not None:
            seen["mirrored"] = asked.mirrored
        caption = states.rows
        write(draw, example=list(draw.indices), caption_row=caption, dropped=[row == 0 for row in caption], **seen)
        return batch

    def draws(self: DiffusionTask, batch: Any, draw: Draw) -> Noised:
        drawn = plain_draws(self, batch, draw)
        posterior = draw.normal("posterior", drawn.x0.shape[1:])
        write(
            draw,
            noise=[digest(x) for x in drawn.noise],
            posterior=[digest(x) for x in posterior],
            sigma=[float(x).hex() for x in drawn.sigma],
        )
        return drawn

    fetch.PictureBatches.__call__ = pictures  # type: ignore[method-assign]
    fetch.CachedBatches.__call__ = cached  # type: ignore[method-assign]
    DiffusionTask.draws = draws  # type: ignore[method-assign]
