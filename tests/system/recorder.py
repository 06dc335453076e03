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
        moments, states = Spy(self.moments), Spy(self.texts["context"])
        spied = dataclasses.replace(self, moments=moments, texts={"context": states})  # type: ignore[arg-type]
        batch = plain_cached(spied, draw)
        latent, caption = moments.rows, states.rows
        write(
            draw,
            example=list(draw.indices),
            mirrored=[row >= len(self.rows) for row in latent],
            caption_row=caption,
            dropped=[row == 0 for row in caption],
        )
        return batch

    def draws(self: DiffusionTask, batch: Any, draw: Draw) -> Noised:
        drawn = plain_draws(self, batch, draw)
        posterior = draw.normal("posterior", batch["mean"].shape[1:])
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
