"""`latentgen export`: a model in the form that another program opens."""

from __future__ import annotations

import logging
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from latentgen.core.errors import UserError
from latentgen.core.log import setup_logging

logger = logging.getLogger("latentgen.export")


class Format(str, Enum):
    diffusers = "diffusers"
    single_file = "single-file"
    onnx = "onnx"


def export_model(
    source: Annotated[str, typer.Argument(help="Model folder, run folder, or single file.")],
    target: Annotated[Path, typer.Argument(help="What to write: a folder, or for single-file a .safetensors.")],
    format: Annotated[
        Format,
        typer.Option(help="diffusers: a folder. single-file: for ComfyUI, A1111, kohya. onnx: for onnxruntime."),
    ] = Format.single_file,
    dtype: Annotated[
        str | None, typer.Option(help="Store weights as fp32, fp16 or bf16; default: as they are.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="For the model card and the metadata, as all of these:")] = None,
    author: Annotated[str | None, typer.Option(help="Who made it.")] = None,
    description: Annotated[str | None, typer.Option(help="What it is for.")] = None,
    license: Annotated[str | None, typer.Option(help="Name of the license, e.g. apache-2.0.")] = None,
    tags: Annotated[str | None, typer.Option(help="Words to find it by, with commas.")] = None,
    trigger_phrase: Annotated[str | None, typer.Option(help="What a prompt should say.")] = None,
) -> None:
    """Write a model as a diffusers folder, as one file in the original layout, or for ONNX."""
    setup_logging()
    from latentgen.formats.credits import Credits
    from latentgen.formats.folder_parts import write_folder_from
    from latentgen.formats.precision import dtype_of
    from latentgen.formats.single_file.write import write_single_file
    from latentgen.formats.sources import open_source

    stored, parts = dtype_of(dtype), open_source(source)
    credits = Credits(
        title=title,
        author=author,
        description=description,
        license=license,
        tags=tags,
        trigger_phrase=trigger_phrase,
    )
    if format is Format.onnx and credits != Credits():
        raise UserError("--title and what else is said of a model is for folders and single files; ONNX has no card")
    if parts.contrastive is not None and format is not Format.diffusers:
        logger.warning(
            "%s, the contrastive towers, is left out: only a folder has a place for it; keep %s to train on",
            parts.contrastive,
            parts.contrastive.parent,
        )
    if format is Format.single_file:
        write_single_file(parts, target, stored, credits)
    elif format is Format.diffusers:
        write_folder_from(parts, target, stored, credits)
    else:
        from latentgen.formats.onnx import write_onnx

        write_onnx(parts, target, stored)
    typer.echo(target)
