"""`latentgen data preview`: pictures and captions as training would show them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentgen.cli.data_shard import kind_of


def preview(
    source: Annotated[
        str | None, typer.Argument(help="Folder of pictures, table, shards, data set, or recipe (.yaml).")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    config: Annotated[Path | None, typer.Option(help="Recipe; SOURCE is read as its section `data` says.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the U-Net's stage, a row each.")] = 3,
    num: Annotated[int, typer.Option(min=1, help="Examples of a step, at most.")] = 8,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("preview.png"),
) -> None:
    """Draw the first examples of a run as training shows them: cut, mirrored, masked, their captions drawn."""
    from latentgen.pipelines.pictures import save_png
    from latentgen.recipe.load import load_recipe
    from latentgen.recipe.looking import cards, sheet

    words = list(overrides or ())
    if source is not None and source.endswith((".yaml", ".yml")):
        config = Path(source)
    elif source is not None and "=" in source and not Path(source).exists():
        words = [source, *words]
    elif source is not None:
        words = [f"data.source={kind_of(source)}", f"data.path={source}", *words]
    found = cards(load_recipe(config, words), steps, num)
    save_png(sheet(found), out)
    typer.echo(f"{out}: {sum(map(len, found))} examples of {steps} steps")
