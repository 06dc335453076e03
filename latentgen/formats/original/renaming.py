"""One part of a model, from the original's names to diffusers' and back: the same table both ways.

Kinds of parts: "unet", "vae" (AutoencoderKL), "tiny_vae" (AutoencoderTiny), "clip" (a text tower under transformers'
names, which the original has too) and "open_clip" (a text tower whose query, key and value are one matrix).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from latentgen.formats.original.unet_names import (
    Pairs,
    structure_of_diffusers,
    structure_of_original,
    unet_pairs,
)
from latentgen.formats.original.vae_names import (
    POINTWISE,
    TINY_SIDES,
    vae_pairs,
    vae_size_of_diffusers,
    vae_size_of_original,
)
from latentgen.models.clip import TEXT_LAYER_NAMES

POSITION_IDS = "text_model.embeddings.position_ids"
"""Counts from 0 to 76 that older programs keep among the weights."""

TEXT_OUTER = (
    ("token_embedding", "text_model.embeddings.token_embedding"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final", "text_model.final_layer_norm"),
    ("text_projection", "text_projection.weight"),  # transposed
)
PROJECTION = "text_projection.weight"
QKV = ("q_proj", "k_proj", "v_proj")


def to_diffusers(kind: str, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A part's tensors under diffusers' names; and those of its names that nobody knows."""
    if kind == "open_clip":
        state = _split(state)
    found, left = _renamed(state, diffusers_names(kind, state))
    for name, value in found.items():
        if kind == "vae" and POINTWISE.fullmatch(name):
            found[name] = value.reshape(value.shape[:2])  # some files have them as matrices already
        elif kind == "open_clip" and name == PROJECTION:
            found[name] = value.T.contiguous()
    return found, left


def to_original(kind: str, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A part's tensors under the original's names; and those of its names that nobody knows."""
    shaped = dict(state)
    for name, value in state.items():
        if kind == "vae" and POINTWISE.fullmatch(name):
            shaped[name] = value.reshape(*value.shape[:2], 1, 1)
        elif kind == "open_clip" and name == PROJECTION:
            shaped[name] = value.T.contiguous()
    found, left = _renamed(shaped, original_names(kind, state))
    return _fused(found) if kind == "open_clip" else found, left


def diffusers_names(kind: str, names: Iterable[str]) -> dict[str, str | None]:
    """For each of the original's names diffusers' one, or None."""
    names = list(names)
    if kind == "tiny_vae":
        return {name: _renumbered(name, [(old, new, -shift) for old, new, shift in TINY_SIDES]) for name in names}
    if kind == "clip":
        return {name: text_name(name) for name in names}
    if kind == "unet":
        pairs = unet_pairs(structure_of_original(names))
    elif kind == "vae":
        pairs = vae_pairs(*vae_size_of_original(names))
    else:
        pairs = text_pairs(_layers(names, r"transformer\.resblocks\.(\d+)\."))
    return _translated(names, dict(pairs))


def original_names(kind: str, names: Iterable[str]) -> dict[str, str | None]:
    """For each of diffusers' names the original's, or None."""
    names = list(names)
    if kind == "tiny_vae":
        return {name: _renumbered(name, [(new, old, shift) for old, new, shift in TINY_SIDES]) for name in names}
    if kind == "clip":
        return {name: name for name in names}
    if kind == "unet":
        pairs = unet_pairs(structure_of_diffusers(names))
    elif kind == "vae":
        pairs = vae_pairs(*vae_size_of_diffusers(names))
    else:
        pairs = text_pairs(_layers(names, r"text_model\.encoder\.layers\.(\d+)\."))
    return _translated(names, {diffusers: original for original, diffusers in pairs})


def text_pairs(layers: int) -> Pairs:
    """Every module of a text tower under open_clip's names and transformers', as beginnings of tensors' names.

    Query, key and value have names of their own here (`attn.q_proj`), which no file has: `_split` and `_fused`.
    """
    pairs: Pairs = list(TEXT_OUTER)
    for layer in range(layers):
        original, ours = f"transformer.resblocks.{layer}", f"text_model.encoder.layers.{layer}"
        pairs += [(f"{original}.{theirs}", f"{ours}.{name}") for name, theirs in TEXT_LAYER_NAMES.items()]
        pairs += [(f"{original}.attn.{piece}", f"{ours}.self_attn.{piece}") for piece in QKV]
    return pairs


def text_name(name: str) -> str:
    """A text tower's tensor under the name that all versions of transformers read: some write no `text_model.`."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def _layers(names: Iterable[str], pattern: str) -> int:
    found = (re.match(pattern, name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _split(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's tensors with query, key and value apart."""
    apart: dict[str, Tensor] = {}
    for name, value in state.items():
        start, found, kind = name.rpartition("in_proj_")
        if found:
            for piece, part in zip(QKV, value.chunk(3), strict=True):
                apart[f"{start}{piece}.{kind}"] = part
        else:
            apart[name] = value
    return apart


def _fused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `_split`."""
    whole: dict[str, Tensor] = {}
    for name, value in state.items():
        found = re.fullmatch(r"(.*\.attn\.)(q|k|v)_proj\.(weight|bias)", name)
        if not found:
            whole[name] = value
        elif found[2] == "q":
            parts = [state[f"{found[1]}{piece}.{found[3]}"] for piece in QKV]
            whole[f"{found[1]}in_proj_{found[3]}"] = torch.cat(parts)
    return whole


def _renamed(state: Mapping[str, Tensor], names: Mapping[str, str | None]) -> tuple[dict[str, Tensor], list[str]]:
    found = {new: state[old] for old, new in names.items() if new is not None}
    return found, [old for old, new in names.items() if new is None]


def _translated(names: Iterable[str], table: Mapping[str, str]) -> dict[str, str | None]:
    """Each name with its longest known beginning replaced; None where no beginning is known."""

    def one(name: str) -> str | None:
        pieces = name.split(".")
        for count in range(len(pieces), 0, -1):
            start = ".".join(pieces[:count])
            if start in table:
                return ".".join([table[start], *pieces[count:]])
        return None

    return {name: one(name) for name in names}


def _renumbered(name: str, sides: Iterable[tuple[str, str, int]]) -> str | None:
    for old, new, shift in sides:
        number, _, rest = name.removeprefix(old).partition(".")
        if name.startswith(old) and number.isdigit() and int(number) + shift >= 0:
            return f"{new}{int(number) + shift}.{rest}"
    return None
