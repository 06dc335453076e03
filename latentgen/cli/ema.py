"""`latentgen ema`: a run's averaged weights, of any length, as a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentgen.core.errors import UserError
from latentgen.core.log import setup_logging
from latentgen.core.runfolder import newest_with_averages


def ema(
    length: Annotated[float, typer.Option(help="Of the average, relative to the run: 0.05 is short, 0.20 long.")],
    run: Annotated[
        Path | None,
        typer.Argument(help="Folder of a run trained with train.ema_lengths; default: the newest one in runs."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Model folder to write; default: model-STAGE-LENGTH in the run's.")
    ] = None,
    stage: Annotated[str, typer.Option(help="Whose network: unet, vae or clip.")] = "unet",
    step: Annotated[int | None, typer.Option(help="A step with a snapshot; default: the last.")] = None,
) -> None:
    """Write the model whose network is the average of another length, made from the run's snapshots."""
    setup_logging()
    from latentgen.recipe.averages import export_average

    run = run or newest_with_averages(Path("runs"), stage)
    if run is None:
        raise UserError(f"runs: no run has averages of {stage}; name one, or train with train.ema_lengths=[0.05,0.10]")
    out = out or run / f"model-{stage}-{length}"
    folder, found = export_average(run, length, out, stage=stage, step=step)
    typer.echo(
        f"{folder}: {stage} averaged over length {length} up to step {found.step}; "
        f"{100 * found.fit.residual:.2g}% of the profile is not met"
    )
