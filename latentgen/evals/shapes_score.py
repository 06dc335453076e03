"""Picture + caption -> verdict, by image analysis: no learned part, and no look at the scene behind the picture.

The caption is read by its own grammar, the picture by `latentgen.evals.shapes_detect`. What the caption leaves unsaid
is not checked. Objects that were not asked for are treated in the manner of GenEval (arXiv 2310.11513):

* one object asked for: the picture shows exactly one object, and it is that one;
* a number of one shape: exactly that many of the shape, all with the colour and size asked for. Objects of other
  shapes may stand beside them, but an object of no recognisable shape fails the count, because it may be one too
  many;
* two objects: both are there, whatever else is; with a relation, some pair that fits stands in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from latentgen.data.sources.shapes_captions import Requirement, Wanted, parse
from latentgen.evals.shapes_detect import Detection, Found, detect

RELATION_DISTANCE = 4.0
"""Least distance of two centres along the relation's axis, in 1/64 of the picture's side."""

RELATION_RATIO = 0.6
"""Least ratio of the distance along the relation's axis to that across it: a diagonal may be called either way."""


@dataclass(frozen=True)
class Verdict:
    """The judge's answer.

    Attributes:
        ok: all checks hold.
        checks: "count" and "shape" always; "colour", "size", "relation", "background" where the caption asks for them.
        found: every object in the picture, largest first.
        background: "white", "gray" or None.
        confidence: the smallest `margin` of the objects found, 0.0 where there are none.
    """

    ok: bool
    checks: dict[str, bool]
    found: tuple[Found, ...]
    background: str | None
    confidence: float

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that do not hold."""
        return tuple(name for name, holds in self.checks.items() if not holds)


def score(image: Image.Image | np.ndarray, caption: str) -> Verdict:
    """Judge one picture.

    Args:
        image: a square picture, or uint8 [h, w, 3], RGB; judged at 64 x 64.
        caption: what it should show, in the grammar of `latentgen.data.sources.shapes_captions`.

    Raises:
        UserError: a caption outside the grammar, or a picture that is not square RGB.
    """
    requirement = parse(caption)
    return judge(detect(image), requirement)


def judge(detection: Detection, requirement: Requirement) -> Verdict:
    """Compare what was found with what was asked for."""
    found = detection.found
    if len(requirement.wanted) == 2:
        checks = _judge_two(found, requirement)
    elif requirement.count > 1:
        checks = _judge_count(found, requirement)
    else:
        checks = _judge_one(found, requirement.wanted[0])
    if requirement.background is not None:
        checks["background"] = detection.background == requirement.background
    confidence = min((one.margin for one in found), default=0.0)
    return Verdict(all(checks.values()), checks, found, detection.background, confidence)


def _details(wanted: Wanted, one: Found) -> dict[str, bool]:
    """The checks on one object, those of them that were asked for."""
    checks = {"shape": one.shape == wanted.shape}
    if wanted.colour is not None:
        checks["colour"] = one.colour == wanted.colour
    if wanted.size is not None:
        checks["size"] = one.size == wanted.size
    return checks


def _nothing(wanted: Wanted) -> dict[str, bool]:
    """The checks on an object that is not there."""
    asked = {"shape": wanted.shape, "colour": wanted.colour, "size": wanted.size}
    return {name: False for name, word in asked.items() if word is not None}


def _both(first: dict[str, bool], second: dict[str, bool]) -> dict[str, bool]:
    """Checks on two things as one: a check holds if it holds wherever it was asked."""
    names = [name for name in ("count", "shape", "colour", "size", "relation") if name in first or name in second]
    return {name: first.get(name, True) and second.get(name, True) for name in names}


def _best(options: list[dict[str, bool]]) -> dict[str, bool]:
    """The option with the most checks that hold; shapes weigh most, so that a failure is named for its cause."""
    return max(options, key=lambda checks: (all(checks.values()), checks["shape"], sum(checks.values())))


def _judge_one(found: tuple[Found, ...], wanted: Wanted) -> dict[str, bool]:
    details = _best([_details(wanted, one) for one in found]) if found else _nothing(wanted)
    return _both({"count": len(found) == 1}, details)


def _judge_count(found: tuple[Found, ...], requirement: Requirement) -> dict[str, bool]:
    wanted = requirement.wanted[0]
    group = [one for one in found if one.shape == wanted.shape]
    unclear = any(one.shape is None for one in found)
    checks = {"count": len(group) == requirement.count and not unclear}
    if not found:
        return _both(checks, _nothing(wanted))
    # Where the shape is missing altogether, colour and size are still told of what is there.
    for one in group or found:
        checks = _both(checks, _details(wanted, one))
    return checks


def _judge_two(found: tuple[Found, ...], requirement: Requirement) -> dict[str, bool]:
    first, second = requirement.wanted
    options: list[dict[str, bool]] = []
    for i, a in enumerate(found):
        for j, b in enumerate(found):
            if i != j:
                related = {"count": True}
                if requirement.relation is not None:
                    related["relation"] = stands(a, requirement.relation, b)
                options.append(_both(related, _both(_details(first, a), _details(second, b))))
    if options:
        return _best(options)
    checks = {"count": False}
    if requirement.relation is not None:
        checks["relation"] = False
    return _both(checks, _both(_nothing(first), _nothing(second)))


def stands(a: Found, relation: str, b: Found) -> bool:
    """Whether `a` is above, below, left of or right of `b`; on a diagonal two of them may hold."""
    dx, dy = a.x - b.x, a.y - b.y
    along, across = {"above": (-dy, dx), "below": (dy, dx), "left of": (-dx, dy), "right of": (dx, dy)}[relation]
    return along >= max(RELATION_DISTANCE, RELATION_RATIO * abs(across))
