"""A model as plain data: configurations and tensors by diffusers' names. No network is built to read or write one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.core.tensors import not_finite
from latentgen.formats.original.renaming import POSITION_IDS, text_name
from latentgen.formats.original.vae_names import renamed_former

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
TOKENIZERS: Mapping[str, str] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
CLASSES: Mapping[str, tuple[str, ...]] = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
}
"""What each part may be."""

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A model, or some of its networks.

    Attributes:
        family: "sd1", "sd2", "sdxl" or "sdxl-refiner"; None for an autoencoder or text encoder alone of which nothing
            tells the family.
        configs: of each network, as its config.json has it, by diffusers' name of the part (`NETWORKS`).
        states: of each network its tensors. Text encoders have the names `text_model....`, which all programs read.
        scheduler: what scheduler_config.json holds; empty where there is no U-Net.
        pipeline: what model_index.json holds besides the parts: `_class_name` and options; empty likewise.
        tokenizers: files of "tokenizer" and "tokenizer_2", text by file name.
        metadata: what latentgen.json holds, empty where another program made the model.
        card: README.md, if there is one.
        contrastive: the folder with both contrastive towers (`clip/`), where they were trained here. Only folders have
            a place for them.
    """

    family: str | None
    configs: Mapping[str, Mapping[str, Any]]
    states: Mapping[str, State]
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    pipeline: Mapping[str, Any] = field(default_factory=dict)
    tokenizers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    card: str | None = None
    contrastive: Path | None = None

    @property
    def whole(self) -> bool:
        """Whether it is a model to draw with, not some network alone."""
        return {"unet", "vae"} <= set(self.states) and bool(TOKENIZERS.keys() & set(self.states))


def family_of(texts: tuple[str, ...], unet: Mapping[str, Any]) -> str:
    """The family of a diffusers folder with these text encoders."""
    if "text_encoder_2" in texts:
        return "sdxl" if "text_encoder" in texts else "sdxl-refiner"
    return "sd2" if unet.get("use_linear_projection") else "sd1"


def canonical(part: str, state: Mapping[str, Tensor]) -> State:
    """A part's tensors under the names that `Parts` has them by; what programs keep besides is left out."""
    if part in TOKENIZERS:
        named = {text_name(name): value for name, value in state.items()}
        return {name: value for name, value in named.items() if name != POSITION_IDS}
    return {renamed_former(name): value for name, value in state.items()} if part == "vae" else dict(state)


def cast(parts: Parts, dtype: torch.dtype | None) -> Parts:
    """The same model stored as `dtype`, on the CPU; None leaves each tensor's type as it is.

    Raises:
        UserError: a number would not be finite in `dtype`, or is not finite at all.
    """
    states: dict[str, State] = {}
    for part, state in parts.states.items():
        states[part] = {
            name: value.detach().to("cpu", dtype if value.is_floating_point() else None).contiguous()
            for name, value in state.items()
        }
        bad = not_finite(states[part])
        if not bad:
            continue
        if not_finite({name: state[name] for name in bad}):
            raise UserError(f"{part}/{bad[0]} holds numbers that are not finite: the model is damaged; get it again")
        more = f" and {len(bad) - 1} more tensors hold" if len(bad) > 1 else " holds"
        raise UserError(
            f"{part}/{bad[0]}{more} numbers too large for {str(dtype)[6:]}; save with --dtype bf16 or --dtype fp32"
        )
    return replace(parts, states=states)
