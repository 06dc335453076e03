"""What the headers of LoRA files say: settings of diffusers and peft, which tell the alphas, and kohya's `ss_*`."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.core.tensors import encoded
from latentgen.formats.lora.layouts import NETWORKS, UNET
from latentgen.models.deltas import Factors

DIFFUSERS_KEY = "lora_adapter_metadata"
"""Where diffusers (loaders/lora_base.py) keeps peft's settings, as JSON with the network's name before each."""
KOHYA_HASHES = ("sshs_model_hash", "sshs_legacy_hash")
"""Of the file that holds them; the second, of a part of it, is dropped and no tool needs it."""

AlphaOf = Callable[[str, str, int | None], float | None]
"""Network, module and rank to alpha, or to the scale where there is no rank; None where the header does not tell."""


def read_alphas(metadata: Mapping[str, str], where: str) -> AlphaOf:
    """The alphas in a header that diffusers wrote.

    Raises:
        UserError: the header's settings cannot be read.
    """
    text = metadata.get(DIFFUSERS_KEY)
    settings = _object(text, where) if text else {}
    return lambda network, module, rank: _alpha(
        {key.removeprefix(f"{network}."): value for key, value in settings.items() if key.startswith(f"{network}.")},
        module,
        rank,
    )


def read_peft_alphas(file: Path) -> AlphaOf | None:
    """The alphas in the adapter_config.json beside a peft file; None where there is none.

    Raises:
        UserError: it cannot be read.
    """
    config = file.with_name("adapter_config.json")
    if not config.is_file():
        return None
    settings = _object(config.read_text(), str(config))
    return lambda network, module, rank: _alpha(settings, module, rank)


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: the adapter's settings are not JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: the adapter's settings are not a JSON object; fetch the file again")
    return value


def _alpha(settings: Mapping[str, Any], module: str, rank: int | None) -> float | None:
    """peft's rule: a pattern that matches the module, else the one for all; rsLoRA divides by the root of the rank."""
    default = settings.get("lora_alpha", settings.get("alpha"))
    if default is None:
        return None
    alpha = float(_by_pattern(settings, "alpha_pattern", module, default))
    if rank is None:
        return alpha / _by_pattern(settings, "rank_pattern", module, settings.get("r", 1))
    return alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha


def _by_pattern(settings: Mapping[str, Any], name: str, module: str, default: float) -> float:
    patterns = settings.get(name) or {}
    return patterns.get(get_pattern_key(list(patterns), module), default)


def diffusers_metadata(modules: Mapping[str, Mapping[str, Factors]]) -> dict[str, str]:
    """The header from which diffusers and peft take the alphas; empty where none was set, as they then scale by 1."""
    settings: dict[str, Any] = {}
    for network, own in modules.items():
        loras = {path: factors for path, factors in own.items() if factors.kind == "lora"}
        if any(factors.alpha is not None for factors in loras.values()):
            settings |= {f"{network}.{key}": value for key, value in _peft_settings(network, loras).items()}
    return {DIFFUSERS_KEY: json.dumps(settings, indent=2, sort_keys=True)} if settings else {}


def _peft_settings(network: str, own: Mapping[str, Factors]) -> dict[str, Any]:
    ranks = {path: factors.tensors["down"].shape[0] for path, factors in own.items()}
    alphas = {
        path: float(ranks[path]) if factors.alpha is None else factors.alpha.item() for path, factors in own.items()
    }
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    # Text towers may have `text_model.` before the path, so only the U-Net's is known to begin here.
    start = "^" if network == UNET else ""
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {f"{start}{path}": value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {f"{start}{path}": _plain(value) for path, value in alphas.items() if value != alpha},
        "target_modules": sorted(own),
        "use_dora": any(factors.magnitude is not None for factors in own.values()),
        "use_rslora": False,
    }


def _plain(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _commonest(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


VERSIONS: Mapping[str, str] = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
"""Families in sd-scripts' `ss_base_model_version`."""


def kohya_metadata(modules: Mapping[str, Mapping[str, Factors]], family: str | None) -> dict[str, str]:
    """The `ss_*` entries that other tools show or sort by."""
    everything = [modules[network][path] for network in NETWORKS if network in modules for path in modules[network]]
    ranks = [factors.rank for factors in everything if factors.rank is not None]
    alphas = [factors.alpha.item() for factors in everything if factors.alpha is not None]
    kinds = sorted({factors.kind for factors in everything})
    plain = kinds == ["lora"] and all(factors.linear for factors in everything)
    header = {"ss_network_module": "networks.lora" if plain else "lycoris.kohya"}
    if ranks:
        header["ss_network_dim"] = str(_commonest(ranks))
    if alphas or ranks:
        header["ss_network_alpha"] = str(_commonest(alphas or [float(rank) for rank in ranks]))
    if not plain:
        algorithm = "locon" if kinds == ["lora"] else kinds[0]
        dora = any(not factors.linear for factors in everything)
        header["ss_network_args"] = json.dumps({"algo": algorithm, **({"dora_wd": "True"} if dora else {})})
    version = VERSIONS.get(family or "")
    if version is not None:
        header |= {"ss_base_model_version": version, "ss_v2": str(family == "sd2")}
    return header


def kohya_hash(tensors: Mapping[str, Tensor]) -> str:
    """sd-scripts' and AUTOMATIC1111's name for a LoRA: the SHA-256 of the file's tensors, without the header."""
    digest = hashlib.sha256()
    parts = encoded(tensors)
    next(parts)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
