"""A LoRA file in memory, and what its keys say in every layout."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from latentgen.core.errors import UserError
from latentgen.formats.lora.families import described, family_of_tensors, family_shapes, shapes_of
from latentgen.formats.lora.keys import Shapes, Slot, assembled, flaw, grouped, recognised
from latentgen.formats.lora.metadata import AlphaOf, read_alphas, read_peft_alphas
from latentgen.models.adapters import adapter_factors, adapter_parameters
from latentgen.models.deltas import Factors, fits, scaled

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraFile:
    """Adapters of one model's networks.

    Attributes:
        modules: network ("unet", "text_encoder", "text_encoder_2") to module to factors. Modules are called as in
            `models.adapters.adaptable`: diffusers' and transformers' names, without a leading `text_model.`.
        metadata: free text from the file's header.
        layout: in which it was read; "" where it was not.
    """

    modules: Mapping[str, Mapping[str, Factors]]
    metadata: Mapping[str, str] = field(default_factory=dict)
    layout: str = ""


def trained_lora(networks: Mapping[str, nn.Module], metadata: Mapping[str, str] | None = None) -> LoraFile:
    """The adapters that `add_adapters` put into `networks`; networks without one are left out.

    Raises:
        UserError: none of them has an adapter.
    """
    found = {name: adapter_factors(network) for name, network in networks.items() if adapter_parameters(network)}
    if not found:
        raise UserError(f"none of {', '.join(networks)} has an adapter; call add_adapters first")
    return LoraFile(modules=found, metadata=dict(metadata or {}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header's free text of a safetensors file.

    Raises:
        UserError: there is no such file, or it is something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); fetch it again or convert it") from error


def read_lora(path: Path, networks: Mapping[str, nn.Module] | None = None) -> LoraFile:
    """Read a LoRA file of any layout in LAYOUTS; which one it is, its keys say.

    Args:
        path: a safetensors file. An adapter_config.json beside one in peft's layout tells the alphas.
        networks: the model's, by "unet", "text_encoder", "text_encoder_2": its modules' names decide what the keys
            mean. None: those of the family that the file was made for.

    Raises:
        UserError: it is not such a file, or less than half of it fits the model.
    """
    path = Path(path)
    tensors, metadata = load_tensors(path)
    return from_tensors(tensors, metadata, None if networks is None else shapes_of(networks), str(path))


def from_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], shapes: Shapes | None = None, where: str = "LoRA"
) -> LoraFile:
    """As `read_lora`, of a file's tensors and its header.

    Args:
        shapes: modules that there are, from `shapes_of`; None: those of the file's family.
        where: what messages call the file; the path, where there is one.
    """
    if shapes is None:
        family = family_of_tensors(tensors)
        if family is None:
            raise UserError(f"{where}: for no family of models that is known; name the model. {described(tensors)}")
        shapes = family_shapes(family)
    layout, slots = recognised(tensors, shapes)
    if not slots:
        raise UserError(f"{where}: none of its {len(tensors)} keys fits the model; {described(tensors)}")
    _report_left([key for key in tensors if key not in slots], tensors, where, layout)
    groups = grouped(slots)
    _require_whole(groups, slots, where)
    alphas = _alphas(layout, metadata, where)
    modules: dict[str, dict[str, Factors]] = {}
    for (network, module), keys in groups.items():
        factors = assembled({name: tensors[key] for name, key in keys.items()}, layout)
        if factors.alpha is None and (alpha := alphas(network, module, factors.rank)) is not None:
            factors = _with_alpha(factors, alpha)
        if not fits(factors, shapes[network][module]):
            raise UserError(
                f"{where}: {next(iter(keys.values()))} does not fit the model's {module} "
                f"{list(shapes[network][module])}; {described(tensors)}"
            )
        modules.setdefault(network, {})[module] = factors
    return LoraFile(modules=modules, metadata=dict(metadata), layout=layout)


def _with_alpha(factors: Factors, alpha: float) -> Factors:
    if factors.rank is None:
        return scaled(factors, alpha)
    return Factors(factors.kind, factors.tensors, torch.tensor(alpha), factors.magnitude)


def _require_whole(groups: Mapping[tuple[str, str], Mapping[str, str]], slots: Mapping[str, Slot], where: str) -> None:
    for key, (network, module, tensor) in slots.items():
        first = groups[network, module][tensor]
        if first != key:
            raise UserError(f"{where}: {first} and {key} are the same tensor; remove one of them")
    for keys in groups.values():
        wrong = flaw(keys)
        if wrong is not None:
            raise UserError(f"{where}: {next(iter(keys.values()))} {wrong}; the file is broken, fetch it again")


def _report_left(left: list[str], tensors: Mapping[str, Tensor], where: str, layout: str) -> None:
    if 2 * len(left) > len(tensors):
        raise UserError(
            f"{where}: {len(left)} of its {len(tensors)} keys fit no module of the model, such as {left[0]}; "
            f"{described(tensors)}"
        )
    if left:
        log.warning(
            "%s: %d of %d keys of the %s layout fit no module of the model and are left out, such as %s",
            where,
            len(left),
            len(tensors),
            layout,
            left[0],
        )


def _alphas(layout: str, metadata: Mapping[str, str], where: str) -> AlphaOf:
    if layout == "peft":
        beside = read_peft_alphas(Path(where))
        if beside is not None:
            return beside
        log.warning("%s: no adapter_config.json beside it tells the alphas; scaled by 1", where)
    return read_alphas(metadata, where)
