"""What two processes do with networks that are partly frozen: started by `test_partial.py`, twice at once.

Its arguments: a FOLDER and the optimizer's kind. FOLDER/one has the checkpoints of one process. Written, for each way
to spread networks: FOLDER/WAY, trained from the start; FOLDER/WAY-again, continued from half way; FOLDER/WAY-begun,
what one process began; FOLDER/WAY-RANK.json, what of the networks is frozen.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from torch.distributed.tensor import DTensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "engine"))

from partial import partial_loop  # noqa: E402

from latentgen.engine.loop import Loop  # noqa: E402
from latentgen.engine.sharding import Sharding, here  # noqa: E402
from latentgen.engine.world import make_world  # noqa: E402

HALF = "00000003"
WAYS = {"ddp": None, "cut": Sharding(min_parameters=100), "mixed": Sharding(min_parameters=1000)}
"""The last one puts what is frozen together with what is not, of another type."""


def frozen(loop: Loop) -> dict[str, list[int]]:
    """Name -> elements here (-1 where it is not cut), elements in all, whether averages have the very same memory."""
    found = {}
    for network in ("net", "still"):
        averages = [ema.averaged for name, ema in loop.trained.averages().items() if name.startswith(network)]
        assert len(averages) == 2
        for name, p in loop.trained.plain[network].named_parameters():
            if not p.requires_grad:
                shared = all(here(ema.get_parameter(name)).data_ptr() == here(p).data_ptr() for ema in averages)
                elements = p.to_local().numel() if isinstance(p, DTensor) else -1
                found[f"{network}.{name}"] = [elements, p.numel(), shared]
    return found


def main(folder: Path, kind: str) -> None:
    accelerator = make_world("fp32", processes=2, device="cpu").accelerator
    for way, shards in WAYS.items():
        loop = partial_loop(folder / way, accelerator, shards, norm=False, optimizer=kind)
        loop.run()
        (folder / f"{way}-{accelerator.process_index}.json").write_text(json.dumps(frozen(loop)))
        for source, name in ((way, f"{way}-again"), ("one", f"{way}-begun")):
            if accelerator.is_main_process:
                shutil.copytree(folder / source / "c" / HALF, folder / name / "c" / HALF)
            accelerator.wait_for_everyone()
            partial_loop(folder / name, accelerator, shards, norm=False, optimizer=kind).run()
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
