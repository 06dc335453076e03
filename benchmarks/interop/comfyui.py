"""Let ComfyUI draw our pictures: our single files, LoRAs and learned words, in its own code, from the same noise.

    python benchmarks/interop/comfyui.py --comfyui CHECKOUT [--python PYTHON] [--shapes sd1 vega] [--docs]

CHECKOUT is ComfyUI's repository, PYTHON one that has what it needs. A model with random weights in the shape of Stable
Diffusion 1.5 (and one of Segmind Vega's, which has SDXL's two text encoders) is made in fp16 and exported by
`latentgen export`, random adapters and words for it are written in the layouts that ComfyUI reads, and both programs
draw: no network, no GPU; some ten minutes of two cores, and 6 GB of memory (Vega: 12 GB). Both are given the same start
and the same noise levels.

Pictures must be within 2/255 at every pixel; text states within 1e-3 of their spread. Exits with 1 where they are not.
DoRA is shown without a bar: ComfyUI's formula is another one (docs/finetune.md).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from random_models import SHAPES, random_lora, random_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentgen import __version__
from latentgen.core.files import write_text
from latentgen.diffusion.schedules import find_schedule
from latentgen.formats.embeddings import Embedding, write_embedding
from latentgen.formats.lora.writing import write_lora
from latentgen.formats.model_folder import save_model
from latentgen.formats.opening import open_model
from latentgen.models.autoencoder import factor
from latentgen.pipelines.generate import Request, generate, start_noise

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "comfyui.md"
PIXELS, STATES = 2.0, 1e-3
"""Bars: of 255; of the states' standard deviation."""

TITLES = {"sd1": "Stable Diffusion 1.5", "vega": "Segmind Vega (SDXL's two text encoders, a smaller U-Net)"}
PROMPT, NEGATIVE, WORDS = "a red circle above a blue square", "blurry, dark", "a red {}cat{} above a blue {}dog{}"
SIDE, STEPS, SCALE, SEED, SCHEDULE = 64, 4, 5.0, 7, "trailing"
KINDS, STRENGTH = ("lora", "loha", "lokr", "dora"), 0.003
"""Of adapters; the standard deviation of the change to a weight (a fresh linear layer's own is 0.02)."""
TARGETS = {"sd1": ("attention", "feed_forward"), "vega": ("attention",)}
"""Layers with adapters; fewer in the large one, because ComfyUI keeps a copy of each changed weight."""


@dataclass(frozen=True)
class Case:
    """A picture to be drawn by both.

    Attributes:
        title: of its row.
        sampler: of both programs; they call them alike.
        lora: a file's name without its ending, and how strong it is.
        words: with the learned words, one in each layout that the family has.
        bar: whether it must be equal.
    """

    title: str
    sampler: str
    lora: str | None = None
    weight: float = 1.0
    words: bool = False
    bar: bool = True


CASES = (
    Case("the model", "euler"),
    Case("the model", "dpmpp_2m"),
    Case("learned words of two vectors", "euler", words=True),
    Case("LoRA, kohya", "euler", "lora-kohya"),
    Case("LoRA, kohya", "dpmpp_2m", "lora-kohya", 0.5),
    Case("LoRA, comfyui", "dpmpp_2m", "lora-comfyui"),
    Case("LoRA, comfyui", "euler", "lora-comfyui", 0.5),
    Case("LoHa, kohya", "euler", "loha-kohya"),
    Case("LoKr, kohya", "euler", "lokr-kohya"),
    Case("DoRA, kohya", "euler", "dora-kohya", bar=False),
)


def latentgen(*words: object) -> None:
    """Run our command."""
    command = [sys.executable, "-m", "latentgen", *map(str, words)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def make(shape: str, folder: Path) -> None:
    """Write model.safetensors, the LoRAs, and embeddings/cat.safetensors."""
    model = random_model(shape)
    save_model(model, folder / "model", torch.float16)
    networks = {name: network for name, network in model.networks().items() if name != "vae"}
    for kind in KINDS:
        lora = random_lora(networks, kind, TARGETS[shape], STRENGTH)
        write_lora(lora, folder / f"{kind}-kohya.safetensors", "kohya", networks)
    generator = torch.Generator().manual_seed(3)
    widths = {tower.name: int(tower.encoder.config.hidden_size) for tower in model.towers}
    for word, layout in (("cat", "a1111"), ("dog", "diffusers" if len(widths) == 1 else "a1111")):
        vectors = {name: 0.1 * torch.randn(2, width, generator=generator) for name, width in widths.items()}
        write_embedding(Embedding(f"<{word}>", vectors), folder / "embeddings" / f"{word}.safetensors", layout)
    del model, networks
    gc.collect()
    latentgen("export", folder / "model", folder / "model.safetensors")
    latentgen(
        *("lora", "convert", folder / "lora-kohya.safetensors", "--out", folder / "lora-comfyui.safetensors"),
        *("--layout", "comfyui", "--model", folder / "model"),
    )


def request(case: Case) -> Request:
    return Request(
        WORDS.format("<", ">", "<", ">") if case.words else PROMPT,
        negative_prompt=NEGATIVE,
        seed=SEED,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        sampler=case.sampler,
        schedule=SCHEDULE,
        height=SIDE,
        width=SIDE,
    )


def ours(folder: Path) -> dict[str, Tensor]:
    """Pictures `[h, w, 3]` from 0 to 255 and text states `[t, d]`, of the file; and what ComfyUI is given besides."""
    found: dict[str, Tensor] = {}
    numbered = sorted(enumerate(CASES), key=lambda case: (case[1].lora or "", case[1].weight, case[1].words))
    for (lora, weight, told), group in itertools.groupby(numbered, key=lambda c: (c[1].lora, c[1].weight, c[1].words)):
        loras = [] if lora is None else [(folder / f"{lora}.safetensors", weight)]
        words = sorted((folder / "embeddings").iterdir()) if told else []
        model = open_model(folder / "model.safetensors", loras=loras, embeddings=words).model
        for number, case in group:
            asked = request(case)
            found[str(number)] = torch.from_numpy(np.array(next(generate(model, [asked]))))
            with torch.no_grad():
                found[f"{number} text"] = model.encode([asked.prompt]).states[0]
            print(f"ours: {case.title}, {case.sampler}", flush=True)
        sigmas = find_schedule(SCHEDULE)(STEPS, model.parameterization())
        noise = start_noise(request(CASES[0]), model.latent_channels, factor(model.vae))
        # ComfyUI starts at sqrt(1 + sigma^2) times what it is given, we at sigma times the noise.
        found["noise"] = noise * float(sigmas[0] / (1 + sigmas[0] ** 2).sqrt())
        found["sigmas"] = sigmas.float()
        del model
        gc.collect()
    return found


def theirs(folder: Path, checkout: Path, python: str) -> dict[str, Tensor]:
    """The same, drawn by ComfyUI in a process of its own."""
    job = {
        "checkpoint": str(folder / "model.safetensors"),
        "embeddings": str(folder / "embeddings"),
        "given": str(folder / "given.safetensors"),
        "pictures": [
            {
                "name": str(number),
                "prompt": WORDS.format(*("embedding:", "") * 2) if case.words else PROMPT,
                "negative": NEGATIVE,
                "guidance_scale": SCALE,
                "sampler": case.sampler,
                "lora": None if case.lora is None else str(folder / f"{case.lora}.safetensors"),
                "weight": case.weight,
            }
            for number, case in enumerate(CASES)
        ],
    }
    (folder / "job.json").write_text(json.dumps(job))
    script, out = Path(__file__).with_name("comfyui_draw.py"), folder / "theirs.safetensors"
    subprocess.run([python, script, checkout, folder / "job.json", out], check=True, cwd=checkout)
    return load_file(out)


def rows(mine: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[tuple[Case, dict[str, float]]]:
    """What to say of each case, pictures in units of 1/255."""
    found, base = [], mine["0"].double()
    for number, case in enumerate(CASES):
        picture, states = mine[str(number)].double(), mine[f"{number} text"]
        difference = (picture - 255 * other[str(number)].double()).abs()
        told = {
            "spread": float(picture.std()),
            "effect": float((picture - base).abs().mean()),
            "most": float(difference.max()),
            "mean": float(difference.mean()),
            "states": float((states - other[f"{number} text"]).abs().max() / states.std()),
        }
        found.append((case, told))
    return found


def holds(case: Case, told: Mapping[str, float]) -> bool:
    return not case.bar or (told["most"] <= PIXELS and told["states"] <= STATES)


def table(found: Sequence[tuple[Case, Mapping[str, float]]]) -> str:
    lines = [
        "| drawn with | weight | sampler | spread of the picture | change by it, mean | ComfyUI's differs by, mean "
        "| at most | text states differ by, at most | holds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case, told in found:
        weight = "" if case.lora is None else f"{case.weight:g}"
        verdict = ("yes" if holds(case, told) else "NO") if case.bar else "no bar"
        lines.append(
            f"| {case.title} | {weight} | {case.sampler} | {told['spread']:.0f} | {told['effect']:.1f} "
            f"| {told['mean']:.2f} | {told['most']:.2f} | {told['states']:.1g} | {verdict} |"
        )
    return "\n".join(lines)


def version_of(checkout: Path) -> str:
    """What the checkout calls itself."""
    found = re.search(r'__version__ = "(.+)"', (checkout / "comfyui_version.py").read_text())
    return found[1] if found else "of unknown version"


def head(checkout: Path, shapes: Sequence[str]) -> str:
    """What was done, with what."""
    attention_only = ", ".join(TITLES[shape] for shape in shapes if TARGETS[shape] == ("attention",))
    layers = f"attention and feed-forward layers{attention_only and f' ({attention_only}: attention only)'}"
    return f"""# ComfyUI draws our pictures

`python benchmarks/interop/comfyui.py --comfyui CHECKOUT --shapes {" ".join(shapes)} --docs`:
random models in the shapes of published ones, stored in fp16 and exported as a single file, and random adapters on the
{layers} of U-Net and text encoders; drawn here and by ComfyUI's own code from the same noise, in fp32.
{SIDE} px, {STEPS} steps at the levels of "{SCHEDULE}", cfg {SCALE:g}, a negative prompt.

Numbers are of 255: the standard deviation of our picture; the mean change that the adapter or the other prompt makes to
the first picture; how far ComfyUI's picture is from ours, which is rounded to whole numbers, in the mean and at most
(bar: {PIXELS:g}). Text states are compared in units of their standard deviation (bar: {STATES:g}).

DoRA has no bar: ComfyUI divides by the norm of the untrained weights, where the paper and peft take that of the changed
ones.

ComfyUI {version_of(checkout)}, latentgen {__version__}, torch {torch.__version__}, diffusers {diffusers.__version__},
transformers {transformers.__version__}, on the CPU.
"""


def main() -> None:
    """Make, draw twice, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="checkout of ComfyUI")
    parser.add_argument("--python", default=sys.executable, help="Python that has what ComfyUI needs")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["sd1"])
    parser.add_argument("--work", type=Path, help="where to put the models; default: a temporary folder")
    parser.add_argument("--docs", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    o = parser.parse_args()
    said, good = [], True
    for shape in o.shapes:
        with tempfile.TemporaryDirectory(dir=o.work) as folder:
            place = Path(folder)
            make(shape, place)
            mine = ours(place)
            save_file({key: mine[key] for key in ("noise", "sigmas")}, place / "given.safetensors")
            found = rows(mine, theirs(place, o.comfyui.resolve(), o.python))
        good = good and all(holds(*row) for row in found)
        said.append(f"## {TITLES[shape]}\n\n{table(found)}\n")
        print(said[-1], flush=True)
    if o.docs:
        write_text(RESULTS, "\n".join([head(o.comfyui, o.shapes), *said]))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
