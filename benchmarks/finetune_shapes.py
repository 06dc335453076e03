"""Fine-tuning, measured: the shipped shapes model learns a new shape, and a style, from twenty pictures.

    python benchmarks/finetune_shapes.py [--only RECIPE ...] [--quick] [--set KEY=VALUE ...] [--work FOLDER]

Each recipe of configs/finetune-*.yaml is trained as a user trains it, `latentgen train --config ... data.path=...`.

* A shape: twenty pictures of a large arrow, which the world of shapes lacks, in five of its colours. Then arrows are
  asked for in the other three, and the judge, who knows the arrow's exact outline, says how many pictures show what was
  asked for; and the standing prompts of the world, of which none names an arrow, say what was forgotten, picture by
  picture against the model as it was. A word alone cannot teach a shape that no weight draws: what one can teach is
  measured with a word for hearts.
* A style: twenty pictures of outlined shapes. How much of what an outline encloses is background, by the LoRA's weight.

Writes benchmarks/results/finetune_shapes.{json,md}. What was trained and judged is kept in --work, and reused while the
recipe, the pictures and the weights are the same. --only leaves out the others, --quick judges a sixth of the standing
prompts and fewer pictures; both print and write nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from new_shape import (
    ARROW,
    ASKED,
    SHOWN,
    Ask,
    Example,
    arrow_example,
    arrows_in,
    asks_alone,
    asks_beside,
    asks_large,
    hollow,
    judged,
    judged_outlined,
    outlined_example,
    write_pictures,
)
from PIL import Image

from latentgen.cli.sample import SHIPPED
from latentgen.core.files import content_key, file_sha256, write_json, write_text
from latentgen.core.log import progress
from latentgen.core.runfolder import ADAPTER_INDEX
from latentgen.data.fetch import to_tensor
from latentgen.data.sources.shapes_scene import CATEGORIES
from latentgen.evals.shapes_prompts import Prompt, standing_prompts
from latentgen.evals.shapes_report import bootstrap, evaluate
from latentgen.evals.shapes_score import Verdict
from latentgen.formats.adapter_folder import read_adapter
from latentgen.formats.model import Model
from latentgen.formats.opening import open_model
from latentgen.models.autoencoder import decode, encode_moments, factor
from latentgen.pipelines.generate import Request, generate
from latentgen.pipelines.pictures import grid, save_png, to_pictures

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = 20
"""To learn from."""

BATCH = 36
"""Pictures drawn together."""

WEIGHTS = (0.0, 0.5, 1.0)
"""Of the style's LoRA."""

VERSION = 1
"""Part of the key of what is kept; to be raised when the same weights would be judged otherwise."""


@dataclass(frozen=True)
class Way:
    """A recipe to try: its file, what to call it, the word that its captions and prompts say for an arrow, and the
    shape that is to be learned in the place of an arrow."""

    config: str
    name: str
    word: str = ARROW
    shape: str = ARROW

    @property
    def key(self) -> str:
        """What names it here."""
        return self.config if self.shape == ARROW else f"{self.config}-{self.shape}"


WORD = "<thing>"
"""The word that recipes with learned words learn."""

WAYS = (
    Way("finetune-lora", "LoRA"),
    Way("finetune-dreambooth", "DreamBooth"),
    Way("finetune-word", "textual inversion", WORD),
    Way("finetune-word", "textual inversion of hearts, which it knows", WORD, "heart"),
    Way("finetune-pivotal", "pivotal tuning", WORD),
)
STYLE = Way("finetune-style", "style")
BASE = Way("", "as it was")


@dataclass(frozen=True)
class Trained:
    """A finished run: what it wrote, the steps it took, seconds of the whole command, KiB of what is to be shared."""

    folder: Path
    steps: int
    seconds: float
    size: float


def train(way: Way, work: Path, examples: Sequence[Example], settings: Sequence[str]) -> Trained:
    """Train the recipe, with these settings, on the examples; what is finished, or partly there, is gone on with."""
    config = Path("configs") / f"{way.config}.yaml"
    shown = [(e.image.tobytes().hex(), e.caption) for e in examples]
    key = content_key(VERSION, (ROOT / config).read_text(), list(settings), shown)[:8]
    pictures, name = work / "pictures" / f"{way.key}-{key}", f"{way.key}-{key}"
    if not (pictures / "metadata.jsonl").is_file():
        write_pictures(pictures, examples)
    run, spent = work / "runs" / name, 0.0
    kept = work / "runs" / f"{name}.json"
    if kept.is_file():
        spent = json.loads(kept.read_text())["seconds"]
    result = run / "model" if way.config == "finetune-dreambooth" else run / "adapter"
    if not result.is_dir():
        words = [
            f"name={name}",
            f"data.path={pictures}",
            f"data.cache={work / 'cache'}",
            "train.trackers=[]",
            *settings,
        ]
        start = time.perf_counter()
        command = [sys.executable, "-m", "latentgen", "train", "--config", str(config), "--runs", str(work / "runs")]
        subprocess.run([*command, *words], check=True, cwd=ROOT, env={"OMP_NUM_THREADS": "1", **os.environ})
        spent += time.perf_counter() - start
        write_json(kept, {"seconds": spent})
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = max(line["step"] for line in lines)
    return Trained(result, steps, spent, _size(result))


def _size(result: Path) -> float:
    """KiB of the weights to hand on: of a model its U-Net, of an adapter the matrices in one layout and the words."""
    if not (result / ADAPTER_INDEX).is_file():
        return sum(file.stat().st_size for file in (result / "unet").glob("*.safetensors")) / 1024
    adapter = read_adapter(result)
    files = [*([] if adapter.lora is None else [adapter.lora]), *adapter.embeddings.values()]
    return sum(file.stat().st_size for file in files) / 1024


@dataclass(frozen=True)
class Judged:
    """What the judge says of a model: 1 for a picture that shows what was asked for, else 0.

    Attributes:
        alone, shapes: of prompts for one arrow: everything is right; the shape is.
        small: of prompts for a small arrow, of which none was shown: everything is right.
        beside: of prompts for an arrow and another shape.
        world: of the standing prompts, by the world's judge.
        false: how many arrows were found in the pictures of the standing prompts.
    """

    alone: list[int]
    shapes: list[int]
    small: list[int]
    beside: list[int]
    world: list[int]
    false: int


Draw = Callable[[Sequence[str], Sequence[int]], list[Image.Image]]


def drawer(model: Model, what: str, total: int) -> Draw:
    """Prompts and seeds -> pictures, with the settings that `latentgen sample` has by default."""
    side = int(model.unet.config["sample_size"]) * factor(model.vae)
    bar = progress(what, "step", total=total * Request("").num_inference_steps)

    def draw(texts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        requests = [Request(text, seed=seed, height=side, width=side) for text, seed in zip(texts, seeds, strict=True)]
        return list(generate(model, requests, batch_size=BATCH, on_step=bar.update))

    return draw


def judge_arrows(folder: Path, way: Way, prompts: Sequence[Prompt], number: int, sheet: Path) -> Judged:
    """Draw and judge; `number` pictures of every prompt for one arrow, one of all others. Every picture has a seed of
    its own, the same one for all models."""
    model = open_model(folder).model
    alone, small, beside = (
        asks_alone(way.word, shape=way.shape),
        asks_alone(way.word, ("small",), way.shape),
        asks_beside(way.word, way.shape),
    )
    draw = drawer(model, folder.parent.name, number * len(alone) + len(small) + len(beside) + len(prompts))

    def verdicts(asks: Sequence[Ask], each: int) -> tuple[list[Image.Image], list[Verdict]]:
        jobs = [ask for ask in asks for _ in range(each)]
        pictures = draw([ask.text for ask in jobs], range(len(jobs)))
        return pictures, [judged(picture, ask) for picture, ask in zip(pictures, jobs, strict=True)]

    arrows, first = verdicts(alone, number)
    _, tiny = verdicts(small, 1)
    pairs, second = verdicts(beside, 1)
    false = 0

    def counted(texts: list[str], seeds: list[int]) -> list[Image.Image]:
        nonlocal false
        pictures = draw(texts, seeds)
        false += sum(map(arrows_in, pictures))
        return pictures

    report = evaluate(counted, prompts, pictures_per_prompt=1, batch_size=BATCH)
    save_png(grid([*arrows[::number], *pairs], 9, scale=2), sheet)
    return Judged(
        [int(v.ok) for v in first],
        [int(v.checks["shape"]) for v in first],
        [int(v.ok) for v in tiny],
        [int(v.ok) for v in second],
        [int(outcome.ok) for outcome in report.outcomes],
        false,
    )


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the file holds; made and written where it is missing."""
    if not path.is_file():
        write_json(path, make())
    return json.loads(path.read_text(encoding="utf-8"))


def weights_key(folder: Path, *more: Any) -> str:
    """Stands for the weights below a folder, and for how they are judged."""
    return content_key(VERSION, [file_sha256(path) for path in sorted(folder.rglob("*.safetensors"))], *more)[:12]


def judge_style(folder: Path, number: int, sheet: Path) -> list[dict[str, Any]]:
    """By the weight of the LoRA: of each picture the hollow share, and whether it is the outlined shape asked for."""
    file, asks, rows, shown = read_adapter(folder).lora, asks_large(), [], []
    assert file is not None
    jobs = [(ask, seed) for ask in asks for seed in range(number)]
    for weight in (None, *WEIGHTS):
        model = open_model(SHIPPED, loras=[] if weight is None else [(file, weight)]).model
        draw = drawer(model, f"style {weight}", len(jobs))
        pictures = draw([ask.text for ask, _ in jobs], [seed for _, seed in jobs])
        shown.append(pictures)
        if weight is not None:
            right = [int(judged_outlined(picture, ask).ok) for picture, (ask, _) in zip(pictures, jobs, strict=True)]
            rows.append({"weight": weight, "hollow": [hollow(picture) for picture in pictures], "right": right})
    same = [one.tobytes() == other.tobytes() for one, other in zip(shown[0], shown[1], strict=True)]
    rows[0]["identical"] = sum(same)
    step = len(jobs) // 12
    save_png(grid([picture for pictures in shown[1:] for picture in pictures[::step][:12]], 12, scale=2), sheet)
    return rows


def share(values: Sequence[float], prompts: int) -> str:
    """Percent, and its 95% interval over prompts; the values are in the order of the prompts."""
    by_prompt = np.array(values, float).reshape(prompts, -1).mean(1)
    low, high = bootstrap([by_prompt])
    return f"{100 * by_prompt.mean():.1f} ({100 * low:.1f} to {100 * high:.1f})"


def difference(prompts: Sequence[Prompt], one: Sequence[int], other: Sequence[int]) -> str:
    """Percent of `one` less that of `other`, the mean of the categories, and its 95% interval; pictures are paired."""
    by_prompt = np.array(one, float) - np.array(other, float)
    groups = [by_prompt[[p.category == category for p in prompts]] for category in CATEGORIES]
    low, high = bootstrap(groups)
    return f"{100 * np.mean([g.mean() for g in groups]):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def shape_table(prompts: Sequence[Prompt], base: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, one way to fine-tune a line, the model as it was first."""
    alone, small, beside = len(asks_alone()), len(base["small"]), len(asks_beside())
    lines = [
        f"Arrows, from {PICTURES} pictures of large {_listed(SHOWN)} ones, asked for in {_listed(ASKED)}: {alone} "
        f"prompts for one arrow, large or of no size, {len(base['alone']) // alone} pictures each; {small} for a small "
        f"one, {beside} for one beside another shape (neither was shown) and {len(prompts)} standing prompts of the "
        "world, one picture each. Percent of pictures that show all that was asked for, with 95% intervals over "
        "prompts; 20 steps of `dpmpp_2m`, scale 4, weight 1.",
        "",
        "| way | steps | seconds | KiB | an arrow | its shape | a small one | beside another shape | the world before "
        "| after | difference | arrows there |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    world = share(base["world"], len(prompts))
    for row in ({"way": "as it was", "steps": 0, "seconds": 0, "size": 0, **base}, *rows):
        change = "-" if row["way"] == "as it was" else difference(prompts, row["world"], base["world"])
        cells = [row["way"], f"{row['steps']}", f"{row['seconds']:.0f}", f"{row['size']:.0f}"]
        cells += [share(row["alone"], alone), share(row["shapes"], alone), share(row["small"], small)]
        cells.append(share(row["beside"], beside))
        cells += [world, share(row["world"], len(prompts)), change, f"{row['false']}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def style_table(row: dict[str, Any]) -> str:
    """Markdown, one weight a line."""
    count = len(asks_large())
    lines = [
        f"Outlined shapes, by a LoRA from {PICTURES} pictures ({row['steps']} steps, {row['seconds']:.0f} seconds, "
        f"{row['size']:.0f} KiB): {count} prompts for large shapes, {len(row['rows'][0]['hollow']) // count} pictures "
        f"each. Of the {PICTURES} pictures {100 * row['examples']:.1f}% is hollow, {100 * row['decoded']:.1f}% once "
        "the VAE has encoded and decoded them.",
        "",
        "| weight | hollow, percent of what is enclosed | outlined as asked for | equal to the base bit for bit |",
        "|---|---|---|---|",
    ]
    for weight in row["rows"]:
        same = f"{weight['identical']} of {len(weight['hollow'])}" if "identical" in weight else "-"
        cells = [f"{weight['weight']:g}", share(weight["hollow"], count), share(weight["right"], count), same]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def through_vae(examples: Sequence[Example]) -> list[Image.Image]:
    """The examples as the model's VAE shows them: no network that learns in its latents can do better."""
    vae = open_model(SHIPPED).model.vae
    with torch.no_grad():
        mean, _ = encode_moments(vae, to_tensor([example.image for example in examples]))
        return to_pictures(decode(vae, mean))


def measure_shape(
    way: Way, work: Path, prompts: Sequence[Prompt], number: int, settings: Sequence[str]
) -> dict[str, Any]:
    examples = [arrow_example(i, way.word, way.shape) for i in range(PICTURES)]
    trained = train(way, work, examples, settings)
    sheet = work / f"{way.key}.png"
    key = weights_key(trained.folder, [prompt.text for prompt in prompts], number)
    found = kept(
        work / "judged" / f"{way.key}-{key}.json",
        lambda: asdict(judge_arrows(trained.folder, way, prompts, number, sheet)),
    )
    return {"way": way.name, "config": way.key, **_told(trained), **found}


def measure_style(work: Path, number: int, settings: Sequence[str]) -> dict[str, Any]:
    examples = [outlined_example(i) for i in range(PICTURES)]
    trained = train(STYLE, work, examples, settings)
    key = weights_key(trained.folder, number)
    found = kept(
        work / "judged" / f"{STYLE.config}-{key}.json",
        lambda: {"rows": judge_style(trained.folder, number, work / f"{STYLE.config}.png")},
    )
    shown = float(np.mean([hollow(example.image) for example in examples]))
    decoded = float(np.mean([hollow(picture) for picture in through_vae(examples)]))
    return {"config": STYLE.config, **_told(trained), "examples": shown, "decoded": decoded, **found}


def _told(trained: Trained) -> dict[str, Any]:
    return {"steps": trained.steps, "seconds": trained.seconds, "size": trained.size}


def main() -> None:
    """Train, judge, print the tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [way.key for way in (*WAYS, STYLE)]
    parser.add_argument("--only", nargs="+", choices=names, metavar="RECIPE", help=f"of {', '.join(names)}")
    parser.add_argument(
        "--quick", action="store_true", help="126 standing prompts, one picture of each prompt for one arrow"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings for every recipe")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "finetune-shapes")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    chosen, work = options.only or names, options.work.resolve()
    prompts, number = standing_prompts(quick=options.quick), 1 if options.quick else 4
    results: dict[str, Any] = {"prompts": len(prompts), "pictures": number, "set": options.set}
    text = "# Fine-tuning\n\n"
    if options.set:
        text += f"With {', '.join(f'`{word}`' for word in options.set)} in every recipe.\n\n"
    if any(way.key in chosen for way in WAYS):
        key = weights_key(SHIPPED, [prompt.text for prompt in prompts], number)
        sheet = work / "base.png"
        base = kept(
            work / "judged" / f"base-{key}.json", lambda: asdict(judge_arrows(SHIPPED, BASE, prompts, number, sheet))
        )
        rows = []
        for way in (way for way in WAYS if way.key in chosen):
            rows.append(measure_shape(way, work, prompts, number, options.set))
            print(shape_table(prompts, base, rows[-1:]).splitlines()[-1], flush=True)
        results |= {"base": base, "shape": rows}
        text += shape_table(prompts, base, rows) + "\n"
    if STYLE.key in chosen:
        results["style"] = measure_style(work, 1 if options.quick else 2, options.set)
        text += style_table(results["style"])
    print(text)
    if options.only is None and not options.quick:
        RESULTS.mkdir(exist_ok=True)
        write_json(RESULTS / "finetune_shapes.json", results)
        write_text(RESULTS / "finetune_shapes.md", text)


if __name__ == "__main__":
    main()
