"""What fine-tuning of the shapes model is measured with: a shape and a style that its world lacks, and their judge.

The shape is an arrow, drawn by the world's renderer and found by the world's judge, to both of which its outline is
given. The style is outlined shapes: a line along the outline, and the background inside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from latentgen.core.files import write_text
from latentgen.data.sources.shapes_captions import Requirement, Wanted, phrase
from latentgen.data.sources.shapes_layout import MARGIN, Draws
from latentgen.data.sources.shapes_render import DISTANCES, Array, Distance, Radius, render
from latentgen.data.sources.shapes_scene import BACKGROUNDS, COLOURS, RADII, RELATIONS, SHAPES, SIDE, Item, Scene
from latentgen.evals.shapes_detect import FOREGROUND, as_pixels, detect
from latentgen.evals.shapes_score import Verdict, judge
from latentgen.pipelines.pictures import save_png

ARROW = "arrow"
SHOWN = ("red", "yellow", "green", "blue", "pink")
"""Colours of the arrows that are shown."""

ASKED = tuple(colour for colour in COLOURS if colour not in SHOWN)
"""Colours that arrows are asked for in: all others."""

HEAD, NECK, SHAFT = 0.9, 0.1, 0.34
"""Of the arrow, relative to its radius: half the head's width, how far below the centre it ends, half the shaft's."""

LINE = 0.25
"""Width of an outline, relative to the shape's radius."""


def arrow(x: Array, y: Array, radius: Radius) -> Array:
    """Signed distance to an arrow that points up and is twice the radius high."""
    x, down = np.abs(x), 1 + NECK
    edge = (down * x - HEAD * (y + radius)) / np.hypot(down, HEAD)
    head = np.maximum(edge, y - NECK * radius)
    shaft = np.maximum(np.maximum(x - SHAFT * radius, -y), y - radius)
    return np.minimum(head, shaft)


def outlined(distance: Distance) -> Distance:
    """The shape as a line along the inside of its outline."""

    def line(x: Array, y: Array, radius: Radius) -> Array:
        half = 0.5 * LINE * radius
        return np.abs(distance(x, y, radius) + half) - half

    return line


WITH_ARROW: Mapping[str, Distance] = {**DISTANCES, ARROW: arrow}
OUTLINED: Mapping[str, Distance] = {f"outlined {shape}": outlined(distance) for shape, distance in DISTANCES.items()}
WITH_OUTLINED: Mapping[str, Distance] = {**DISTANCES, **OUTLINED}


@dataclass(frozen=True)
class Example:
    """A picture uint8 [64, 64, 3] to learn from, and what it shows, in words."""

    image: Array
    caption: str


def _alone(draws: Draws, shape: str, colour: str, size: str) -> Scene:
    radius = draws.between(*RADII[size])
    x, y = (draws.between(MARGIN + radius, SIDE - MARGIN - radius) for _ in range(2))
    return Scene("single", draws.pick(tuple(BACKGROUNDS)), (Item(shape, colour, size, x, y, radius),))


def arrow_example(number: int, word: str = ARROW, shape: str = ARROW) -> Example:
    """Picture `number` of a large arrow in one of the colours shown, anywhere, as people show what they have; its
    caption calls it `word`, and says its colour and the background. In its place there may be another `shape`."""
    draws = Draws("arrow", number)
    colour = SHOWN[number % len(SHOWN)]
    scene = _alone(draws, shape, colour, "large")
    said = Requirement((Wanted(word, colour),), background=scene.background)
    return Example(render(scene, shapes=WITH_ARROW), phrase(said, draws))


def outlined_example(number: int) -> Example:
    """Picture `number` of a large outlined shape; its caption does not say that it is outlined."""
    draws = Draws("outlined", number)
    shape, colour = SHAPES[number % len(SHAPES)], draws.pick(tuple(COLOURS))
    wanted = Wanted(shape, colour, "large")
    return Example(
        render(_alone(draws, f"outlined {shape}", colour, "large"), shapes=OUTLINED),
        phrase(Requirement((wanted,)), draws),
    )


def write_pictures(folder: Path, examples: Sequence[Example]) -> None:
    """A folder for `data.path`: PNG files and `metadata.jsonl`."""
    lines = []
    for number, example in enumerate(examples):
        name = f"{number:03d}.png"
        save_png(Image.fromarray(example.image), folder / name)
        lines.append(json.dumps({"file_name": name, "text": example.caption}))
    write_text(folder / "metadata.jsonl", "\n".join(lines) + "\n")


@dataclass(frozen=True)
class Ask:
    """A prompt, and what a picture of it must show."""

    text: str
    requirement: Requirement


def _ask(word: str, draws: Draws, requirement: Requirement) -> Ask:
    """The prompt says `word` where the requirement says its first shape."""
    first, *others = requirement.wanted
    said = (Wanted(word, first.colour, first.size), *others)
    spoken = Requirement(said, relation=requirement.relation, background=requirement.background)
    return Ask(phrase(spoken, draws), requirement)


def asks_alone(word: str = ARROW, sizes: Sequence[str | None] = (None, "large"), shape: str = ARROW) -> list[Ask]:
    """Prompts for one arrow, or for one of `shape`, 9 for each of `sizes` (None: nothing is said of it): the colours
    not shown, with and without a background."""
    return [
        _ask(word, Draws("alone", colour, size or "", background or ""), requirement)
        for colour in ASKED
        for size in sizes
        for background in (None, *BACKGROUNDS)
        for requirement in (Requirement((Wanted(shape, colour, size),), background=background),)
    ]


def asks_beside(word: str = ARROW, shape: str = ARROW) -> list[Ask]:
    """27 prompts for an arrow, or one of `shape`, in a colour not shown, and a shape of the world.

    They are beside each other, or in a relation; no picture with two objects was shown.
    """
    asks = []
    for colour in ASKED:
        for number, relation in enumerate((None, *RELATIONS, None, *RELATIONS[:3])):
            draws = Draws("beside", colour, number)
            other = Wanted(
                draws.pick([one for one in SHAPES if one != shape]), draws.pick([c for c in COLOURS if c != colour])
            )
            asks.append(_ask(word, draws, Requirement((Wanted(shape, colour), other), relation=relation)))
    return asks


def judged(picture: Image.Image | Array, ask: Ask) -> Verdict:
    """The world's judge, which knows arrows too."""
    return judge(detect(picture, WITH_ARROW), ask.requirement)


def arrows_in(picture: Image.Image | Array) -> int:
    """How many arrows the judge finds."""
    return sum(found.shape == ARROW for found in detect(picture, WITH_ARROW).found)


def hollow(picture: Image.Image | Array) -> float:
    """Share, in [0, 1], of what the outlines enclose that has the background's colour; 0 for an empty picture."""
    pixels = as_pixels(picture)
    frame = np.ones(pixels.shape[:2], dtype=bool)
    frame[2:-2, 2:-2] = False
    ground = np.median(pixels[frame], axis=0)
    painted = np.sqrt(((pixels - ground) ** 2).sum(-1)) > FOREGROUND
    enclosed = np.asarray(ndimage.binary_fill_holes(painted))
    return 1.0 - painted.sum() / enclosed.sum() if enclosed.any() else 0.0


def asks_large() -> list[Ask]:
    """48 prompts for a large shape of the world, every one in every colour; required is that it is outlined."""
    asks = []
    for shape in SHAPES:
        for colour in COLOURS:
            text = phrase(Requirement((Wanted(shape, colour, "large"),)), Draws("large", shape, colour))
            asks.append(Ask(text, Requirement((Wanted(f"outlined {shape}", colour, "large"),))))
    return asks


def judged_outlined(picture: Image.Image | Array, ask: Ask) -> Verdict:
    """The world's judge, which knows the outlined shapes too, as shapes of their own."""
    return judge(detect(picture, WITH_OUTLINED), ask.requirement)
