"""`latentgen data shard`: pictures and captions of any source, written as tar shards."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Annotated

import typer

from latentgen.core.errors import UserError

logger = logging.getLogger("latentgen.data")

_UNITS = {"": 1, "k": 10**3, "ki": 2**10, "m": 10**6, "mi": 2**20, "g": 10**9, "gi": 2**30}
_SHOWN = 10


def shard(
    source: Annotated[str, typer.Argument(help="Folder of pictures, table, shards, data set, or recipe (.yaml).")],
    target: Annotated[Path, typer.Argument(help="Folder to write the shards into.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="data.key=value, such as data.caption_columns.")] = None,
    size: Annotated[str, typer.Option(help="Of a shard, at most.")] = "256MiB",
    name: Annotated[str, typer.Option(help="Shards are called NAME-00000.tar and so on.")] = "train",
    config: Annotated[Path | None, typer.Option(help="Recipe whose section `data` says how SOURCE is read.")] = None,
) -> None:
    """Write pictures and captions as WebDataset shards, an index beside each. The same command goes on after a stop."""
    from latentgen.core.files import write_json
    from latentgen.data.sources.shard_writer import write_shards
    from latentgen.recipe.load import load_recipe
    from latentgen.recipe.sources import stores_of

    words = list(overrides or ())
    if source.endswith((".yaml", ".yml")):
        config = Path(source)
    else:
        words = [f"data.source={kind_of(source)}", f"data.path={source}", *words]
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UserError(f"--name {name}: use letters, digits, - and _")
    data = load_recipe(config, words).data
    stores = stores_of(data)
    written = write_shards(stores, target, name=name, size=bytes_of(size), max_pixels=data.max_pixels)
    for what, reason in written.skipped[:_SHOWN]:
        logger.warning("left out %s: %s", what, reason)
    if written.skipped:
        write_json(target / "skipped.json", dict(written.skipped))
    typer.echo(
        f"{target}: {len(written.shards)} shards, {written.examples} pictures, {written.bytes / 2**20:.1f} MiB"
        + (f"; {len(written.skipped)} left out, see {target / 'skipped.json'}" if written.skipped else "")
    )


def kind_of(source: str) -> str:
    """What `data.source` is meant by a path."""
    path = Path(source)
    if source.endswith((".csv", ".jsonl", ".parquet")):
        return "table"
    if ".tar" in path.name or (path.is_dir() and any(path.glob("*.tar"))):
        return "shards"
    return "folder" if path.exists() else "datasets"


def bytes_of(text: str) -> int:
    """ "256MiB" -> 268435456. Raises `UserError`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", text.strip().lower())
    if found is None or not (size := int(float(found[1]) * _UNITS[found[2] or ""])):
        raise UserError(f"--size {text}: write a size such as 256MiB")
    return size
