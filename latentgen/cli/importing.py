"""`latentgen import`: a model that people have, as a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentgen.core.errors import UserError
from latentgen.core.log import setup_logging


def import_model(
    source: Annotated[str, typer.Argument(help="Single file, model folder, or org/name of the Hugging Face hub.")],
    target: Annotated[Path, typer.Argument(help="Model folder to write; a .safetensors only converts a pickle.")],
    dtype: Annotated[
        str | None, typer.Option(help="Store weights as fp32, fp16 or bf16; default: as they are.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Open .ckpt, .pt and .bin files too: their tensors, no code.")
    ] = False,
    prediction: Annotated[
        str | None, typer.Option(help="What the U-Net predicts, eps or v, where the file does not say it.")
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="sd1, sd2, sdxl or sdxl-refiner, where the file is taken wrongly.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Model folder with the configurations, tokenizers and networks that lack.")
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Take the averaged weights that the file has besides.")] = False,
    open_clip: Annotated[
        str | None,
        typer.Option(help="The file is open_clip's model of this name (ViT-H-14, ...): take its text tower."),
    ] = None,
) -> None:
    """Make a model folder of a single file, another folder or a repository of the hub."""
    setup_logging()
    from latentgen.formats.folder_parts import write_folder_from
    from latentgen.formats.headers import SUFFIX
    from latentgen.formats.precision import dtype_of
    from latentgen.formats.single_file.read import Wishes
    from latentgen.formats.sources import open_source
    from latentgen.formats.tensor_files import convert_pickle

    stored = dtype_of(dtype)
    if target.suffix == SUFFIX:
        given = {"--dtype": dtype, "--prediction": prediction, "--family": family, "--base": base, "--ema": ema}
        useless = [option for option, value in {**given, "--open-clip": open_clip}.items() if value]
        if useless:
            raise UserError(f"{useless[0]} is for a model folder; {target} is a file: the tensors as they are")
        count = convert_pickle(Path(source), target, allow_pickle=allow_pickle)
        typer.echo(f"{target}: {count} tensors")
        return
    if open_clip is not None:
        from latentgen.formats.open_clip_files import read_open_clip

        parts = read_open_clip(Path(source), open_clip, allow_pickle=allow_pickle)
    else:
        wishes = Wishes(family=family, prediction=prediction, base=base, ema=ema, allow_pickle=allow_pickle)
        parts = open_source(source, wishes)
    write_folder_from(parts, target, stored)
    typer.echo(f"{target}: {', '.join(parts.states)}")
