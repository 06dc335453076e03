"""Guidance: how several predictions of the clean image become one.

`driver.py` has the signature and the denoiser made of it, `rules.py` and `wrappers.py` the methods, a page each, and
`stack.py` puts together what a user asks for; GUIDANCE lists all names.
"""

from __future__ import annotations

from latentgen.diffusion.guidance.driver import Guidance, Needs, Predict, State, batched, bind, pick
from latentgen.diffusion.guidance.rules import CFG
from latentgen.diffusion.guidance.stack import GUIDANCE, Part, build, canonical, parse, remembers

__all__ = [
    "CFG",
    "GUIDANCE",
    "Guidance",
    "Needs",
    "Part",
    "Predict",
    "State",
    "batched",
    "bind",
    "build",
    "canonical",
    "parse",
    "pick",
    "remembers",
]
