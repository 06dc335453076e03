"""The small grammar of captions: requirement -> words, words -> requirement, and what a scene lets one say.

A requirement is what a caption asks for, no more. `parse(phrase(requirement, draws))` is the same requirement, for
every phrasing; the judge reads captions through `parse` alone.

    caption     = [prefix] things [" on a " background " background" | " against a " ...]
    things      = object | group | object (" and " | " with ") object
                | object relation object | object " with " object relation " it"
    object      = ("a" | "an" | "one") [size] [colour] shape [" that is " colour]
    group       = ("two" | "three" | "four") [size] [colour] shapes
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from latentgen.core.errors import UserError
from latentgen.data.sources.shapes_layout import Draws
from latentgen.data.sources.shapes_scene import (
    BACKGROUNDS,
    COLOURS,
    INVERSE,
    RADII,
    RELATIONS,
    SHAPES,
    Kind,
    Scene,
    is_heldout,
    relation_of,
)

NUMBERS = {2: "two", 3: "three", 4: "four"}
PLURALS = {shape: "crosses" if shape == "cross" else shape + "s" for shape in SHAPES}
PREFIXES = ("a picture of ", "an image of ", "a drawing of ")
RELATION_WORDS = {
    "above": ("above",),
    "below": ("below", "under"),
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
}


@dataclass(frozen=True)
class Wanted:
    """An object that a caption asks for; None is left unsaid."""

    shape: str
    colour: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Requirement:
    """What a caption asks for: one object, `count` of one kind, or two objects, perhaps with a relation."""

    wanted: tuple[Wanted, ...]
    count: int = 1
    relation: str | None = None
    background: str | None = None

    @property
    def heldout(self) -> bool:
        """Whether the words alone force a held-out kind or pair of kinds into the picture."""
        kinds: tuple[Kind, ...] = tuple((w.shape, w.colour) for w in self.wanted if w.colour is not None)
        return is_heldout(kinds)


def _object(wanted: Wanted, draws: Draws, count: int = 1) -> str:
    """The noun phrase. The predicate form ("a star that is red") is for single objects with a colour."""
    after = wanted.colour is not None and count == 1 and draws.chance(0.08)
    words = [wanted.size, None if after else wanted.colour, wanted.shape if count == 1 else PLURALS[wanted.shape]]
    text = " ".join(word for word in words if word)
    if count > 1:
        return f"{NUMBERS[count]} {text}"
    article = "one" if draws.chance(0.06) else "an" if text[0] in "aeiou" else "a"
    return f"{article} {text}" + (f" that is {wanted.colour}" if after else "")


def phrase(requirement: Requirement, draws: Draws) -> str:
    """One of the phrasings of the requirement, chosen by `draws`."""
    wanted = requirement.wanted
    if len(wanted) == 1:
        things = _object(wanted[0], draws, requirement.count)
    else:
        first, second = _object(wanted[0], draws), _object(wanted[1], draws)
        if requirement.relation is None:
            things = f"{first} {'with' if draws.chance(0.2) else 'and'} {second}"
        elif draws.chance(0.15):
            words = RELATION_WORDS[requirement.relation][0]
            things = f"{second} with {first} {words} it"
        else:
            things = f"{first} {draws.pick(RELATION_WORDS[requirement.relation])} {second}"
    prefix = draws.pick(PREFIXES) if draws.chance(0.2) else ""
    if requirement.background is None:
        return prefix + things
    return f"{prefix}{things} {draws.pick(('on', 'on', 'against'))} a {requirement.background} background"


_SIZE, _COLOUR, _SHAPE = "|".join(RADII), "|".join(COLOURS), "|".join(SHAPES)
_ONE = re.compile(rf"(?:a|an|one) (?:({_SIZE}) )?(?:({_COLOUR}) )?({_SHAPE})(?: that is ({_COLOUR}))?")
_MANY = re.compile(rf"({'|'.join(NUMBERS.values())}) (?:({_SIZE}) )?(?:({_COLOUR}) )?({'|'.join(PLURALS.values())})")
_BACKGROUND = re.compile(rf"(.*?) (?:on|against) a ({'|'.join(BACKGROUNDS)}) background")
_WORDS = {words: relation for relation, options in RELATION_WORDS.items() for words in options}
# Longer words first: "to the left of" ends in "left of".
_RELATION = "|".join(sorted(_WORDS, key=len, reverse=True))
_RELATED = re.compile(rf"(.*?) ({_RELATION}) (.*)")
_WITH_IT = re.compile(rf"(.*?) with (.*?) ({_RELATION}) it")
_PAIR = re.compile(r"(.*?) (?:and|with) (.*)")


def parse(caption: str) -> Requirement:
    """What the caption asks for. Letter case, a full stop at the end and surplus spaces do not matter.

    Raises:
        UserError: the caption is not in the grammar.
    """
    text = " ".join(caption.lower().split()).rstrip(".")
    for prefix in PREFIXES:
        text = text.removeprefix(prefix)
    background = None
    if match := _BACKGROUND.fullmatch(text):
        text, background = match.groups()
    if match := _MANY.fullmatch(text):
        number, size, colour, plural = match.groups()
        count = next(n for n, word in NUMBERS.items() if word == number)
        shape = next(s for s, word in PLURALS.items() if word == plural)
        return Requirement((Wanted(shape, colour, size),), count=count, background=background)
    if _ONE.fullmatch(text):
        return Requirement((_wanted(text, caption),), background=background)
    relation = None
    if match := _WITH_IT.fullmatch(text):
        second, first, words = match.groups()
        relation = _WORDS[words]
    elif match := _RELATED.fullmatch(text):
        first, words, second = match.groups()
        relation = _WORDS[words]
    elif match := _PAIR.fullmatch(text):
        first, second = match.groups()
    else:
        raise _unreadable(caption)
    pair = (_wanted(first, caption), _wanted(second, caption))
    if pair[0].shape == pair[1].shape:
        raise UserError(f"shapes caption {caption!r}: two objects must have different shapes")
    return Requirement(pair, relation=relation, background=background)


def _wanted(text: str, caption: str) -> Wanted:
    match = _ONE.fullmatch(text)
    if match is None or (match[2] and match[4]):
        raise _unreadable(caption)
    return Wanted(match[3], match[2] or match[4], match[1])


def _unreadable(caption: str) -> UserError:
    return UserError(
        f"shapes caption {caption!r} is outside the grammar; "
        "write it like 'a red circle above a small blue square' or 'two green stars on a gray background'"
    )


def full_requirement(scene: Scene) -> Requirement:
    """Everything the grammar can say about the scene."""
    count = len(scene.items) if scene.category == "counting" else 1
    items = scene.items[:1] if count > 1 else scene.items
    wanted = tuple(Wanted(item.shape, item.colour, item.size) for item in items)
    relation = relation_of(*items) if len(items) == 2 else None
    return Requirement(wanted, count, relation, scene.background)


def least_requirement(scene: Scene) -> Requirement:
    """The little that still belongs to the scene's category: "a heart", "two stars", "a star left of a cross"."""
    full = full_requirement(scene)
    coloured = scene.category in ("colours", "attribution")
    wanted = tuple(replace(w, size=None, colour=w.colour if coloured else None) for w in full.wanted)
    relation = full.relation if scene.category == "position" else None
    return replace(full, wanted=wanted, background=None, relation=relation)


def _between(full: Requirement, least: Requirement, draws: Draws) -> Requirement:
    """`least` with some of what `full` adds; half the time the relation is turned round."""
    colour, size, background, relation = (draws.chance(p) for p in (0.6, 0.3, 0.3, 0.3))
    wanted = tuple(
        replace(low, colour=high.colour if colour else low.colour, size=high.size if size else low.size)
        for low, high in zip(least.wanted, full.wanted, strict=True)
    )
    said = replace(
        least,
        wanted=wanted,
        relation=full.relation if relation else least.relation,
        background=full.background if background else None,
    )
    return turned(said) if draws.chance(0.5) else said


def turned(requirement: Requirement) -> Requirement:
    """The same requirement with its two objects named in the other order."""
    if len(requirement.wanted) == 1:
        return requirement
    relation = None if requirement.relation is None else INVERSE[requirement.relation]
    return replace(requirement, wanted=requirement.wanted[::-1], relation=relation)


def captions_of(scene: Scene, draws: Draws) -> tuple[str, ...]:
    """True captions of the scene, all different, two to five of them.

    The first is the default and says what its category is about, often more; one says everything; one says the least.
    """
    full, least = full_requirement(scene), least_requirement(scene)
    said = [_between(full, least, draws), full, least, _between(full, least, draws), _between(full, least, draws)]
    return tuple(dict.fromkeys(phrase(requirement, draws) for requirement in said))


def holds(requirement: Requirement, scene: Scene) -> bool:
    """Whether the requirement is true of the scene: nothing asked for is missing, and a relation is beyond dispute."""
    if requirement.background not in (None, scene.background):
        return False

    def fits(wanted: Wanted) -> list[int]:
        return [
            i
            for i, item in enumerate(scene.items)
            if item.shape == wanted.shape and wanted.colour in (None, item.colour) and wanted.size in (None, item.size)
        ]

    if len(requirement.wanted) == 1:
        return len(fits(requirement.wanted[0])) == requirement.count == len(scene.items)
    pairs = ((a, b) for a in fits(requirement.wanted[0]) for b in fits(requirement.wanted[1]) if a != b)
    return any(requirement.relation in (None, relation_of(scene.items[a], scene.items[b])) for a, b in pairs)


def alterations(requirement: Requirement) -> list[tuple[str, Requirement]]:
    """Every requirement that differs in one attribute, as (attribute, requirement): false where the original is true.

    Attributes: shape, colour, size, count, relation, background, and swap (the colours of two objects exchanged).
    """
    changed: list[tuple[str, Requirement]] = []
    wanted = requirement.wanted

    def with_object(index: int, other: Wanted) -> Requirement:
        return replace(requirement, wanted=(*wanted[:index], other, *wanted[index + 1 :]))

    def others(options: Sequence[str], word: str | None) -> list[str]:
        return [option for option in options if word is not None and option != word]

    asked = {w.shape for w in wanted}
    for i, w in enumerate(wanted):
        changed += [("shape", with_object(i, replace(w, shape=s))) for s in SHAPES if s not in asked]
        changed += [("colour", with_object(i, replace(w, colour=c))) for c in others(tuple(COLOURS), w.colour)]
        changed += [("size", with_object(i, replace(w, size=s))) for s in others(tuple(RADII), w.size)]
    changed += [("relation", replace(requirement, relation=r)) for r in others(RELATIONS, requirement.relation)]
    changed += [
        ("background", replace(requirement, background=b)) for b in others(tuple(BACKGROUNDS), requirement.background)
    ]
    if len(wanted) == 1:
        changed += [("count", replace(requirement, count=n)) for n in (1, 2, 3, 4) if n != requirement.count]
    elif None not in (wanted[0].colour, wanted[1].colour) and wanted[0].colour != wanted[1].colour:
        swapped = (replace(wanted[0], colour=wanted[1].colour), replace(wanted[1], colour=wanted[0].colour))
        changed.append(("swap", replace(requirement, wanted=swapped)))
    return changed
