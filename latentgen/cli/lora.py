"""`latentgen lora`: LoRA files looked at, converted, merged, extracted, resized and combined."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from latentgen.core.errors import UserError
from latentgen.core.log import setup_logging

if TYPE_CHECKING:
    from torch import nn

    from latentgen.formats.lora.file import LoraFile
    from latentgen.formats.model_folder import Model

app = typer.Typer(help="Look at LoRA files, and make others of them.", no_args_is_help=True, rich_markup_mode=None)

Out = Annotated[Path, typer.Option(help="What to write.")]
Layout = Annotated[
    Literal["kohya", "comfyui", "diffusers"] | None,
    typer.Option(help="How keys are called; default: as in the source, kohya where it cannot be written."),
]
For = Annotated[Path | None, typer.Option("--model", help="Model folder that it is for; default: the file's family.")]
Dtype = Annotated[Literal["fp32", "fp16", "bf16"] | None, typer.Option(help="Type to store; default: as it is.")]


@app.callback()
def lora() -> None:
    """Look at LoRA files, and make others of them."""
    setup_logging()


@app.command()
def info(
    file: Annotated[Path, typer.Argument(help="A LoRA file.")],
    model: For = None,
) -> None:
    """Say what a LoRA file is: layout, family, what it adapts, how it was made."""
    from latentgen.formats.lora.families import family_of
    from latentgen.formats.original.layouts import TITLES

    opened = _read(file, model)
    family = family_of(opened.modules)
    typer.echo(f"layout: {opened.layout}")
    typer.echo(f"made for: {TITLES[family] if family is not None else 'a family that is not known'}")
    for network, own in opened.modules.items():
        sorts = Counter(factors.kind if factors.linear else f"{factors.kind} with DoRA" for factors in own.values())
        ranks = Counter(factors.rank for factors in own.values())
        scales = Counter(f"{factors.scale:.4g}" for factors in own.values())
        types = Counter(
            str(t.dtype).removeprefix("torch.") for factors in own.values() for t in factors.tensors.values()
        )
        typer.echo(f"{network}: {_counted(sorts)}; rank {_counted(ranks)}; scale {_counted(scales)}; {_counted(types)}")
    for key, value in sorted(opened.metadata.items()):
        typer.echo(f"{key}: {value if len(value) <= 200 else value[:197] + '...'}")


def _counted(counts: Counter[Any]) -> str:
    """ "32" where there is one, else "32 (x 12), 16 (x 3)"."""
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{value} (x {count})" for value, count in counts.most_common())


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A LoRA file, in any layout.")],
    out: Out,
    layout: Annotated[Literal["kohya", "comfyui", "diffusers"], typer.Option(help="How keys are to be called.")],
    model: For = None,
    dtype: Dtype = None,
) -> None:
    """Write a LoRA file in another layout or type; the change that it makes stays the same."""
    _write(_read(source, model), out, layout, model, dtype)


@app.command()
def merge(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    loras: Annotated[list[str], typer.Argument(help="LoRA files, each as FILE or FILE:WEIGHT.", metavar="LORA...")],
    out: Annotated[Path, typer.Option(help="Model folder to write.")],
    dtype: Annotated[Literal["fp32", "fp16", "bf16"], typer.Option(help="Type to store.")] = "fp32",
) -> None:
    """Add LoRAs to a model's weights, and write the model that this makes."""
    from latentgen.formats.lora.apply import merge as merge_into
    from latentgen.formats.lora.file import read_lora
    from latentgen.formats.model_folder import load_model, save_model

    chosen = [weighted(lora) for lora in loras]
    opened = load_model(model)
    networks = _networks(opened)
    for path, weight in chosen:
        merge_into(networks, read_lora(path, networks), weight)
    save_model(opened, out, _dtype(dtype))
    typer.echo(f"{out}: {model} with {', '.join(f'{path} x {weight:g}' for path, weight in chosen)}")


@app.command()
def extract(
    base: Annotated[Path, typer.Argument(help="Folder of the model before.")],
    tuned: Annotated[Path, typer.Argument(help="Folder of the model after.")],
    out: Out,
    rank: Annotated[int, typer.Option(help="Of linear layers and 1x1 convolutions.")] = 32,
    conv_rank: Annotated[int | None, typer.Option(help="Of larger convolutions, 0: none; default: as --rank.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Keep only ranks that hold this part of the squared change.")
    ] = None,
    clamp: Annotated[float | None, typer.Option(help="Cut entries off above this quantile, such as 0.99.")] = None,
    layout: Layout = None,
    dtype: Dtype = None,
) -> None:
    """Find the LoRA that turns one model into the other, as nearly as its rank allows."""
    from latentgen.formats.lora.change import extract as difference
    from latentgen.formats.model_folder import load_model

    networks = _networks(load_model(base))
    found = difference(networks, _networks(load_model(tuned)), rank, conv_rank, energy=energy, clamp=clamp)
    _write(found, out, layout, base, dtype)


@app.command()
def resize(
    source: Annotated[Path, typer.Argument(help="A LoRA file.")],
    out: Out,
    rank: Annotated[int | None, typer.Option(help="The most that a module may have.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Keep only ranks that hold this part of the squared change.")
    ] = None,
    layout: Layout = None,
    model: For = None,
    dtype: Dtype = None,
) -> None:
    """Write a LoRA with fewer ranks, as near to what it was as they allow."""
    from latentgen.formats.lora.change import resize as smaller

    opened = _read(source, model)
    _write(smaller(opened, rank, energy=energy), out, layout or opened.layout, model, dtype)


@app.command()
def combine(
    loras: Annotated[list[str], typer.Argument(help="LoRA files, each as FILE or FILE:WEIGHT.", metavar="LORA...")],
    out: Out,
    rank: Annotated[int | None, typer.Option(help="Cut to this rank; default: exact, ranks add up.")] = None,
    layout: Layout = None,
    model: For = None,
    dtype: Dtype = None,
) -> None:
    """Write one LoRA that does what several do together."""
    from latentgen.formats.lora.change import combine as add_up

    chosen = [weighted(lora) for lora in loras]
    opened = [_read(path, model) for path, _ in chosen]
    weights = [weight for _, weight in chosen]
    made = add_up(opened, weights, method="concat" if rank is None else "svd", rank=rank)
    _write(made, out, layout or opened[0].layout, model, dtype)


def _networks(model: Model) -> dict[str, nn.Module]:
    """What of a model LoRAs adapt, by diffusers' names."""
    return {name: network for name, network in model.networks().items() if name != "vae"}


def _networks_in(folder: Path | None) -> dict[str, nn.Module] | None:
    if folder is None:
        return None
    from latentgen.formats.model_folder import load_model

    return _networks(load_model(folder))


def _read(file: Path, model: Path | None) -> LoraFile:
    from latentgen.formats.lora.file import read_lora

    return read_lora(file, _networks_in(model))


def _write(file: LoraFile, out: Path, layout: str | None, model: Path | None, dtype: str | None) -> None:
    from latentgen.formats.lora.writing import WRITTEN, write_lora

    layout = layout if layout in WRITTEN else "kohya"
    write_lora(file, out, layout, _networks_in(model), _dtype(dtype))
    ranks = Counter(factors.rank for own in file.modules.values() for factors in own.values())
    typer.echo(f"{out}: {sum(ranks.values())} modules, rank {_counted(ranks)}, {layout} layout")


def _dtype(name: str | None) -> Any:
    import torch

    return None if name is None else {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


def weighted(text: str) -> tuple[Path, float]:
    """FILE or FILE:WEIGHT; a file whose own name ends so is taken as it is."""
    name, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(name), float(weight)
    except ValueError as error:
        raise UserError(f'"{text}": "{weight}" is not a number; write FILE or FILE:WEIGHT') from error
