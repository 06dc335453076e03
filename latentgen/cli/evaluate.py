"""`latentgen evaluate`: measure what a model draws."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from latentgen.cli.sample import find_model
from latentgen.core.log import progress, setup_logging

logger = logging.getLogger("latentgen.evaluate")

app = typer.Typer(help="Measure what a model draws.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def evaluate() -> None:
    """Measure what a model draws."""


@app.command()
def shapes(
    model: Annotated[Path | None, typer.Option(help="Model folder; default: the newest run.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A sixth of the prompts.")] = False,
    num: Annotated[int, typer.Option(help="Pictures a prompt.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the first picture of each prompt.")] = 0,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    guidance_scale: Annotated[float, typer.Option(help="How hard the prompt is followed.")] = 4.0,
    guidance: Annotated[
        list[str] | None, typer.Option(help="How to guide: NAME[,key=value]..., as in `latentgen sample`.")
    ] = None,
    sampler: Annotated[str, typer.Option(help="As in `latentgen sample`.")] = "dpmpp_2m",
    schedule: Annotated[str | None, typer.Option(help="As in `latentgen sample`.")] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures drawn together.")] = 32,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; default: a GPU when there is one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report; default: beside the model folder.")] = None,
    runs: Annotated[Path, typer.Option(help="Where to look for the newest run.")] = Path("runs"),
) -> None:
    """Draw the standing prompts of the shapes world and judge every picture exactly."""
    setup_logging()
    folder = model or find_model(runs)
    from latentgen.cli.drawing import default_side, open_here
    from latentgen.evals import shapes_prompts, shapes_report
    from latentgen.pipelines.generate import Request, check, generate, remarks, steps_of

    opened = open_here(folder, device)
    prompts = shapes_prompts.standing_prompts(quick=quick)
    side = default_side(opened.model)

    def request(text: str, own: int) -> Request:
        return Request(
            text,
            seed=own,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            guidance=tuple(guidance or ()),
            sampler=sampler,
            schedule=schedule,
            height=side,
            width=side,
        )

    example = request("", seed)
    check(example, opened.model)
    for line in remarks(example, opened.model):
        logger.warning("%s", line)
    with progress("drawing", "step", total=steps_of([example] * (len(prompts) * num))) as bar:

        def draw(texts: list[str], seeds: list[int]) -> list[Image.Image]:
            requests = [request(text, own) for text, own in zip(texts, seeds, strict=True)]
            return list(generate(opened.model, requests, batch_size=batch_size, on_step=lambda n: bar.update(n)))

        report = shapes_report.evaluate(draw, prompts, pictures_per_prompt=num, seed=seed)
    target = out or folder.resolve().parent / "shapes-score"
    shapes_report.write(report, target)
    typer.echo((target / "shapes.md").read_text(), nl=False)
