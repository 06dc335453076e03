"""`latentgen recipe`: show and check recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentgen.core.files import write_text
from latentgen.recipe.load import dump_recipe, load_recipe, recipe_schema

app = typer.Typer(help="Show and check recipes.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def schema(out: Annotated[Path | None, typer.Option(help="File to write; default: standard output.")] = None) -> None:
    """Write the JSON schema that editors complete recipes from."""
    if out is None:
        typer.echo(recipe_schema(), nl=False)
    else:
        write_text(out, recipe_schema())


@app.command()
def show(
    config: Annotated[Path | None, typer.Argument(help="Recipe; none shows the defaults.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
) -> None:
    """Print a recipe with every default spelled out."""
    typer.echo(dump_recipe(load_recipe(config, overrides or ())), nl=False)
