"""Guidance: the share of right pictures against the number of network evaluations, on the shapes world.

    python benchmarks/guidance.py [--quick] [--pictures 4] [--weak runs/quickstart/model] [--model data/shapes-model]

Every way to guide draws the same prompts with the same seeds, the main ones with several numbers of steps; a call is
one row of a batch that went through a U-Net, counted there. The difference from cfg with the usual steps is taken
picture by picture, its 95% interval over prompts. `--weak` names the worse model of autoguidance: one that shares the
autoencoder, such as `configs/quickstart.yaml` makes; without it those rows are left out.

Writes benchmarks/results/guidance.{json,md}, docs/images/guidance.png and the table of docs/guidance.md. 2,880 pictures
with 20 steps of cfg take about 6 minutes of one core, everything an hour and a half; what was drawn is kept in --cache.
--quick draws 126 pictures each and writes nothing; --only NAME... leaves out the others and writes nothing either.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from plots import Line, line_chart

from latentgen.cli.sample import SHIPPED
from latentgen.core.files import content_key, file_sha256, write_json, write_text
from latentgen.core.log import progress
from latentgen.data.sources.shapes_scene import CATEGORIES
from latentgen.evals.shapes_prompts import Prompt, standing_prompts
from latentgen.evals.shapes_report import Report, bootstrap, evaluate
from latentgen.formats.model import Model
from latentgen.formats.model_folder import load_model
from latentgen.models.autoencoder import factor
from latentgen.models.unet import counted_rows
from latentgen.pipelines.generate import Request, generate

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs" / "guidance.md"
PLOT = ROOT / "docs" / "images" / "guidance.png"
STEPS = (20, 14, 10)


@dataclass(frozen=True)
class Method:
    """A way to draw: a name for the table, the steps, and what else differs from plain cfg."""

    name: str
    steps: int
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a method achieved. right: of each prompt's pictures, in the order of the prompts. calls: a picture."""

    method: Method
    score: float
    calls: float
    right: list[int]


CURVES: dict[str, dict[str, Any]] = {
    "cfg": {},
    "interval": {"guidance": ("interval,low=0.45,high=5.42",)},
    "adaptive": {"guidance": ("adaptive",)},
    "interval + adaptive": {"guidance": ("interval,low=0.45,high=5.42", "adaptive")},
}
"""Drawn with each number of steps of STEPS."""

OTHERS: dict[str, dict[str, Any]] = {
    "no guidance": {"guidance_scale": 1.0},
    "apg": {"guidance": ("apg",)},
}
"""Drawn with the first number of steps."""


def methods(weak: Path | None) -> list[Method]:
    """What is measured, cfg with the most steps first; autoguidance only with a worse model."""
    curves = dict(CURVES)
    if weak is not None:
        curves["autoguidance"] = {"guidance": (f"autoguidance,model={weak}",), "guidance_scale": 2.0}
    found = [Method(name, steps, changes) for name, changes in curves.items() for steps in STEPS]
    return [*found, *(Method(name, STEPS[0], changes) for name, changes in OTHERS.items())]


def measure(model: Model, method: Method, prompts: Sequence[Prompt], pictures: int) -> Outcome:
    """Draw and judge `pictures` pictures of every prompt."""
    side = int(model.unet.config["sample_size"]) * factor(model.vae)
    total = len(prompts) * pictures * method.steps
    with counted_rows() as rows, progress(f"{method.name}, {method.steps} steps", "step", total=total) as bar:

        def draw(texts: list[str], seeds: list[int]) -> list[Image.Image]:
            requests = [
                Request(text, seed=seed, height=side, width=side, num_inference_steps=method.steps, **method.changes)
                for text, seed in zip(texts, seeds, strict=True)
            ]
            return list(generate(model, requests, batch_size=32, on_step=bar.update))

        report: Report = evaluate(draw, prompts, pictures_per_prompt=pictures)
    passed = np.array([outcome.ok for outcome in report.outcomes]).reshape(len(prompts), pictures)
    return Outcome(method, report.score, rows.count / passed.size, passed.sum(1).tolist())


def kept(cache: Path, model: Path, method: Method, prompts: Sequence[Prompt], pictures: int) -> Path:
    """Where the outcome of a method lies, once measured with these weights."""
    guides = [g.partition("model=")[2] for g in method.changes.get("guidance", ()) if "model=" in g]
    weights = [path for folder in (model, *map(Path, guides)) for path in sorted(folder.glob("*/*.safetensors"))]
    usual = Request("", num_inference_steps=method.steps, **method.changes)
    key = {
        "weights": [file_sha256(path) for path in weights],
        "request": {k: str(v) for k, v in asdict(usual).items() if k not in ("prompt", "seed", "height", "width")},
        "prompts": [prompt.text for prompt in prompts],
        "pictures": pictures,
    }
    return cache / f"{content_key(key)[:16]}.json"


def difference(prompts: Sequence[Prompt], one: Outcome, other: Outcome, pictures: int) -> tuple[float, float, float]:
    """Score of `one` less that of `other`, and the 95% interval: pictures are paired, prompts resampled."""
    by_prompt = (np.array(one.right, float) - np.array(other.right, float)) / pictures
    groups = [by_prompt[[p.category == category for p in prompts]] for category in CATEGORIES]
    return float(np.mean([group.mean() for group in groups])), *bootstrap(groups)


def table(prompts: Sequence[Prompt], outcomes: Sequence[Outcome], pictures: int) -> str:
    """Markdown, one method a line; the first is what the others are compared with."""
    base, usual = outcomes[0], Request("")
    lines = [
        f"{len(prompts)} prompts, {pictures} pictures each; `{usual.sampler}` and scale {usual.guidance_scale:g} where "
        "nothing else is said. Score and differences in percent, with 95% intervals over prompts. **Bold**: fewer "
        "calls, and an interval that holds 0.",
        "",
        "| guidance | settings | steps | calls a picture | saved | score | less that of the first |",
        "|---|---|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        settings = ", ".join(f"{key} {_shown(value)}" for key, value in outcome.method.changes.items()) or "-"
        mean, low, high = (100 * value for value in difference(prompts, outcome, base, pictures))
        paired = "-" if outcome is base else f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
        equal = low <= 0 <= high and outcome.calls < base.calls
        lines.append(
            f"| {outcome.method.name} | {settings} | {outcome.method.steps} | {outcome.calls:.1f} | "
            f"{100 * (1 - outcome.calls / base.calls):.0f}% | {100 * outcome.score:.1f} | "
            f"{f'**{paired}**' if equal else paired} |"
        )
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    """Settings as a user writes them, without the way to a folder."""
    return " ".join(map(_shown, value)) if isinstance(value, tuple) else str(value).partition(",model=")[0]


def write(model: Path, prompts: Sequence[Prompt], outcomes: Sequence[Outcome], pictures: int) -> None:
    """The results, the plot, and the table in the documentation."""
    RESULTS.mkdir(exist_ok=True)
    rows = []
    for outcome in outcomes:
        row = asdict(outcome)
        row["method"]["changes"] = {key: _shown(value) for key, value in outcome.method.changes.items()}
        rows.append({**row, "difference": difference(prompts, outcome, outcomes[0], pictures)})
    content = {"model": model.name, "pictures": pictures, "prompts": [p.text for p in prompts], "outcomes": rows}
    write_json(RESULTS / "guidance.json", content)
    text = table(prompts, outcomes, pictures)
    write_text(RESULTS / "guidance.md", "# Guidance\n\n" + text)
    names = list(dict.fromkeys(outcome.method.name for outcome in outcomes))
    by_name = {name: [(o.calls, 100 * o.score) for o in outcomes if o.method.name == name] for name in names}
    lines = [Line(name, sorted(points), name == "cfg") for name, points in by_name.items() if len(points) > 1]
    line_chart(PLOT, "Shapes score", "network calls a picture", "right pictures, percent", lines)
    begin, end = "<!-- results -->", "<!-- end results -->"
    before, rest = DOCS.read_text(encoding="utf-8").split(begin)
    write_text(DOCS, f"{before}{begin}\n{text}{end}{rest.split(end)[1]}")


def main() -> None:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--weak", type=Path, help="folder of a worse model, for autoguidance")
    parser.add_argument("--pictures", type=int, default=4, help="of each prompt")
    parser.add_argument("--quick", action="store_true", help="126 prompts, one picture each, written nowhere")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the ways to guide; written nowhere")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / ".cache" / "guidance")
    options = parser.parse_args()
    model = load_model(options.model)
    prompts = standing_prompts(quick=options.quick)
    pictures = 1 if options.quick else options.pictures
    outcomes = []
    for method in methods(options.weak):
        if options.only is not None and method.name not in options.only:
            continue
        path = kept(options.cache, options.model, method, prompts, pictures)
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            outcome = Outcome(method, found["score"], found["calls"], found["right"])
        else:
            outcome = measure(model, method, prompts, pictures)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, asdict(outcome))
        outcomes.append(outcome)
        print(table(prompts, [outcomes[0], outcome], pictures).splitlines()[-1], flush=True)
    print("\n" + table(prompts, outcomes, pictures), end="")
    if options.weak is None:
        print("\nautoguidance is left out: name a worse model with --weak")
    if not options.quick and options.only is None:
        write(options.model, prompts, outcomes, pictures)


if __name__ == "__main__":
    main()
