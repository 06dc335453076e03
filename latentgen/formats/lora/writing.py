"""LoRA files written: every layout that others read, with the headers that they look at."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from latentgen.core.errors import UserError
from latentgen.core.files import write_bytes
from latentgen.core.tensors import encoded, require_finite
from latentgen.formats.lora.families import family_of, family_shapes, shapes_of
from latentgen.formats.lora.file import LoraFile
from latentgen.formats.lora.keys import Shapes
from latentgen.formats.lora.layouts import LAYOUTS, UNET, Layout
from latentgen.formats.lora.metadata import DIFFUSERS_KEY, KOHYA_HASHES, diffusers_metadata, kohya_hash, kohya_metadata
from latentgen.models.deltas import Factors, without_mid, without_scale

log = logging.getLogger(__name__)

WRITTEN = tuple(name for name, layout in LAYOUTS.items() if layout.prefix is not None)
"""Layouts that can be written; the others are only read."""

Modules = Mapping[str, Mapping[str, Factors]]


def write_lora(
    file: LoraFile,
    path: Path,
    layout: str,
    networks: Mapping[str, nn.Module] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a LoRA file, complete or not at all.

    Args:
        file: left unchanged.
        path: its parents are made.
        layout: one of WRITTEN.
        networks: of the model that it is for, by "unet", "text_encoder", "text_encoder_2"; None: of its family.
        dtype: of the stored tensors, alphas excepted; None stores each as it is.

    Raises:
        UserError: the layout has no such adapters, or the model no such modules.
        FloatingPointError: a number is not finite, or would not be in `dtype`; nothing is written.
    """
    shapes = None if networks is None else shapes_of(networks)
    tensors, metadata = to_tensors(file, layout, shapes, dtype)
    require_finite(tensors, f"the LoRA file {path}")
    write_bytes(path, b"".join(encoded(tensors, metadata)))


def to_tensors(
    file: LoraFile, layout: str, shapes: Shapes | None = None, dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `write_lora` stores: tensors (contiguous, on the CPU) and the header's free text."""
    if layout not in WRITTEN:
        raise UserError(f'LoRA layout "{layout}" cannot be written; use {", ".join(WRITTEN)}')
    family = family_of(file.modules)
    if shapes is None:
        if family is None:
            raise UserError("this LoRA is for no family of models that is known; name the model that it is for")
        shapes = family_shapes(family)
    target = LAYOUTS[layout]
    assert target.prefix is not None
    modules = _adjusted(file.modules, layout)
    written: dict[str, Tensor] = {}
    for network, own in modules.items():
        prefix = target.prefix(network, shapes)
        names = target.names(network, list(shapes.get(network, ())))
        for path, factors in own.items():
            if path not in shapes.get(network, {}):
                raise UserError(f"the model has no {network} {path}; name the model that the LoRA was made for")
            if path not in names:
                raise UserError(f"{layout} has no name for {network} {path}; use {' or '.join(_others(layout))}")
            for suffix, value in _by_suffix(factors, target, network).items():
                cast = value if dtype is None or value.dim() == 0 else value.to(dtype)
                written[f"{prefix}{names[path][0]}{suffix}"] = cast.detach().cpu().contiguous()
    return written, _header(file, modules, layout, family, written)


def _by_suffix(factors: Factors, layout: Layout, network: str) -> dict[str, Tensor]:
    named = {f"{factors.kind}.{name}": value for name, value in factors.tensors.items()}
    if factors.alpha is not None and "alpha" in layout.suffixes:  # elsewhere the header tells it
        named["alpha"] = factors.alpha
    if factors.magnitude is not None:
        named["magnitude"] = _magnitude(factors, layout)
    found: dict[str, Tensor] = {}
    for tensor, value in named.items():
        suffix = layout.written(network, tensor)
        if suffix is None:
            raise UserError(f"the {layout.name} layout has no {tensor}; use {' or '.join(_others(layout.name))}")
        found[suffix] = value
    return found


def _magnitude(factors: Factors, layout: Layout) -> Tensor:
    assert factors.magnitude is not None
    if not layout.magnitude_of_outputs:
        return factors.magnitude
    if factors.kind != "lora" or factors.magnitude.shape[0] != factors.tensors["up"].shape[0]:
        raise UserError(
            f"the {layout.name} layout has DoRA of LoRA's outputs only; use {' or '.join(_others(layout.name))}"
        )
    # As peft has them: [o], and [1, o, 1, 1] of a convolution.
    spatial = factors.tensors["down"].dim() - 2
    return factors.magnitude.reshape(1, -1, *[1] * spatial) if spatial else factors.magnitude.reshape(-1)


def _others(layout: str) -> list[str]:
    return [name for name in WRITTEN if name != layout]


def _adjusted(modules: Modules, layout: str) -> Modules:
    """What a layout cannot say, said otherwise: the change to the weights stays the same."""
    if layout == "diffusers":
        return {
            network: {
                path: without_scale(factors) if factors.kind == "lokr" else without_mid(factors)
                for path, factors in _of_one_sort(network, own).items()
            }
            for network, own in modules.items()
        }
    if layout == "kohya":
        _warn_of_diffusers(modules)
        everything = [factors for own in modules.values() for factors in own.values()]
        if any(factors.alpha is not None for factors in everything):
            # Where some alphas are given, diffusers scales the other modules by the commonest of them.
            return {net: {path: _with_alpha(factors) for path, factors in own.items()} for net, own in modules.items()}
    if layout == "comfyui" and any(not factors.linear for own in modules.values() for factors in own.values()):
        # comfy/weight_adapter/base.py, weight_decompose, of October 2025.
        log.warning("ComfyUI divides DoRA by the norm of the untrained weights: there it comes out otherwise than here")
    return modules


def _of_one_sort(network: str, own: Mapping[str, Factors]) -> Mapping[str, Factors]:
    sorts = {(factors.kind, factors.linear) for factors in own.values()}
    if len(sorts) > 1:
        names = " and ".join(sorted(kind if linear else f"{kind} with DoRA" for kind, linear in sorts))
        raise UserError(f"diffusers has one sort of adapter in a network; {network} has {names}: use kohya or comfyui")
    return own


def _with_alpha(factors: Factors) -> Factors:
    if factors.alpha is not None or factors.rank is None:
        return factors
    return Factors(factors.kind, factors.tensors, torch.tensor(float(factors.rank)), factors.magnitude)


def _warn_of_diffusers(modules: Modules) -> None:
    for network, own in modules.items():
        layers = [path.rsplit(".", 1)[0] for path in own if network != UNET and ".self_attn." in path]
        lacking = [layer for layer in layers if f"{layer}.out_proj" not in own]
        if lacking:
            log.warning(
                "%s: no adapter at %s.out_proj; diffusers opens kohya files only where attention has all four",
                network,
                lacking[0],
            )
        alphas = {factors.alpha.item() for factors in own.values() if factors.alpha is not None}
        if len(alphas) > 1:
            log.warning(
                "%s: alphas differ between modules; diffusers takes those of attention wrongly from kohya files",
                network,
            )


def _header(
    file: LoraFile, modules: Modules, layout: str, family: str | None, written: Mapping[str, Tensor]
) -> dict[str, str]:
    own = (DIFFUSERS_KEY, *KOHYA_HASHES)
    kept = {"format": "pt", **{key: value for key, value in file.metadata.items() if key not in own}}
    if layout == "diffusers":
        return kept | diffusers_metadata(modules)
    return kohya_metadata(modules, family) | kept | {KOHYA_HASHES[0]: kohya_hash(written)}
