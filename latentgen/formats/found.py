"""What a file of tensors turned out to hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from latentgen.formats.headers import Entry
from latentgen.formats.original.layouts import TITLES, Place


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a file or a folder holds.

    Attributes:
        kind: "model" (a U-Net and more), "unet", "vae", "tiny_vae", "clip", "lora", "embedding", "controlnet", or
            "unknown".
        family: "sd1", "sd2", "sdxl" or "sdxl-refiner"; None where nothing tells.
        variant: of the U-Net: "ssd-1b", "vega", "koala", "bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"; None is the
            family's own, or some other shape.
        places: where each part lies in the file, by diffusers' names.
        prediction: "eps" or "v" where the file says it, else None: the tensors of SD 2.x do not.
        zero_terminal_snr: the file says so.
        in_channels: of the U-Net: 4, of inpainting 9, of instruct-pix2pix 8.
        layout: of a LoRA or an embedding: whose names it has.
        dtypes: for each part how its tensors are stored, most of them first: "F16", "F32", ...
        parameters: for each part the number of its parameters.
        details: of a LoRA: rank and what it changes.
    """

    kind: str
    family: str | None = None
    variant: str | None = None
    places: Mapping[str, Place] = field(default_factory=dict)
    prediction: str | None = None
    zero_terminal_snr: bool = False
    in_channels: int | None = None
    layout: str | None = None
    dtypes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    parameters: Mapping[str, int] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What it is, in words."""
        family = TITLES.get(self.family or "", "")
        if self.kind == "lora":
            return f"{self.details['method']} for {family or 'an unknown family'}, {self.layout} names"
        if self.kind in ALONE:
            return f"{ALONE[self.kind]}{f' of {family}' if family else ''}"
        words = [family, *([self.variant.upper()] if self.variant else [])]
        words += {9: ["inpainting"], 8: ["instruct-pix2pix"]}.get(self.in_channels or 0, [])
        words += {"v": ["v prediction"], "eps": ["eps prediction"]}.get(self.prediction or "", [])
        return ", ".join(words) + (" (U-Net alone)" if self.kind == "unet" else "")


def dtypes_of(tensors: Mapping[str, Entry]) -> tuple[str, ...]:
    """How tensors are stored, the type of most numbers first."""
    sizes: Counter[str] = Counter()
    for entry in tensors.values():
        sizes[entry.dtype] += entry.numel
    return tuple(name for name, _ in sizes.most_common())


def parameters_of(tensors: Mapping[str, Entry]) -> int:
    """The number of numbers in tensors."""
    return sum(entry.numel for entry in tensors.values())


ALONE: Mapping[str, str] = {
    "vae": "autoencoder",
    "tiny_vae": "tiny autoencoder (TAESD)",
    "clip": "CLIP text encoder",
    "embedding": "textual-inversion embedding",
    "controlnet": "ControlNet",
    "unknown": "unknown tensors",
}
