"""`latentgen info`: what a file or a folder is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from latentgen.core.log import setup_logging


def info(
    path: Annotated[Path, typer.Argument(help="A .safetensors file or a model folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it for programs.")] = False,
    hashes: Annotated[bool, typer.Option(help="Compute the hashes, which reads every byte.")] = True,
) -> None:
    """Say what a file holds: which family, parameters, precision, hashes, what it was trained with."""
    setup_logging()
    from latentgen.formats.info import describe, shown

    described = describe(path, hashes=hashes)
    typer.echo(json.dumps(described, indent=2, ensure_ascii=False) if as_json else shown(described))
