"""A sheet of pictures with their captions as training shows them: cut, mirrored, masked, drawn and dropped."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from transformers import CLIPTokenizer

from latentgen.core.rand import Draw
from latentgen.data.captions import LiveWords
from latentgen.data.fetch import CachedBatches
from latentgen.formats.model_folder import load_model
from latentgen.models.text import cut_tokens, shown
from latentgen.recipe import build
from latentgen.recipe.captions import tag_draws
from latentgen.recipe.schema import Recipe
from latentgen.recipe.sources import examples

WIDE = 168
"""Pixels of a card, at least."""
LINE = 13
RED, GREY, BLACK, MASKED = (190, 20, 30), (110, 110, 110), (0, 0, 0), (255, 0, 160)


@dataclass(frozen=True)
class Card:
    """One example of one step: its picture, its caption, what of that is cut, and what to call it."""

    picture: Image.Image
    caption: str
    cut: str
    name: str


def cards(recipe: Recipe, steps: int, most: int) -> list[list[Card]]:
    """The examples of the U-Net's first steps, at most so many of each, by step.

    Tokens that are cut are known where the text encoder is (`text_encoder.from`); they are none elsewhere.
    """
    data, source = recipe.data, examples(recipe).training
    tokenizer, chunks = _reader(recipe)
    words = LiveWords(source, _Strings(), recipe.diffusion.caption_dropout, data.captions, tag_draws(data))
    weighing = source if data.mask else None
    batches = CachedBatches(None, words, pictures=source, flip=data.flip, crop=data.crop == "random", weighing=weighing)
    size = build.cut(recipe, "unet").global_batch
    order = source.order(size)
    found = []
    for step in range(steps):
        indices = order.at(range(step * size, (step + 1) * size), recipe.seed, "unet")
        batch: dict[str, Any] = dict(batches(Draw(recipe.seed, "unet", step, size, range(size), indices)))
        row = []
        for number, (index, caption) in enumerate(zip(indices[:most], batch["text"][:most], strict=True)):
            pixels = batch["image"][number].permute(1, 2, 0).numpy()
            if "loss_mask" in batch:
                pixels = _dimmed(pixels, batch["loss_mask"][number, 0].numpy())
            cut = cut_tokens(tokenizer, [caption], chunks)[0] if tokenizer is not None else []
            text = shown(tokenizer, cut) if tokenizer is not None and cut else ""
            row.append(Card(Image.fromarray(np.ascontiguousarray(pixels)), caption, text, source.name(index)))
        found.append(row)
    return found


def sheet(steps: Sequence[Sequence[Card]]) -> Image.Image:
    """Cards in rows, a row a step; under each picture its caption, in red what of it is cut."""
    width = max(WIDE, max(card.picture.width for row in steps for card in row))
    rows = [_row(row, width, f"step {number}") for number, row in enumerate(steps)]
    whole = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        whole.paste(row, (0, top))
        top += row.height
    return whole


def _row(row: Sequence[Card], width: int, title: str, gap: int = 6) -> Image.Image:
    font = ImageFont.load_default(size=LINE - 2)
    letters = max(8, int(width / (font.getlength("abcdefghijklmnopqrstuvwxyz ") / 27)))
    texts = [_lines(card, letters) for card in row]
    tall, lines = max(card.picture.height for card in row), max(map(len, texts))
    image = Image.new("RGB", (len(row) * (width + gap) + gap, tall + LINE * (lines + 1) + 3 * gap), "white")
    pen = ImageDraw.Draw(image)
    pen.text((gap, gap // 2), title, fill=GREY, font=font)
    for number, (card, text) in enumerate(zip(row, texts, strict=True)):
        left, top = gap + number * (width + gap), LINE + gap
        image.paste(card.picture, (left, top + tall - card.picture.height))
        for line, (words, colour) in enumerate(text):
            pen.text((left, top + tall + 2 + line * LINE), words, fill=colour, font=font)
    return image


def _lines(card: Card, letters: int) -> list[tuple[str, tuple[int, int, int]]]:
    """What stands under a picture, line by line, each with its colour."""
    lines = [(line, BLACK) for line in textwrap.wrap(card.caption, letters)] or [("(empty)", GREY)]
    if card.cut:
        lines += [(line, RED) for line in textwrap.wrap(f"cut: {card.cut}", letters)]
    name = card.name if len(card.name) <= letters else f"...{card.name[3 - letters :]}"
    return [*lines, (name, GREY)]


def _dimmed(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Where pixels do not count they fade into a colour."""
    share = mask[..., None].astype(np.float32) / 255
    faded = 0.4 * pixels + 0.6 * np.array(MASKED, dtype=np.float32)
    return (pixels * share + faded * (1 - share)).astype(np.uint8)


def _reader(recipe: Recipe) -> tuple[CLIPTokenizer | None, int]:
    """The tokenizer of the text encoder that is there, and in how many pieces it reads."""
    source = recipe.text_encoder.source
    if source is None:
        return None, recipe.text_encoder.chunks
    model = load_model(Path(source))
    return model.towers[0].tokenizer, max(model.chunks, recipe.text_encoder.chunks)


class _Strings:
    """What the text encoder would read, as it is."""

    def __call__(self, captions: Sequence[str]) -> Mapping[str, Any]:
        return {"text": list(captions)}
