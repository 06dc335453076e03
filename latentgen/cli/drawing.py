"""Open a model folder and draw requests into a folder of PNGs that say how they were made."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from latentgen import __version__
from latentgen.cli.lora import weighted
from latentgen.core.errors import UserError
from latentgen.core.files import file_sha256
from latentgen.formats.control import with_control
from latentgen.formats.model import Model
from latentgen.formats.opening import Opened, open_model
from latentgen.models.autoencoder import factor
from latentgen.pipelines.generate import Request, check, generate, parameters_line, remarks
from latentgen.pipelines.pictures import grid, save_png

logger = logging.getLogger("latentgen.sample")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_side(model: Model) -> int:
    """Pixels of the pictures that the model was trained on."""
    return int(model.unet.config["sample_size"]) * factor(model.vae)


def open_here(
    folder: Path,
    device: str | None = None,
    dtype: str = "fp32",
    *,
    loras: Sequence[str] = (),
    words: Sequence[Path] = (),
    controlnet: Path | None = None,
) -> Opened:
    """Open a model where and as the command line says.

    Args:
        device: None takes a GPU when there is one.
        dtype: "fp32", "bf16" or "fp16".
        loras: FILE or FILE:WEIGHT each.
        words: files of learned words.
        controlnet: folder of a ControlNet to draw with.

    Raises:
        UserError: the folder is missing or broken, or device or dtype are unknown or do not go together.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    if device is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        where = found or torch.device("cpu")
    else:
        try:
            where = torch.device(device)
            torch.empty(0, device=where)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0][:120]
            raise UserError(f"--device {device}: not usable here ({reason}); leave it out, or say cpu") from None
    if where.type == "cpu" and dtype == "fp16":
        raise UserError("--dtype fp16: needs a GPU; use bf16 or fp32 on the CPU")
    opened = open_model(folder, where, DTYPES[dtype], loras=[weighted(lora) for lora in loras], embeddings=words)
    if controlnet is None:
        return opened
    model = with_control(opened.model, controlnet)
    sha256 = file_sha256(min(controlnet.glob("*.safetensors")))
    about = {"controlnet": str(controlnet), "controlnet_sha256": sha256}
    return dataclasses.replace(opened, model=model, controlnet=about)


def require_drawable(requests: Sequence[Request], model: Model) -> None:
    """Raise UserError for the first request that the model cannot draw; warn, once, of what is ignored."""
    for request in requests:
        check(request, model)
    for line in dict.fromkeys(line for request in requests for line in remarks(request, model)):
        logger.warning("%s", line)


def draw_to_folder(
    opened: Opened,
    requests: Sequence[Request],
    out: Path,
    *,
    batch_size: int,
    on_step: Callable[[int], object] | None = None,
    columns: int = 0,
) -> list[Path]:
    """Draw the requests into `out`, each PNG with its recipe.

    Args:
        columns: above 0, also write `grid.png`, so many pictures a row, a caption above each row.

    Returns:
        The paths written, in the order of the requests (and of the grid).
    """
    paths, pictures = [], []
    for request, picture in zip(
        requests, generate(opened.model, requests, batch_size=batch_size, on_step=on_step), strict=True
    ):
        words = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower()).strip("-")[:60] or "picture"
        path = _free(out / f"{words}-{request.seed}.png")
        recipe = {
            **dataclasses.asdict(request),
            "model": opened.name,
            "model_sha256": opened.sha256,
            **opened.controlnet,
            "dtype": str(opened.model.unet.dtype).removeprefix("torch."),
            "latentgen": __version__,
        }
        save_png(picture, path, parameters=parameters_line(request, opened.name, opened.sha256), recipe=recipe)
        paths.append(path)
        pictures.append(picture)
    if columns > 0:
        prompts = [request.prompt for request in requests[::columns]]
        path = _free(out / "grid.png")
        save_png(grid(pictures, columns, prompts, scale=max(1, 128 // pictures[0].width)), path)
        paths.append(path)
    return paths


def _free(path: Path) -> Path:
    """`path`, or the first of path-2, path-3 ... that does not exist: nothing of the user's is overwritten."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate
