"""Make `data/shapes-model/` from a finished run: half-precision weights, and a card with its measured scores.

    python benchmarks/ship_model.py runs/shapes [--out data/shapes-model]

The scores on the card are those of the files that are shipped, drawn and judged after writing them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from latentgen.core.files import write_text
from latentgen.formats.model_folder import load_model, save_model
from latentgen.models.clip import load_clip

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# shapes-model

Draws the shapes world of latentgen at {side}x{side} pixels: circles, squares, triangles, stars, hearts and crosses in
eight colours, on white or gray, one to four at a time. Trained from nothing, all three networks, on nothing but that
procedural world: no picture of the world outside, and no other model, went into it.

- Made by `accelerate launch train.py --config configs/{recipe}.yaml`,
  then `python benchmarks/ship_model.py runs/{recipe}`.{note}
- Counted compute: {flops} FLOP. Seed {seed}. The whole recipe is in `latentgen.json`.
- Stored in half precision, {size:.1f} MB, safetensors only.
- Opens with `python sample.py "a red circle"` and with `diffusers.StableDiffusionPipeline.from_pretrained`.

It knows no other words than those of its world.

{scores}
"""


def main() -> None:
    """Convert, evaluate, write the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("data/shapes-model"))
    parser.add_argument("--note", help="what else the card should say of how it was made")
    options = parser.parse_args()
    source = options.run / "model"
    model = load_model(source)
    clip = load_clip(source / "clip").half()
    save_model(model, options.out, torch.float16, clip=clip)
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "latentgen", "evaluate", "shapes", "--model", str(options.out), "--out", folder]
        subprocess.run([sys.executable, *command], check=True)
        scores = Path(folder, "shapes.md").read_text()
        shutil.copy(Path(folder, "shapes.png"), options.out / "scores.png")
    recipe = model.metadata["recipe"]
    files = [path for path in options.out.rglob("*") if path.is_file()]
    card = CARD.format(
        side=recipe["data"]["resolution"],
        recipe=recipe["name"],
        note=f"\n  {options.note}" if options.note else "",
        flops=f"{model.metadata['flops']:.3g}",
        seed=recipe["seed"],
        size=sum(path.stat().st_size for path in files if path.suffix == ".safetensors") / 1e6,
        scores=scores.replace("# Shapes", "## Scores", 1),
    )
    write_text(options.out / "README.md", card)
    print(json.dumps({"out": str(options.out), "bytes": sum(path.stat().st_size for path in files)}))


if __name__ == "__main__":
    main()
