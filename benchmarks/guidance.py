"""Guidance: the share of right pictures against the number of network evaluations, on the shapes world.

    python benchmarks/guidance.py [--quick] [--pictures 4] [--weak runs/quickstart/model] [--model data/shapes-model]

Every method draws the same prompts with the same seeds; an evaluation is one row of a batch that went through a U-Net,
counted there. The difference from cfg is taken picture by picture, its 95% interval over prompts. `--weak` names the
worse model of autoguidance: one that shares the autoencoder, such as `configs/quickstart.yaml` makes; without it those
rows are left out. Writes benchmarks/results/guidance.{json,md}. A method's 2,880 pictures take about 6 minutes of one
core, all methods an hour and a half; --quick draws 126 pictures a method and writes nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentgen.cli.sample import SHIPPED
from latentgen.core.files import write_json, write_text
from latentgen.core.log import progress
from latentgen.data.sources.shapes_scene import CATEGORIES
from latentgen.evals.shapes_prompts import Prompt, standing_prompts
from latentgen.evals.shapes_report import Report, bootstrap, evaluate
from latentgen.formats.model_folder import Model, load_model
from latentgen.models.autoencoder import factor
from latentgen.models.unet import counted_rows
from latentgen.pipelines.generate import Request, generate

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Method:
    """A way to draw: a name for the table, and what differs from the default request."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a method achieved. `passed`: of every picture, prompt after prompt. `calls`: evaluations a picture."""

    method: Method
    score: float
    calls: float
    passed: list[bool]


METHODS = (
    Method("cfg"),
    Method("cfg, fewer steps", {"num_inference_steps": 14}),
    Method("no guidance", {"guidance_scale": 1.0}),
    Method("interval", {"guidance": ("interval",)}),
    Method("interval, narrower", {"guidance": ("interval,low=0.9,high=3.5",)}),
    Method("adaptive", {"guidance": ("adaptive",)}),
    Method("interval + adaptive", {"guidance": ("interval", "adaptive")}),
    Method("both, narrower", {"guidance": ("interval,low=0.28,high=3.5", "adaptive")}),
    Method("both, fewer steps", {"guidance": ("interval", "adaptive"), "num_inference_steps": 14}),
    Method("rescale", {"guidance": ("rescale",)}),
    Method("apg", {"guidance": ("apg",)}),
    Method("cfg_zero", {"guidance": ("cfg_zero",)}),
    Method("cfgpp", {"guidance": ("cfgpp",), "guidance_scale": 0.6, "sampler": "euler"}),
    Method("pag alone", {"guidance": ("pag,scale=1",), "guidance_scale": 1.0}),
    Method("pag + interval", {"guidance": ("pag,scale=1", "interval")}),
)


def with_weak(folder: Path) -> tuple[Method, ...]:
    """The methods that need a worse model."""
    weak = f"autoguidance,model={folder}"
    return (
        Method("autoguidance", {"guidance": (weak,), "guidance_scale": 2.0}),
        Method("autoguidance, stronger", {"guidance": (weak,)}),
    )


def measure(model: Model, method: Method, prompts: Sequence[Prompt], pictures: int) -> Outcome:
    """Draw and judge `pictures` pictures of every prompt."""
    side = int(model.unet.config["sample_size"]) * factor(model.vae)
    steps = Request("", **method.changes).num_inference_steps
    with counted_rows() as rows, progress(method.name, "step", total=len(prompts) * pictures * steps) as bar:

        def draw(texts: list[str], seeds: list[int]) -> list[Image.Image]:
            requests = [
                Request(text, seed=seed, height=side, width=side, **method.changes)
                for text, seed in zip(texts, seeds, strict=True)
            ]
            return list(generate(model, requests, batch_size=32, on_step=bar.update))

        report: Report = evaluate(draw, prompts, pictures_per_prompt=pictures)
    passed = [outcome.ok for outcome in report.outcomes]
    return Outcome(method, report.score, rows.count / len(passed), passed)


def difference(prompts: Sequence[Prompt], one: Outcome, other: Outcome) -> tuple[float, float, float]:
    """Score of `one` less that of `other`, and the 95% interval: pictures are paired, prompts resampled."""
    by_prompt = (np.array(one.passed, float) - np.array(other.passed, float)).reshape(len(prompts), -1).mean(1)
    groups = [by_prompt[[p.category == category for p in prompts]] for category in CATEGORIES]
    return float(np.mean([group.mean() for group in groups])), *bootstrap(groups)


def table(prompts: Sequence[Prompt], outcomes: Sequence[Outcome]) -> str:
    """Markdown, one method a line; the first is what the others are compared with."""
    base = outcomes[0]
    lines = [
        f"{len(prompts)} prompts, {len(base.passed) // len(prompts)} pictures each; default sampler, steps and scale "
        "where nothing else is said. Score and differences in percent, with 95% intervals over prompts.",
        "",
        "| method | settings | score | calls a picture | calls saved | score less that of cfg |",
        "|---|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        settings = ", ".join(f"{key} {_shown(value)}" for key, value in outcome.method.changes.items()) or "-"
        mean, low, high = (100 * value for value in difference(prompts, outcome, base))
        paired = "-" if outcome is base else f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
        lines.append(
            f"| {outcome.method.name} | {settings} | {100 * outcome.score:.1f} | {outcome.calls:.1f} | "
            f"{100 * (1 - outcome.calls / base.calls):.0f}% | {paired} |"
        )
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


def main() -> None:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--weak", type=Path, help="folder of a worse model, for autoguidance")
    parser.add_argument("--pictures", type=int, default=4, help="of each prompt")
    parser.add_argument("--quick", action="store_true", help="126 prompts, one picture each, written nowhere")
    options = parser.parse_args()
    model = load_model(options.model)
    prompts = standing_prompts(quick=options.quick)
    pictures = 1 if options.quick else options.pictures
    methods = METHODS if options.weak is None else (*METHODS, *with_weak(options.weak))
    outcomes = [measure(model, method, prompts, pictures) for method in methods]
    print(table(prompts, outcomes), end="")
    if options.weak is None:
        print("\nautoguidance is left out: name a worse model with --weak")
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        rows = [
            {
                **asdict(outcome),
                "saved": 1 - outcome.calls / outcomes[0].calls,
                "difference": difference(prompts, outcome, outcomes[0]),
            }
            for outcome in outcomes
        ]
        content = {"model": options.model.name, "prompts": [p.text for p in prompts], "outcomes": rows}
        write_json(RESULTS / "guidance.json", content)
        write_text(RESULTS / "guidance.md", "# Guidance\n\n" + table(prompts, outcomes))


if __name__ == "__main__":
    main()
