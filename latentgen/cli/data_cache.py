"""`latentgen data cache`: latents and text states of a recipe, made alone, checked, packed, unpacked and pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentgen.core.errors import UserError


def cache(
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    config: Annotated[Path | None, typer.Option(help="Recipe whose U-Net is to be trained.")] = None,
    runs: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    device: Annotated[str | None, typer.Option(help="cpu: do not use a GPU.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read all caches there are, and compare.")] = False,
    pack: Annotated[str | None, typer.Option(help="Folder or address to write the recipe's caches to.")] = None,
    unpack: Annotated[str | None, typer.Option(help="Folder or address to bring packed caches from.")] = None,
    prune: Annotated[float | None, typer.Option(help="Remove caches that were not used for so many days.")] = None,
) -> None:
    """Make the caches that training the U-Net of a recipe reads, so that training finds them there."""
    from latentgen.recipe.load import load_recipe

    if sum((verify, pack is not None, unpack is not None, prune is not None)) > 1:
        raise UserError("--verify, --pack, --unpack and --prune are jobs of their own; ask for one")
    recipe = load_recipe(config, overrides or ())
    folder = Path(recipe.data.cache)
    if verify:
        _verify(folder)
    elif unpack is not None:
        from latentgen.data.cache_pack import unpack as bring

        came = bring(unpack, folder)
        typer.echo(f"{folder}: {len(came)} caches came from {unpack}")
    elif prune is not None:
        from latentgen.data.cache import prune as remove

        for path, size in remove(folder, prune):
            typer.echo(f"removed {path} ({size / 2**20:.1f} MiB)")
    else:
        from latentgen.recipe.run import make_caches

        made = make_caches(recipe, runs, device)
        typer.echo("\n".join(str(path) for path in made))
        if pack is not None:
            from latentgen.data.cache_pack import pack as write

            size = write(made, pack)
            typer.echo(f"{pack}: {len(made)} caches, {size / 2**20:.1f} MiB")


def _verify(folder: Path) -> None:
    from latentgen.data.cache import verify as check
    from latentgen.data.cache_entries import DONE

    found = sorted(path.parent for path in folder.glob(f"*/*/{DONE}"))
    wrong = [reason for reason in map(check, found) if reason is not None]
    for reason in wrong:
        typer.echo(reason)
    if wrong:
        raise UserError(f"{folder}: {len(wrong)} of {len(found)} caches are damaged")
    typer.echo(f"{folder}: {len(found)} caches are as they were written")
