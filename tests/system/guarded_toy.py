"""What two processes do when a step goes wrong in one of them: started by `test_guard.py`, twice at once.

Its argument: a FOLDER. Written: FOLDER/RUN of several runs of the toy of `tests/engine/faulty.py`, and
FOLDER/state-RANK.json: run -> name -> hash of each tensor that this process ended with.
"""

from __future__ import annotations

import json
import shutil
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "engine"))

from faulty import Fault, faulty_loop, leave_out, state  # noqa: E402

from latentgen.engine import ema, guard, spikes  # noqa: E402
from latentgen.engine.loop import Loop  # noqa: E402
from latentgen.engine.sharding import Sharding, here  # noqa: E402
from latentgen.engine.world import make_world  # noqa: E402

ONE_SIDED = [Fault("loss", 1, row=6), Fault("gradient", 3, row=5), Fault("batch", 5, row=7)]
"""All in the second process, which has the rows 4 to 7."""

BROKEN = Fault("weight", 10, 50.0)
ROLLING = {"steps": 24, "rollback_every": 4, "learning_rate": 0.002, "ema_lengths": (), "optimizer": "muon"}


def digest(value: Tensor) -> str:
    return sha256(here(value).detach().contiguous().numpy().tobytes()).hexdigest()


def on_device(loop: Loop) -> Loop:
    """As on a GPU: nobody reads the verdict."""
    loop.guard.host = False
    return loop


def main(folder: Path) -> None:
    accelerator = make_world("fp32", processes=2, device="cpu").accelerator
    found: dict[str, dict[str, str]] = {}

    def run(name: str, loop: Loop) -> None:
        loop.run()
        found[name] = {key: digest(value) for key, value in state(loop).items()}

    def loops(name: str, faults: list[Fault], left_out: set[int], shards: Sharding | None = None, **how: Any) -> Loop:
        made = faulty_loop(folder / name, accelerator, *faults, shards=shards, norm=False, **how)
        leave_out(made, left_out)
        return made

    run("one-sided", loops("one-sided", ONE_SIDED, set()))
    run("left-out", loops("left-out", [], {1, 3, 5}))

    spikes.WARM = 6
    shards = Sharding(min_parameters=100)
    run("cut", loops("cut", [BROKEN], set(), shards, save_every=1, **ROLLING))
    run("cut-left-out", loops("cut-left-out", [], set(range(8, 16)), shards, **ROLLING))
    if accelerator.is_main_process:
        for step in (12, 16):
            shutil.copytree(folder / "cut" / "c" / f"{step:08d}", folder / f"from-{step}" / "c" / f"{step:08d}")
    accelerator.wait_for_everyone()
    for step in (12, 16):
        run(f"from-{step}", loops(f"from-{step}", [BROKEN], set(), shards, **ROLLING))

    ema.lerp_unless = guard.lerp_on_device
    torch.manual_seed(0)
    bad = [Fault("loss", 1, row=6), Fault("batch", 5, row=7)]
    run("device", on_device(loops("device", bad, set(), shards, optimizer="muon")))
    run("device-left-out", on_device(loops("device-left-out", [], {1, 5}, shards, optimizer="muon")))

    (folder / f"state-{accelerator.process_index}.json").write_text(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
