"""Adapters that are trained in the place of a network's own weights, by peft: LoRA, DoRA, LoKr, LoHa."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.loha import LoHaLayer
from peft.tuners.lokr import LoKrLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from latentgen.core.errors import UserError
from latentgen.models.deltas import TENSORS, Factors, scaled

ADAPTER = "default"
"""The name under which peft keeps the adapter; a network has one."""

KINDS = ("lora", "dora", "lokr", "loha")

GROUPS: Mapping[str, re.Pattern[str]] = {
    "attention": re.compile(r"\.attn\d\.to_(q|k|v|out\.0)$|\.self_attn\.(q|k|v|out)_proj$"),
    "feed_forward": re.compile(
        r"\.ff\.net\.(0\.proj|2)$|attentions\.\d+\.proj_(in|out)$|(^|\.)layers\.\d+\.mlp\.fc[12]$"
    ),
    "convolution": re.compile(
        r"\.resnets\.\d+\.(conv1|conv2|conv_shortcut)$|\.(down|up)samplers\.\d+\.conv$",
    ),
    "all": re.compile(""),
}
"""Targets by name. Of the U-Net's blocks and the text encoder's layers: the maps of attention, those of the perceptrons
and into and out of the transformers, the convolutions; and every linear layer and convolution that there is."""

INITS: Mapping[str, Mapping[str, bool | str]] = {
    "lora": {"default": True, "gaussian": "gaussian"},
    "dora": {"default": True, "gaussian": "gaussian"},
    "lokr": {"default": True, "lycoris": "lycoris"},
    "loha": {"default": True},
}


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """What adapter to train, and where.

    Attributes:
        kind: "lora" (arXiv 2106.09685), "dora" (2402.09353), "lokr" (2309.14859) or "loha" (2108.06098).
        rank: length of the inner dimension.
        alpha: the change is scaled by alpha / rank; None: by 1.
        dropout: probability in [0, 1): of an input of the adapter (lora, dora), of an output row (lokr, loha).
        targets: names of GROUPS, or regular expressions that are searched in the modules' paths.
        rank_pattern: regular expression, searched in a target's path, to its rank; the first that is found counts.
        alpha_pattern: the same for alpha.
        use_rslora: scale by alpha / sqrt(rank) (arXiv 2312.03732); lora and dora.
        init: a name in INITS. Each makes an adapter that changes nothing yet.
        factor: of lokr, the size of the first Kronecker factor; -1: as near to the square root as divides.
    """

    kind: Literal["lora", "dora", "lokr", "loha"] = "lora"
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] = ("attention",)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    init: str = "default"
    factor: int = -1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f'adapter: kind "{self.kind}" is unknown; use {", ".join(KINDS)}')
        for rank in (self.rank, *self.rank_pattern.values()):
            if rank < 1:
                raise UserError(f"adapter: rank {rank} must be 1 or more")
        for alpha in (*([] if self.alpha is None else [self.alpha]), *self.alpha_pattern.values()):
            if not 0 < alpha < float("inf"):
                raise UserError(f"adapter: alpha {alpha} must be above 0; leave it out for a scale of 1")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"adapter: dropout {self.dropout} is outside [0, 1)")
        if not self.targets:
            raise UserError(f"adapter: no targets; name some of {', '.join(GROUPS)}, or regular expressions")
        for pattern in (*self.targets, *self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f'adapter: "{pattern}" is not a regular expression: {error}') from error
        if self.init not in INITS[self.kind]:
            raise UserError(
                f'adapter: init "{self.init}" is unknown for {self.kind}; use {", ".join(INITS[self.kind])}'
            )
        if self.use_rslora and self.kind not in ("lora", "dora"):
            raise UserError(f"adapter: use_rslora is for lora and dora, not for {self.kind}; leave it out")
        if self.factor != -1 and (self.kind != "lokr" or self.factor < 1):
            raise UserError(f"adapter: factor {self.factor} must be 1 or more, and is for lokr only")


def adaptable(network: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The linear layers and convolutions of a network, by path.

    Paths are those of `named_modules`, but begin below the `text_model.` that some text encoders have and others have
    not. Where an adapter sits, the layer is the network's own below it.
    """
    found: dict[str, nn.Linear | nn.Conv2d] = {}
    inside: list[str] = []
    for name, module in network.named_modules():
        if any(name.startswith(above) for above in inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside.append(f"{name}.")
            module = module.get_base_layer()
        if isinstance(module, nn.Linear | nn.Conv2d):
            found[name.removeprefix("text_model.")] = module
    return found


def targets_of(networks: Mapping[str, nn.Module], spec: AdapterSpec) -> dict[str, list[str]]:
    """For each network, the paths, as in `adaptable`, of the modules that `spec` adapts.

    Raises:
        UserError: a regular expression is in no path of any network, or a network has no target.
    """
    paths = {name: list(adaptable(network)) for name, network in networks.items()}
    everything = [path for own in paths.values() for path in own]
    for target in spec.targets:
        if target not in GROUPS and not _searched(target, everything):
            raise UserError(f'adapter: target "{target}" is in no module{_nearest(target, everything)}')
    patterns = [GROUPS.get(target, target) for target in spec.targets]
    chosen = {name: [path for path in own if any(re.search(p, path) for p in patterns)] for name, own in paths.items()}
    for name, own in chosen.items():
        if not own:
            raise UserError(
                f"adapter: {name} has no modules in {', '.join(spec.targets)}; leave it out, or add one of "
                f"{', '.join(GROUPS)}"
            )
    targets = [path for own in chosen.values() for path in own]
    for pattern in (*spec.rank_pattern, *spec.alpha_pattern):
        if not _searched(pattern, targets):
            raise UserError(f'adapter: pattern "{pattern}" is in none of the targets{_nearest(pattern, targets)}')
    return chosen


def _searched(pattern: str, paths: Iterable[str]) -> list[str]:
    return [path for path in paths if re.search(pattern, path)]


def _nearest(pattern: str, paths: Iterable[str]) -> str:
    """Names that were perhaps meant: whole paths, or ends of them."""
    plain = re.sub(r"[\\^$()*+?\[\]|]", "", pattern).strip(".")
    ends = {".".join(path.split(".")[-n:]) for path in paths for n in range(1, path.count(".") + 2)}
    near = difflib.get_close_matches(plain, sorted(ends), n=3, cutoff=0.5)
    return f"; the nearest are {', '.join(near)}" if near else f"; a module is called {next(iter(paths))}"


def add_adapters(networks: Mapping[str, nn.Module], spec: AdapterSpec) -> None:
    """Put a new adapter into each network, in place, and freeze everything else.

    The adapters' weights are float32, whatever type a network has, and are drawn from torch's global generator, network
    by network: seed it to have the same ones. The networks' outputs do not change yet.

    Args:
        networks: by "unet", "text_encoder", "text_encoder_2", or any names; messages use them.
        spec: the same for all; a pattern need only be found in one of them.

    Raises:
        UserError: `spec` does not fit the networks, or one has an adapter already; nothing is changed then.
    """
    targets = targets_of(networks, spec)
    for name, network in networks.items():
        if any(isinstance(module, BaseTunerLayer) for module in network.modules()):
            raise UserError(f"adapter: {name} has one already; train that, or load the model again")
        modules = adaptable(network)
        for path in targets[name]:
            module = modules[path]
            if spec.kind != "lora" and isinstance(module, nn.Conv2d) and module.groups > 1:
                raise UserError(f"adapter: {spec.kind} has no form for the grouped convolution {path}; use lora")
    for name, network in networks.items():
        inject_adapter_in_model(_config(spec, targets[name]), network, adapter_name=ADAPTER)
        network.requires_grad_(False)
        for parameter in adapter_parameters(network).values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        adapted = [path for path, module in network.named_modules() if isinstance(module, BaseTunerLayer)]
        matched = {path.removeprefix("text_model.") for path in adapted}
        assert matched == set(targets[name]), "peft matched other modules"


def _config(spec: AdapterSpec, targets: list[str]) -> LoraConfig | LoKrConfig | LoHaConfig:
    ranks = {path: _first(spec.rank_pattern, path, spec.rank) for path in targets}
    alphas = {path: _first(spec.alpha_pattern, path, spec.alpha) for path in targets}
    common: dict[str, Any] = {
        "r": spec.rank,
        "target_modules": targets,
        "rank_pattern": _by_value(ranks),
        "alpha_pattern": _by_value({path: alphas[path] or ranks[path] for path in targets}),
    }
    init: Any = INITS[spec.kind][spec.init]
    if spec.kind in ("lora", "dora"):
        return LoraConfig(
            lora_dropout=spec.dropout,
            use_rslora=spec.use_rslora,
            use_dora=spec.kind == "dora",
            init_lora_weights=init,
            **common,
        )
    if spec.kind == "lokr":
        return LoKrConfig(rank_dropout=spec.dropout, init_weights=init, decompose_factor=spec.factor, **common)
    return LoHaConfig(rank_dropout=spec.dropout, init_weights=init, **common)


def _by_value(values: Mapping[str, Any]) -> dict[str, Any]:
    """One regular expression for each value, which peft tries on every module; a path counts from its beginning."""
    paths: dict[Any, list[str]] = {}
    for path, value in values.items():
        paths.setdefault(value, []).append(re.escape(path))
    return {rf"^(?:text_model\.)?(?:{'|'.join(group)})": value for value, group in paths.items()}


def _first(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if re.search(pattern, path)), default)


@contextmanager
def switched_off(networks: Collection[nn.Module]) -> Iterator[None]:
    """Inside the block adapters do nothing; what requires gradients is as before afterwards."""
    layers = [layer for network in networks for layer in network.modules() if isinstance(layer, BaseTunerLayer)]
    parameters = [p for network in networks for p in adapter_parameters(network).values() if p.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for network in networks:
            for parameter in adapter_parameters(network).values():
                parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)


def adapter_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their names in the network; empty where there is no adapter."""
    found: dict[str, nn.Parameter] = {}
    for name, module in network.named_modules():
        if isinstance(module, BaseTunerLayer) and isinstance(module, nn.Module):
            parts = {part: value for part, value in module.named_parameters() if not part.startswith("base_layer.")}
            found |= {f"{name}.{part}": value for part, value in parts.items()}
    return found


def adapter_state(network: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors in peft's names (`….to_q.lora_A.weight`), sharing memory with the network.

    Raises:
        UserError: the network has no adapter.
    """
    _require_adapter(network)
    state = get_peft_model_state_dict(network, adapter_name=ADAPTER, save_embedding_layers=False)
    return {key: value.detach() for key, value in state.items()}


def load_adapter_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set the adapter's tensors to what `adapter_state` gave, for an adapter made from the same `AdapterSpec`.

    Raises:
        UserError: a tensor is missing, is not the adapter's, or has another shape; nothing is changed then.
    """
    own = adapter_state(network)
    for key in [*own, *state]:
        if key not in state or key not in own or state[key].shape != own[key].shape:
            what = (
                "is missing" if key not in state else "is not the adapter's" if key not in own else "has another shape"
            )
            raise UserError(f"adapter state: {key} {what}; use the adapter settings that it was saved with")
    set_peft_model_state_dict(network, dict(state), adapter_name=ADAPTER)


def _require_adapter(network: nn.Module) -> None:
    if not any(isinstance(module, BaseTunerLayer) for module in network.modules()):
        raise UserError(f"the {type(network).__name__} has no adapter; call add_adapters first")


def adapter_factors(network: nn.Module) -> dict[str, Factors]:
    """What the adapter of `network` does, by path as in `adaptable`; the tensors are copies on the CPU.

    Raises:
        UserError: the network has no adapter.
    """
    _require_adapter(network)
    readers: dict[type, Callable[[Any], Factors]] = {LoraLayer: _lora, LoKrLayer: _lokr, LoHaLayer: _loha}
    found: dict[str, Factors] = {}
    for name, module in network.named_modules():
        for kind, read in readers.items():
            if isinstance(module, kind):
                found[name.removeprefix("text_model.")] = read(module)
    return found


def _kept(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True).contiguous()


def _alpha(layer: Any) -> Tensor:
    """The alpha that, over the rank, is the layer's scale; with rsLoRA that is not the one it was made with."""
    return torch.tensor(float(layer.scaling[ADAPTER]) * layer.r[ADAPTER])


def _lora(layer: Any) -> Factors:
    down, up = (_kept(part[ADAPTER].weight) for part in (layer.lora_A, layer.lora_B))
    magnitude = None
    if ADAPTER in layer.lora_magnitude_vector:
        magnitude = _kept(layer.lora_magnitude_vector[ADAPTER].weight).reshape(-1, *[1] * (down.dim() - 1))
    return Factors("lora", {"down": down, "up": up}, _alpha(layer), magnitude)


def _loha(layer: Any) -> Factors:
    parts = {name: getattr(layer, f"hada_{name}") for name in TENSORS["loha"]}
    return Factors(
        "loha", {name: _kept(part[ADAPTER]) for name, part in parts.items() if ADAPTER in part}, _alpha(layer)
    )


def _lokr(layer: Any) -> Factors:
    parts = {name: getattr(layer, f"lokr_{name}") for name in TENSORS["lokr"]}
    tensors = {name: _kept(part[ADAPTER]) for name, part in parts.items() if ADAPTER in part}
    factors = Factors("lokr", tensors)
    if factors.rank is None:  # whole factors have nothing that alpha could be divided by
        return scaled(factors, layer.scaling[ADAPTER])
    return Factors("lokr", tensors, _alpha(layer))
