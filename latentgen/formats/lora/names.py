"""What the modules of a U-Net and of CLIP's text towers are called elsewhere.

Everything is derived from the paths themselves, as `models.adapters.adaptable` gives them, so that networks of any
depth have their names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from latentgen.formats.original.renaming import original_names


def ldm_names(paths: Iterable[str]) -> dict[str, str]:
    """The original code's names of the U-Net modules `paths` (all of a U-Net's); modules that it lacks are left out.

    Raises:
        UserError: blocks are missing.
    """
    named = original_names("unet", paths)
    return {path: name for path, name in named.items() if name is not None and name != path}


_ATTENTION = re.compile(r"(.+\.attn\d)\.to_(q|k|v|out)(?:\.0)?")
_SELF_ATTENTION = re.compile(r"(.+\.self_attn)\.(q|k|v|out)_proj")


def processor_names(path: str) -> tuple[str, ...]:
    """What attention's maps of the U-Net or of a text tower were called when processors held the adapters."""
    if match := _ATTENTION.fullmatch(path):
        above, part = match.groups()
        return f"{above}.processor.to_{part}", f"{above}.to_{part}"
    if match := _SELF_ATTENTION.fullmatch(path):
        above, part = match.groups()
        return (f"{above}.to_{part}",)
    return ()


def text_names(path: str) -> tuple[str, ...]:
    """A text tower's module in files, where layers are below `text_model.`; the first is the usual one."""
    return (path, f"text_model.{path}") if path == "text_projection" else (f"text_model.{path}", path)
