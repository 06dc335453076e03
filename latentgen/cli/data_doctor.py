"""`latentgen data doctor`: what is wrong with a set of pictures, before anything is trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentgen.cli.data_shard import kind_of
from latentgen.core.errors import UserError

_SHOWN = 3


def doctor(
    source: Annotated[str, typer.Argument(help="Folder of pictures, table, shards or data set.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    against: Annotated[str | None, typer.Option(help="Pictures that it is validated on.")] = None,
    config: Annotated[Path | None, typer.Option(help="Recipe: resolution, buckets, text encoder.")] = None,
    clip: Annotated[Path | None, typer.Option(help="Model folder whose CLIP says which captions do not fit.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for doctor.json and doctor.html.")] = Path("doctor"),
    fix: Annotated[Path | None, typer.Option(help="Write a table (.jsonl) of what is sound.")] = None,
) -> None:
    """Examine pictures and captions. Exit code 1 when there are errors; the pictures are never touched."""
    from latentgen.core.files import write_json, write_text
    from latentgen.data.doctor.page import as_json, as_page, counts, examine
    from latentgen.recipe.doctoring import case_of, write_clean
    from latentgen.recipe.load import load_recipe

    if fix is not None and fix.suffix != ".jsonl":
        raise UserError(f"--fix {fix}: name a file that ends with .jsonl")
    kind = kind_of(source)
    words = [f"data.source={kind}", f"data.path={source}", *(["data.split=null"] if kind == "folder" else [])]
    case = case_of(load_recipe(config, [*words, *(overrides or ())]), against, clip)
    findings, pictures = examine(case.patient), len(case.patient.looked)
    write_json(out / "doctor.json", as_json(source, pictures, findings))
    write_text(out / "doctor.html", as_page(source, pictures, findings))
    for finding in findings:
        typer.echo(f"{finding.severity}: {finding.kind}, {len(finding.troubles)}")
        for trouble in finding.troubles[:_SHOWN]:
            typer.echo(f"    {' = '.join(trouble.names[:3])}: {trouble.why}")
    typer.echo(f"{pictures} pictures; {out / 'doctor.html'}")
    if fix is not None:
        typer.echo(f"{fix}: {write_clean(case, findings, fix)} pictures")
    if counts(findings)["error"]:
        raise typer.Exit(1)
