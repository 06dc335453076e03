"""Tensors to pictures, grids of pictures, and the recipe written into a PNG."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from latentgen.core.files import write_bytes

LINE = 14  # pixels of one line of a caption


def to_pictures(image: Tensor) -> list[Image.Image]:
    """`[b, 3, h, w]` in [-1, 1] (values outside are clipped) to b RGB pictures."""
    levels = ((image.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(picture) for picture in levels.permute(0, 2, 3, 1).cpu().numpy()]


def grid(
    pictures: Sequence[Image.Image], columns: int, captions: Sequence[str] = (), *, scale: int = 1, gap: int = 4
) -> Image.Image:
    """Pictures in rows of `columns`, each enlarged `scale` times; cells are as large as the largest, and smaller
    pictures stand in their middle.

    Args:
        captions: one a row, written above it; none leaves no room for them.
    """
    width, height = (max(sides) * scale for sides in zip(*(picture.size for picture in pictures), strict=True))
    rows = -(-len(pictures) // columns)
    head = LINE + gap if captions else 0
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap + head) + gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=LINE - 2)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        top = gap + row * (height + gap + head)
        if captions and column == 0:
            pen.text((gap, top), captions[row], fill="black", font=font)
        size = picture.width * scale, picture.height * scale
        enlarged = picture.resize(size, Image.Resampling.NEAREST) if scale > 1 else picture
        left = gap + column * (width + gap)
        sheet.paste(enlarged, (left + (width - size[0]) // 2, top + head + (height - size[1]) // 2))
    return sheet


def cells(sheet: Image.Image, rows: int, columns: int, *, captions: bool, gap: int = 4) -> list[list[Image.Image]]:
    """The pictures of a `grid` again, by row, as large as they stand there."""
    head = LINE + gap if captions else 0
    width = (sheet.width - gap) // columns - gap
    pitch = (sheet.height - gap) // rows
    height = pitch - gap - head
    return [
        [
            sheet.crop((left, top, left + width, top + height))
            for left in (gap + column * (width + gap) for column in range(columns))
        ]
        for top in (gap + row * pitch + head for row in range(rows))
    ]


def save_png(
    picture: Image.Image, path: Path, *, parameters: str | None = None, recipe: dict[str, Any] | None = None
) -> None:
    """Write a PNG atomically, with its recipe in text chunks.

    Args:
        parameters: the line that other tools read ("prompt ... Steps: 20, Sampler: ...").
        recipe: the whole request as JSON, under the key `latentgen`.
    """
    info = PngInfo()
    if parameters is not None:
        info.add_text("parameters", parameters)
    if recipe is not None:
        info.add_text("latentgen", json.dumps(recipe, ensure_ascii=False))
    buffer = BytesIO()
    picture.save(buffer, "PNG", pnginfo=info)
    write_bytes(path, buffer.getvalue())
