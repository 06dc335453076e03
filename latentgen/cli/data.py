"""`latentgen data`: look at pictures and captions, pack them, cache them."""

from __future__ import annotations

import os

import typer

from latentgen.cli.data_cache import cache
from latentgen.cli.data_doctor import doctor
from latentgen.cli.data_preview import preview
from latentgen.cli.data_shard import shard
from latentgen.core.log import setup_logging

app = typer.Typer(help="Look at pictures and captions; pack and cache them.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """Look at pictures and captions; pack and cache them."""
    setup_logging(main_process=os.environ.get("RANK", "0") == "0")


app.command()(doctor)
app.command()(preview)
app.command()(shard)
app.command()(cache)
