"""Learning-rate schedules as pure functions of the step, and the optimizer."""

from __future__ import annotations

import importlib
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from latentgen.core.errors import UserError
from latentgen.engine.muon import Muon, matrices_of
from latentgen.engine.sharding import cut, rows

Groups = list[dict[str, Any]]
"""Parameters and what holds for them, as torch's optimizers take them."""


def learning_rate(step: int, *, peak: float, schedule: str, warmup: int, steps: int, final: float = 0.0) -> float:
    """The learning rate of optimizer step `step` (from 0): linear warm-up, then the schedule.

    Args:
        peak: the highest rate.
        schedule: "cosine" or "linear" down to `final * peak` at the last step, "constant", or "inverse_sqrt"
            (peak * sqrt(warmup / step), as in arXiv 1706.03762, section 5.3).
        warmup: steps until the peak.
        steps: length of the run.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    if schedule == "inverse_sqrt":
        return peak * math.sqrt(max(warmup, 1) / max(step + 1, 1))
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    if schedule == "linear":
        return peak * (final + (1 - final) * (1 - progress))
    if schedule == "cosine":
        return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))
    raise ValueError(f"train.schedule: {schedule!r} is not one of cosine, linear, constant, inverse_sqrt")


def build_optimizer(
    modules: Mapping[str, nn.Module],
    *,
    kind: str,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    dtype: torch.dtype = torch.float32,
    rates: Mapping[str, float] | None = None,
    no_decay: Collection[str] = (),
) -> torch.optim.Optimizer:
    """The optimizer of these modules' trainable parameters; matrices decay, vectors do not.

    Each of its groups is of one module, and has that module's factor on the learning rate as `rate`: see `set_rate`.

    Args:
        modules: by name.
        kind: "adamw", with the fused kernel (on the CPU a third of the default's time), "adamw8bit", or "muon" for the
            matrices of layers and AdamW for the rest.
        dtype: that Muon turns matrices in.
        rates: module -> factor on the learning rate; 1 where nothing is said.
        no_decay: modules of which nothing decays.

    Raises:
        UserError: the library of "adamw8bit" is missing.
    """
    # A group for each module: one may be cut over processes where another is not, and a fused kernel takes no mixture.
    turned, matrices, vectors = Groups(), Groups(), Groups()
    for name, module in modules.items():
        about = {"rate": (rates or {}).get(name, 1.0), "weight_decay": 0.0 if name in no_decay else weight_decay}
        layers = matrices_of([module]) if kind == "muon" else []
        taken = set(layers)
        rest = [p for p in module.parameters() if p.requires_grad and p not in taken]
        turned.append({**about, "params": layers})
        matrices.append({**about, "params": [p for p in rest if p.ndim > 1]})
        vectors.append({**about, "params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0})
    turned, groups = ([group for group in some if group["params"]] for some in (turned, matrices + vectors))
    optimizer = _optimizer(kind, turned, groups, lr, betas, dtype)
    set_rate(optimizer, lr)
    return optimizer


def _optimizer(
    kind: str, turned: Groups, groups: Groups, lr: float, betas: tuple[float, float], dtype: torch.dtype
) -> torch.optim.Optimizer:
    if kind == "muon":
        return Muon(turned, groups, lr=lr, betas=betas, dtype=dtype)
    if kind == "adamw8bit":
        return _adamw8bit(groups, lr, betas)
    if kind != "adamw":
        raise ValueError(f"train.optimizer: {kind!r} is not one of adamw, adamw8bit, muon")
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next step; each module's is this times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate"]


def _adamw8bit(groups: Groups, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """AdamW with block-wise 8-bit moments (arXiv 2110.02861); its state is plain tensors, so checkpoints hold it."""
    try:
        library = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise UserError(
            "train.optimizer: adamw8bit needs bitsandbytes: pip install bitsandbytes, or choose adamw"
        ) from error
    return library.optim.AdamW8bit(groups, lr=lr, betas=betas)


def flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as flat tensors named `PARAMETER.KEY`; scalars become 0-d tensors."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for number, slots in state.items()
        for key, value in slots.items()
    }


def unflatten(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of `flatten` into an optimizer of the same parameters, which may be cut: of tensors that are whole or
    this process's parts.

    Each moment gets its parameter's memory layout back: the fused kernel walks both by address.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, key = name.split(".", 1)
        parameter = parameters[int(number)]
        own = rows(parameter)
        part = None if own is None else (len(own), *parameter.shape[1:])
        if value.shape in (parameter.shape, part):
            value = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(cut(value, parameter))
        else:
            value = value.clone()  # optimizers count in place, and would count in the tensors given
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
