"""From what a user writes to one guidance: which parts, in which order, and which do not go together.

    ("interval,low=0.3,high=6", "rescale")   ->   Rescale(Interval(CFG(4.0), low=0.3, high=6.0))

One rule (cfg where none is named), then wrappers in the order of WRAPPERS, whatever the order they are named in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from latentgen.core.errors import UserError
from latentgen.diffusion import lookup
from latentgen.diffusion.guidance.driver import Guidance
from latentgen.diffusion.guidance.rules import APG, CFG, CFGPP, CFGZero
from latentgen.diffusion.guidance.wrappers import (
    PAG,
    Adaptive,
    Autoguidance,
    Compose,
    Interval,
    Rescale,
    Threshold,
    ZeroInit,
)
from latentgen.diffusion.knobs import read, settable, split, written
from latentgen.diffusion.samplers import SAMPLERS, find_sampler


@dataclass(frozen=True)
class Part:
    """One guidance as a user wrote it: its name here, and the knobs that were given."""

    name: str
    knobs: tuple[tuple[str, Any], ...] = ()

    def knob(self, key: str) -> Any:
        """The value of a knob, given or by default."""
        return dict(self.knobs).get(key, inspect.signature(GUIDANCE[self.name]).parameters[key].default)


def parse(texts: Sequence[str]) -> tuple[Part, ...]:
    """Parts from texts `NAME[,key=value]...`, the rule first and the wrappers from the innermost out.

    Raises UserError for unknown names, keys and values, and for parts that do not go together, with the reason.
    """
    parts = [_part(text) for text in texts]
    order = list(GUIDANCE)
    parts.sort(key=lambda part: order.index(part.name))
    for first, second in combinations((part.name for part in parts), 2):
        if first == second:
            raise UserError(f"--guidance {first}: it is given twice; give it once")
        if first in RULES and second in RULES:
            raise UserError(f"--guidance {first} and {second}: each decides alone how predictions combine; choose one")
        for (one, other), reason in REFUSED.items():
            if {one, other} == {first, second}:
                raise UserError(f"--guidance {one} and {other} do not go together: {reason}")
    if not parts or parts[0].name not in RULES:
        parts.insert(0, Part("cfg"))
    return tuple(parts)


def _part(text: str) -> Part:
    name, pairs = split(text)
    factory = lookup(GUIDANCE, name.replace("-", "_"), "--guidance", ALIASES)
    name = next(key for key, value in GUIDANCE.items() if value is factory)
    allowed = settable(factory, SUPPLIED[name in RULES])
    return Part(name, tuple(read(pairs, f"--guidance {text}", name, allowed).items()))


def canonical(texts: Sequence[str]) -> tuple[str, ...]:
    """The one way to write what `parse` reads; ("cfg",) where nothing is said."""
    return tuple(written(part.name, part.knobs, settable(GUIDANCE[part.name])) for part in parse(texts))


def build(
    parts: Sequence[Part],
    scale: float,
    sampler: str,
    levels: Sequence[float],
    weights: tuple[float, ...] = (1.0,),
) -> Guidance:
    """The guidance of one sampling call.

    Args:
        parts: from `parse`.
        scale: the guidance scale, which the rule takes.
        sampler: the sampler, as `find_sampler` reads it.
        levels: the noise levels it visits, n + 1 with the last.
        weights: of the prompts, for `compose`.

    Raises:
        UserError: a value out of its range, or a sampler that the guidance does not fit.
    """
    supplied = {"scale": scale, "levels": tuple(levels), "weights": weights}
    guidance: Any = None
    for part in parts:
        if part.name in EULER_ONLY and not _plain_euler(sampler):
            raise UserError(f"--guidance {part.name} with --sampler {sampler}: {EULER_ONLY[part.name]}; choose euler")
        if remembers(part) and find_sampler(sampler).run is SAMPLERS["parallel"].run:
            raise UserError(
                f"--guidance {part.name} with --sampler {sampler}: it remembers earlier steps, which must then come "
                "one after the other; choose euler"
            )
        factory, of_rule = GUIDANCE[part.name], part.name in RULES
        wanted = set(SUPPLIED[of_rule]) & set(inspect.signature(factory).parameters)
        given = {key: value for key, value in {**supplied, "inner": guidance}.items() if key in wanted}
        guidance = factory(**given, **dict(part.knobs))
    return guidance


def remembers(part: Part) -> bool:
    """Whether what it does at a step depends on the steps before."""
    return part.name == "adaptive" or (part.name == "apg" and part.knob("momentum") != 0)


def _plain_euler(sampler: str) -> bool:
    """Whether a sampler takes Euler's steps and adds no noise."""
    method = find_sampler(sampler)
    return method.run in (SAMPLERS["euler"].run, SAMPLERS["ddim"].run) and not method.noise


SUPPLIED: Mapping[bool, tuple[str, ...]] = {True: ("scale", "levels"), False: ("inner", "levels", "weights")}
"""What `build` gives to rules (True) and to wrappers (False); users set the rest."""

EULER_ONLY: Mapping[str, str] = {
    "cfgpp": "CFG++ is a way to take DDIM's steps without noise, which others do not take",
    "zero_init": "a frozen start tells nothing about the picture: others learn from earlier steps, or add noise to it",
}
"""Guidance for the samplers `euler` and `ddim` without added noise, and why for no other."""

_NO_PICTURE = "what CFG++ hands to the sampler is no picture, its scale grows with the number of steps"
REFUSED: Mapping[tuple[str, str], str] = {
    ("cfgpp", "rescale"): _NO_PICTURE,
    ("cfgpp", "threshold"): _NO_PICTURE,
    ("cfgpp", "autoguidance"): "CFG++ puts the unconditional noise back, and autoguidance makes no such prediction",
    ("cfgpp", "pag"): "CFG++ sets its scale by the length of the step, and pag's scale would not follow",
    ("cfg_zero", "autoguidance"): "cfg_zero fits the unconditional prediction, and autoguidance makes none",
    ("autoguidance", "pag"): "each has its own weak network, and guidance is away from one",
    ("interval", "compose"): "a composition without its unconditional prediction is not defined, so nothing is skipped",
    ("adaptive", "compose"): "a composition without its unconditional prediction is not defined, so nothing is skipped",
    ("pag", "compose"): "the weak prediction would have to be made for every prompt",
    ("autoguidance", "compose"): "a composition is measured from the unconditional prediction, which this leaves out",
}
"""Pairs that do not go together, and why."""

RULES: Mapping[str, Callable[..., Guidance]] = {
    "cfg": CFG,
    "apg": APG,
    "cfgpp": CFGPP,
    "cfg_zero": CFGZero,
}

WRAPPERS: Mapping[str, Callable[..., Guidance]] = {
    "autoguidance": Autoguidance,
    "pag": PAG,
    "interval": Interval,
    "adaptive": Adaptive,
    "rescale": Rescale,
    "threshold": Threshold,
    "compose": Compose,
    "zero_init": ZeroInit,
}
"""The innermost first."""

GUIDANCE: Mapping[str, Callable[..., Guidance]] = {**RULES, **WRAPPERS}

ALIASES: Mapping[str, str] = {
    "cfg++": "cfgpp",
    "cfg_pp": "cfgpp",
    "cfg_zero*": "cfg_zero",
    "cfg_zero_star": "cfg_zero",
    "cfgzerostar": "cfg_zero",
    "ag": "adaptive",
    "guidance_interval": "interval",
    "guidance_rescale": "rescale",
    "cfg_rescale": "rescale",
    "rescale_cfg": "rescale",
    "dynamic_thresholding": "threshold",
    "perturbed_attention": "pag",
    "composition": "compose",
}
