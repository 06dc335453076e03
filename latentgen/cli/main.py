"""The `latentgen` command: one verb per job."""

from __future__ import annotations

import typer

from latentgen.cli import data, evaluate, lora, recipe
from latentgen.cli.ema import ema
from latentgen.cli.errors import run_app
from latentgen.cli.exporting import export_model
from latentgen.cli.fit_schedule import fit_schedule
from latentgen.cli.importing import import_model
from latentgen.cli.info import info
from latentgen.cli.report import report
from latentgen.cli.sample import sample
from latentgen.cli.train import train

app = typer.Typer(
    help="Train, fine-tune and sample text-to-image latent diffusion models.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(train)
app.command()(sample)
app.command()(report)
app.command()(fit_schedule)
app.command()(ema)
app.command("import")(import_model)
app.command("export")(export_model)
app.command()(info)
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(recipe.app, name="recipe")
app.add_typer(lora.app, name="lora")
app.add_typer(data.app, name="data")


def run() -> None:
    """Entry point of the `latentgen` command."""
    run_app(app)


def run_verb(verb: str) -> None:
    """Entry point of the top-level scripts: the same options as `latentgen VERB`."""
    single = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
    single.command()({"train": train, "sample": sample}[verb])
    run_app(single)
