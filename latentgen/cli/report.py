"""`latentgen report`: one page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="Run folder, finished or not: runs/NAME.")],
    out: Annotated[Path | None, typer.Option(help="File to write; default: report.html in the run folder.")] = None,
) -> None:
    """Make runs/NAME/report.html anew from what the run folder holds."""
    from latentgen.evals.run_report import write_report

    typer.echo(write_report(run, out))
