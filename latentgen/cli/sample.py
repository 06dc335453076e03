"""`latentgen sample` and `sample.py`: prompts to pictures."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from latentgen.core.errors import UserError
from latentgen.core.log import progress, setup_logging
from latentgen.core.runfolder import newest_finished

SHIPPED = Path(__file__).resolve().parents[2] / "data" / "shapes-model"

logger = logging.getLogger("latentgen.sample")


def find_model(runs: Path) -> Path:
    """The model to use when none is named: the newest finished run, else the shipped one.

    Raises:
        UserError: neither exists.
    """
    newest = newest_finished(runs)
    found = newest or (SHIPPED if SHIPPED.is_dir() else None)
    if found is None:
        raise UserError(f"no model: {runs}/ holds no finished run; train one, or say --model FOLDER")
    logger.info("model: %s", found)
    return found


def read_prompts(prompts: list[str], file: Path | None) -> list[str]:
    """The prompts of the command line, then those of the file, one a line (empty lines and # comments left out).

    Raises:
        UserError: no prompt at all, or no such file.
    """
    found = list(prompts)
    if file is not None:
        if not file.is_file():
            raise UserError(f"--prompts {file}: no such file; it should hold one prompt a line")
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"--prompts {file}: not a text file in UTF-8; it should hold one prompt a line") from None
        lines = (line.strip() for line in text.splitlines())
        found += [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise UserError('no prompt: write one, as in `python sample.py "a red circle"`, or say --prompts FILE')
    return found


def require_place(num: int, out: Path) -> None:
    """Raise `UserError` where there is nothing to draw, or no folder to draw into."""
    if num < 1:
        raise UserError(f"--num {num}: must be at least 1")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder for the pictures")


def sample(
    prompts: Annotated[list[str] | None, typer.Argument(help="What to draw; several prompts may follow.")] = None,
    prompts_file: Annotated[Path | None, typer.Option("--prompts", help="File with one prompt a line.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="Model folder (diffusers layout); default: the newest run.")
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="FILE or FILE:WEIGHT, of any tool's layout; several may be given.")
    ] = None,
    embedding: Annotated[list[Path] | None, typer.Option(help="File of a learned word; several may be given.")] = None,
    num: Annotated[int, typer.Option(help="Pictures a prompt.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the next ones count up.")] = 0,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    guidance_scale: Annotated[float, typer.Option(help="1: none; more follows the prompt harder.")] = 4.0,
    guidance: Annotated[
        list[str] | None,
        typer.Option(help="How to guide: NAME[,key=value]..., such as interval,low=0.3,high=6; several may be given."),
    ] = None,
    negative_prompt: Annotated[str, typer.Option(help="What to stay away from.")] = "",
    chunks: Annotated[
        int | None,
        typer.Option(help="Read long prompts in at most so many pieces; 1 cuts them; default: as many as they take."),
    ] = None,
    emphasis: Annotated[
        bool, typer.Option(help="(word:1.3), (word) and [word] say how much words count; \\( is a bracket.")
    ] = True,
    sampler: Annotated[
        str,
        typer.Option(
            help='NAME[,key=value]...: dpmpp_2m, unipc, euler_ancestral, "ddim,eta=0.5" ... or as elsewhere: '
            '"DPM++ 2M Karras".'
        ),
    ] = "dpmpp_2m",
    schedule: Annotated[
        str | None,
        typer.Option(
            help='Noise levels to visit: karras, beta, "flow,shift=3", fitted ...; default: the model\'s own.'
        ),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Start from this picture.")] = None,
    mask: Annotated[Path | None, typer.Option(help="White where --image is drawn anew, black where it stays.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="Of the change to --image, 0 to 1; default: 0.8, with a mask 1.")
    ] = None,
    controlnet: Annotated[Path | None, typer.Option(help="Folder of a ControlNet, such as runs/NAME/control.")] = None,
    control: Annotated[Path | None, typer.Option(help="The picture that the ControlNet is shown.")] = None,
    control_edges: Annotated[
        bool, typer.Option("--control-edges", help="Show it the edges found in --control, not --control itself.")
    ] = False,
    control_scale: Annotated[float, typer.Option(help="How closely --control is followed; 0: not at all.")] = 1.0,
    control_start: Annotated[float, typer.Option(help="Share of the steps before --control counts.")] = 0.0,
    control_end: Annotated[float, typer.Option(help="Share of the steps after which it counts no more.")] = 1.0,
    height: Annotated[int | None, typer.Option(help="Pixels; default: what the model was trained on.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; default: what the model was trained on.")] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures drawn together.")] = 8,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; default: a GPU when there is one.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("samples"),
    grid: Annotated[bool, typer.Option("--grid", help="Also write grid.png with all of them.")] = False,
    runs: Annotated[Path, typer.Option(help="Where to look for the newest run.")] = Path("runs"),
) -> None:
    """Draw pictures; each PNG carries everything needed to draw it again."""
    setup_logging()
    wanted = read_prompts(prompts or [], prompts_file)
    require_place(num, out)
    folder = model or find_model(runs)
    from latentgen.cli.drawing import default_side, draw_to_folder, open_here, require_drawable

    opened = open_here(folder, device, dtype, loras=lora or [], words=embedding or [], controlnet=controlnet)
    from latentgen.pipelines.generate import Request, spread, steps_of

    side = default_side(opened.model)
    request = Request(
        "",
        negative_prompt=negative_prompt,
        seed=seed,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        guidance=tuple(guidance or ()),
        sampler=sampler,
        schedule=schedule,
        height=side if height is None else height,
        width=side if width is None else width,
        image=None if image is None else str(image),
        mask=None if mask is None else str(mask),
        strength=strength,
        control=None if control is None else str(control),
        control_scale=control_scale,
        control_start=control_start,
        control_end=control_end,
        control_edges=control_edges,
        chunks=chunks,
        emphasis=emphasis,
    )
    requests, columns = spread(request, wanted, num), num if grid else 0
    require_drawable(requests, opened.model)
    with progress("drawing", "step", total=steps_of(requests)) as bar:
        paths = draw_to_folder(opened, requests, out, batch_size=batch_size, on_step=bar.update, columns=columns)
    typer.echo("\n".join(map(str, paths)))
