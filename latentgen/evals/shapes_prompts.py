"""The standing list of prompts: the same 720 everywhere, 120 a category, a third of them held-out combinations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from latentgen.data.sources.shapes_captions import captions_of, parse
from latentgen.data.sources.shapes_layout import Draws, draw_scene
from latentgen.data.sources.shapes_scene import CATEGORIES

PER_CATEGORY = 120
QUICK_PER_CATEGORY = 21

_EVERY_THIRD = 3
_SEED = 20_240_601  # Far from the seeds people train with; never to change, or scores are no longer comparable.


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        text: a caption in the grammar of `latentgen.data.sources.shapes_captions`.
        category: one of `shapes_scene.CATEGORIES`.
        heldout: the words force a (shape, colour) pair, or a pair of objects, that training never shows.
    """

    text: str
    category: str
    heldout: bool


def standing_prompts(*, quick: bool = False) -> tuple[Prompt, ...]:
    """The standing list, category by category, no text twice in one; `quick` takes the first 21 of each."""
    count = QUICK_PER_CATEGORY if quick else PER_CATEGORY
    return tuple(prompt for category in CATEGORIES for prompt in _category(category)[:count])


@lru_cache(maxsize=len(CATEGORIES))
def _category(category: str) -> tuple[Prompt, ...]:
    """All prompts of one category; every third is held out, so that a beginning of the list has the same mix."""
    seen, heldout = _texts(category, heldout=False), _texts(category, heldout=True)
    prompts: list[Prompt] = []
    while len(prompts) < PER_CATEGORY:
        kept_out = len(prompts) % _EVERY_THIRD == _EVERY_THIRD - 1
        prompts.append(Prompt((heldout if kept_out else seen).pop(0), category, kept_out))
    return tuple(prompts)


def _texts(category: str, heldout: bool) -> list[str]:
    """Different captions of scenes of this category whose words alone make them held out (or not)."""
    needed = PER_CATEGORY // _EVERY_THIRD if heldout else PER_CATEGORY - PER_CATEGORY // _EVERY_THIRD
    split = "heldout" if heldout else "train"
    texts: dict[str, None] = {}
    number = 0
    while len(texts) < needed:
        scene = draw_scene(number, seed=_SEED, split=split, category=category)
        for caption in captions_of(scene, Draws("prompt", _SEED, split, category, number)):
            said = parse(caption)
            # A relation is what "position" tests; the other categories with two objects ask for any layout.
            fits = said.heldout == heldout and (said.relation is not None) == (category == "position")
            if fits and caption not in texts:
                texts[caption] = None
                break
        number += 1
    return list(texts)
