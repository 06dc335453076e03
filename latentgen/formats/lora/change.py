"""New LoRA files from models and from other files: extracted, resized, combined.

All of it is truncated singular value decomposition, which is the best approximation of its rank (Eckart, Young 1936).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from latentgen.core.errors import UserError
from latentgen.core.tensors import require_finite
from latentgen.formats.lora.file import LoraFile
from latentgen.models.adapters import adaptable
from latentgen.models.deltas import Factors, without_mid

log = logging.getLogger(__name__)

STALE = ("ss_network_dim", "ss_network_alpha", "ss_network_module", "ss_network_args")
"""Entries of a file's header that its change makes untrue."""


def extract(
    base: Mapping[str, nn.Module],
    tuned: Mapping[str, nn.Module],
    rank: int,
    conv_rank: int | None = None,
    *,
    energy: float | None = None,
    clamp: float | None = None,
) -> LoraFile:
    """The LoRA that, merged into `base`, is nearest to `tuned`.

    Modules that do not differ are left out. Differences in biases, normalisations and embeddings cannot be in a LoRA;
    how many there are is said in the log.

    Args:
        base, tuned: networks of equal shapes, by "unet", "text_encoder", "text_encoder_2".
        rank: of linear layers and 1x1 convolutions.
        conv_rank: of larger convolutions; None: as `rank`. 0 leaves them out.
        energy: in (0, 1]: of each module keep only the rank that holds this part of the squared singular values; the
            ranks above are then the most.
        clamp: in (0, 1): cut off entries of the factors above this quantile of their magnitudes.

    Raises:
        UserError: the networks do not fit together or do not differ, or a number is out of range.
        FloatingPointError: a difference is not finite.
    """
    conv_rank = rank if conv_rank is None else conv_rank
    if rank < 1 or conv_rank < 0:
        raise UserError(f"extract: rank {rank} must be 1 or more, conv_rank {conv_rank} 0 or more")
    _require_part("energy", energy)
    _require_part("clamp", clamp)
    if set(base) != set(tuned):
        raise UserError(
            f"extract: one model has {', '.join(base)}, the other {', '.join(tuned)}; use two of one family"
        )
    modules: dict[str, dict[str, Factors]] = {}
    for name in base:
        old, new = adaptable(base[name]), adaptable(tuned[name])
        different = [path for path in {**old, **new} if path not in old or path not in new]
        different += [path for path in old if path in new and old[path].weight.shape != new[path].weight.shape]
        if different:
            raise UserError(f"extract: {name} {different[0]} is not the same in both models; use two of one family")
        for path, module in old.items():
            change = new[path].weight.detach().float() - module.weight.detach().float()
            require_finite({f"{name} {path}": change}, "the extracted LoRA")
            wanted = conv_rank if change.dim() == 4 and change.shape[2:].numel() > 1 else rank
            if wanted and change.any():
                factors = _clamped(_truncated(change, wanted, energy), clamp)
                modules.setdefault(name, {})[path] = factors
        _report_rest(name, base[name], tuned[name])
    if not modules:
        raise UserError("extract: no linear layer and no convolution differs between the two models")
    return LoraFile(modules=modules)


def _require_part(name: str, value: float | None) -> None:
    if value is not None and not 0 < value <= 1:
        raise UserError(f"{name} {value} is outside (0, 1]")


def _report_rest(name: str, old: nn.Module, new: nn.Module) -> None:
    held = {id(module.weight) for network in (old, new) for module in adaptable(network).values()}
    theirs = dict(new.named_parameters())
    rest = [
        key
        for key, value in old.named_parameters()
        if id(value) not in held and (theirs[key].shape != value.shape or not torch.equal(theirs[key], value))
    ]
    if rest:
        log.warning("%s: %d tensors differ that a LoRA cannot hold, such as %s", name, len(rest), rest[0])


def _truncated(change: Tensor, rank: int, energy: float | None) -> Factors:
    """The LoRA of at most `rank` nearest to a change [o, i, ...], with the scale 1."""
    u, s, vh = torch.linalg.svd(change.flatten(1), full_matrices=False)
    kept = _kept_rank(s, rank, energy)
    root = s[:kept].sqrt()  # in both factors alike, so that neither leaves the range of float16
    up, down = u[:, :kept] * root, root[:, None] * vh[:kept]
    spatial = [1] * (change.dim() - 2)
    return Factors("lora", {"down": down.reshape(kept, *change.shape[1:]), "up": up.reshape(*up.shape, *spatial)})


def _kept_rank(s: Tensor, rank: int, energy: float | None) -> int:
    if energy is None:
        return min(rank, len(s))
    squares = s.double().square().cumsum(0)
    enough = int((squares < energy * squares[-1]).sum()) + 1
    return min(rank, enough, len(s))


def _clamped(factors: Factors, quantile: float | None) -> Factors:
    if quantile is None:
        return factors
    entries = torch.cat([value.flatten() for value in factors.tensors.values()]).abs()
    # torch.quantile takes no more than 2^24 numbers.
    bound = entries.sort().values[round(quantile * (len(entries) - 1))].item()
    return Factors(factors.kind, {name: value.clamp(-bound, bound) for name, value in factors.tensors.items()})


def resize(file: LoraFile, rank: int | None = None, *, energy: float | None = None) -> LoraFile:
    """The same LoRA with fewer ranks, each module as near to what it was as its rank allows.

    Ranks never grow: a module that has no more than `rank` is left as it is.

    Args:
        file: of LoRA only.
        rank: the most that a module may have; None: as many as `energy` asks for.
        energy: in (0, 1]: part of the squared singular values that is kept.

    Raises:
        UserError: neither rank nor energy, a number out of range, or adapters other than LoRA.
    """
    if rank is None and energy is None:
        raise UserError("resize: give a rank, an energy or both")
    if rank is not None and rank < 1:
        raise UserError(f"resize: rank {rank} must be 1 or more")
    _require_part("energy", energy)
    _require_lora("resize", file)

    def smaller(factors: Factors) -> Factors:
        assert factors.rank is not None
        if energy is None and rank is not None and factors.rank <= rank:
            return factors
        return _shrunk(without_mid(factors), rank or factors.rank, energy)

    modules = {name: {path: smaller(f) for path, f in own.items()} for name, own in file.modules.items()}
    return LoraFile(modules=modules, metadata=_still_true(file.metadata))


def _shrunk(factors: Factors, rank: int, energy: float | None) -> Factors:
    """Through the small matrix between two orthogonal ones: the change itself is never made."""
    dtype = factors.tensors["up"].dtype
    up, down = factors.scale * factors.tensors["up"].float(), factors.tensors["down"].float()
    q_up, r_up = torch.linalg.qr(up.flatten(1))
    q_down, r_down = torch.linalg.qr(down.flatten(1).T)
    small = _truncated(r_up @ r_down.T, rank, energy).tensors
    tensors = {
        "down": (small["down"] @ q_down.T).unflatten(1, down.shape[1:]),
        "up": (q_up @ small["up"]).reshape(up.shape[0], -1, *up.shape[2:]),
    }
    return Factors("lora", {name: value.to(dtype) for name, value in tensors.items()})


def combine(
    files: Sequence[LoraFile],
    weights: Sequence[float] | None = None,
    *,
    method: Literal["concat", "svd"] = "concat",
    rank: int | None = None,
) -> LoraFile:
    """One LoRA that changes weights by the weighted sum of what `files` change.

    Args:
        files: of LoRA only; each may adapt other modules.
        weights: one for each file; None: 1.
        method: "concat" is exact, and its ranks are the sums; "svd" cuts them to `rank`.
        rank: the most that a module may have after "svd".

    Raises:
        UserError: numbers that do not fit, or adapters whose changes do not add up in this form.
    """
    weights = [1.0] * len(files) if weights is None else list(weights)
    if not files or len(weights) != len(files):
        raise UserError(f"combine: {len(weights)} weights for {len(files)} files; give one for each")
    if method not in ("concat", "svd"):
        raise UserError(f'combine: method "{method}" is unknown; use concat or svd')
    if (rank is not None) != (method == "svd"):
        raise UserError("combine: method svd needs a rank, concat has none")
    for file in files:
        _require_lora("combine", file)
    parts: dict[str, dict[str, list[tuple[float, Factors]]]] = {}
    for file, weight in zip(files, weights, strict=True):
        for name, own in file.modules.items():
            for path, factors in own.items():
                parts.setdefault(name, {}).setdefault(path, []).append((weight, without_mid(factors)))
    modules = {name: {path: _joined(name, path, p) for path, p in own.items()} for name, own in parts.items()}
    combined = LoraFile(modules=modules)
    return combined if rank is None else resize(combined, rank)


def _joined(network: str, path: str, parts: Sequence[tuple[float, Factors]]) -> Factors:
    shapes = {(f.tensors["up"].shape[0], f.tensors["down"].shape[1:].numel()) for _, f in parts}
    if len(shapes) > 1:
        raise UserError(f"combine: {network} {path} has other sizes in another file; they are for different models")
    most = max((f.tensors["down"].dim() for _, f in parts))
    downs, ups = [], []
    for weight, factors in parts:
        down, up = factors.tensors["down"].float(), factors.tensors["up"].float()
        # A 1x1 convolution may be stored as a linear layer.
        downs.append(down.reshape(*down.shape, *[1] * (most - down.dim())))
        ups.append((weight * factors.scale * up).reshape(*up.shape, *[1] * (most - up.dim())))
    return Factors("lora", {"down": torch.cat(downs), "up": torch.cat(ups, dim=1)})


def _require_lora(verb: str, file: LoraFile) -> None:
    for name, own in file.modules.items():
        for path, factors in own.items():
            if factors.kind != "lora" or not factors.linear:
                what = factors.kind if factors.linear else "DoRA, whose changes do not add up"
                raise UserError(
                    f"{verb}: {name} {path} is {what}; merge it into its model and extract a LoRA from that"
                )


def _still_true(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key not in STALE}
