"""`latentgen train` and `train.py`: train a recipe, or go on with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from latentgen.core.log import setup_logging
from latentgen.recipe.load import load_recipe

DEFAULT = Path("configs/quickstart.yaml")

Config = Annotated[Path | None, typer.Option(help=f"Recipe to train; {DEFAULT} when there is one.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, winning over the recipe.")]
Runs = Annotated[Path, typer.Option(help="Folder of all runs; this one goes to RUNS/NAME.")]
Device = Annotated[str | None, typer.Option(help="cpu: do not use a GPU.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan (recipe, sizes, FLOPs, disk); train nothing.")]


def train(
    overrides: Overrides = None,
    config: Config = None,
    runs: Runs = Path("runs"),
    device: Device = None,
    dry_run: DryRun = False,
) -> None:
    """Train all stages of a recipe into runs/NAME. The same command again continues where it stopped."""
    setup_logging(main_process=os.environ.get("RANK", "0") == "0")
    if config is None and DEFAULT.is_file():
        config = DEFAULT
    recipe = load_recipe(config, overrides or ())
    if dry_run:
        from latentgen.recipe.plan import describe

        typer.echo(describe(recipe))
        return
    from latentgen.recipe.run import train_recipe

    train_recipe(recipe, runs, device)
