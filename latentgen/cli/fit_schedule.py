"""`latentgen fit-schedule`: find the noise levels at which a model needs the fewest steps."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from latentgen.cli.sample import find_model, read_prompts
from latentgen.core.errors import UserError
from latentgen.core.log import setup_logging

logger = logging.getLogger("latentgen.fit_schedule")


def fit_schedule(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="What to draw while fitting; default: the recipe's preview prompts.")
    ] = None,
    prompts_file: Annotated[Path | None, typer.Option("--prompts", help="File with one prompt a line.")] = None,
    model: Annotated[Path | None, typer.Option(help="Model folder; default: the newest run.")] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps to fit for.")] = 8,
    sampler: Annotated[str, typer.Option(help="A sampler without noise: NAME[,key=value]...")] = "dpmpp_2m",
    guidance_scale: Annotated[float, typer.Option(help="The guidance scale to fit for.")] = 4.0,
    guidance: Annotated[
        list[str] | None, typer.Option(help="The guidance to fit for: NAME[,key=value]..., as in `latentgen sample`.")
    ] = None,
    num: Annotated[int, typer.Option(help="Pictures to fit to; the prompts take turns.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the first picture.")] = 10_000,
    reference_steps: Annotated[int, typer.Option(help="Steps that stand for infinitely many.")] = 100,
    rounds: Annotated[int, typer.Option(help="Improvements at most.")] = 12,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; default: a GPU when there is one.")] = None,
    runs: Annotated[Path, typer.Option(help="Where to look for the newest run.")] = Path("runs"),
) -> None:
    """Fit a schedule for one sampler and number of steps into the model folder; `--schedule fitted` draws with it."""
    setup_logging()
    if num < 1:
        raise UserError(f"--num {num}: must be at least 1")
    folder = model or find_model(runs)
    from latentgen.cli.drawing import default_side, open_here
    from latentgen.diffusion.guidance import canonical as canonical_guidance
    from latentgen.diffusion.samplers import canonical, resolve
    from latentgen.formats.fitted_schedules import write_fitted
    from latentgen.pipelines.fit_schedule import fit_schedule as find_schedule
    from latentgen.pipelines.generate import Request

    opened = open_here(folder, device)
    shown = opened.model.metadata.get("recipe", {}).get("preview", {}).get("prompts", [])
    wanted = read_prompts(prompts or ([] if prompts_file else list(shown)), prompts_file)
    side, name, (_, implied) = default_side(opened.model), canonical(sampler), resolve(sampler)
    if implied is not None:
        raise UserError(f"--sampler {sampler}: the schedule is what will be fitted; leave {implied!r} out of the name")
    requests = [
        Request(
            wanted[i % len(wanted)],
            seed=seed + i,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            guidance=tuple(guidance or ()),
            sampler=name,
            height=side,
            width=side,
        )
        for i in range(num)
    ]
    fit = find_schedule(
        opened.model,
        requests,
        reference_steps=reference_steps,
        rounds=rounds,
        on_round=lambda number, error: logger.info("round %d: error %.4g", number + 1, error),
    )
    write_fitted(
        folder,
        {
            "sampler": name,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "guidance": list(canonical_guidance(guidance or ())),
            "sigmas": fit.sigmas.tolist(),
            "error": fit.error,
            "start": fit.start,
            "start_error": fit.start_error,
        },
    )
    typer.echo(f"error {fit.error:.4g}; the best unfitted schedule, {fit.start}: {fit.start_error:.4g}")
    same = "".join(f" --guidance {text}" for text in guidance or ())
    with_scale = f" --guidance-scale {guidance_scale:g}" if guidance_scale != 4.0 else ""
    typer.echo(f"kept in {folder}; draw with: --sampler {name} --steps {steps} --schedule fitted{with_scale}{same}")
