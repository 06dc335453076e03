"""Snapshots of averages on the disk, and an average of any length out of them.

A snapshot is written like a checkpoint: a folder named by its step, complete or absent. It has a file
`NETWORK-LENGTH.safetensors` for each average, and says in `state.json` what each holds. Networks are known here as
named tensors only, so whatever was trained, whole or adapters, can be put together.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.core.files import begin_folder, require_free_space
from latentgen.engine.checkpoint import Contents, Damaged, commit, name_of, steps_in, verify, write_contents
from latentgen.engine.ema_profiles import Fit, Profile, exponent_of, fit

logger = logging.getLogger(__name__)

NEGLIGIBLE = 1e-9
"""A factor that float32 weights do not feel: where a profile is there as it is, nothing else need be read."""


@dataclass(frozen=True)
class Snapshot:
    """One average at one step.

    Args:
        network: its name among the stage's modules.
        length: relative, see `engine.ema_profiles`.
        tensors: the state of the network by name; of one that is partly frozen, what changes.
        averaged: names of those that are averages; the others (buffers) are the newest values.
    """

    network: str
    step: int
    length: float
    tensors: dict[str, Tensor]
    averaged: frozenset[str]


@dataclass(frozen=True)
class Stored:
    """An average in a file."""

    file: Path
    network: str
    profile: Profile
    averaged: tuple[str, ...]


@dataclass(frozen=True)
class Rebuilt:
    """An average put together: what changes of the network in float32, and how well the profile was met."""

    step: int
    tensors: dict[str, Tensor]
    fit: Fit


def narrow(value: Tensor) -> Tensor:
    """A tensor for the disk, on the CPU: float16, or as it is where float16 would lose more than its last bits.

    Weights are far below float16's 65504 and round to 11 binary digits there, in bfloat16 to 8: the difference between
    two averages of one run is often a thousandth of a weight, and would be lost.
    """
    half = value.detach().to(torch.float16)
    fits = value.dtype.is_floating_point and bool(half.isfinite().all())
    return (half if fits else value.detach()).cpu()


def write_snapshot(folder: Path, step: int, averages: Sequence[Snapshot]) -> None:
    """Write `folder/STEP`; one that is there already is replaced when the new one is safe.

    Raises:
        UserError: the disk has too little room.
    """
    size = sum(t.numel() * t.element_size() for average in averages for t in average.tensors.values())
    require_free_space(folder, size, f"the snapshot of the averages at step {step}")

    files, about = {}, {}
    for average in averages:
        name = f"{average.network}-{average.length}.safetensors"
        files[name] = Contents({key: value.contiguous() for key, value in average.tensors.items()})
        about[name] = {"network": average.network, "length": average.length, "averaged": sorted(average.averaged)}
    listing = write_contents(begin_folder(folder / name_of(step)), files)
    commit(folder, step, {"averages": about}, listing, None)


def _undamaged(folder: Path, until: int | None) -> list[Stored]:
    """All averages in `folder` up to a step; damaged snapshots are named in a warning and passed over."""
    found: list[Stored] = []
    for step in steps_in(folder):
        if until is not None and step > until:
            continue
        path = folder / name_of(step)
        try:
            data = verify(path)
        except Damaged as wrong:
            logger.warning("snapshot %s: %s; going on without it", path, wrong)
            continue
        for name, about in data["averages"].items():
            profile = Profile(step, exponent_of(about["length"]))
            found.append(Stored(path / name, about["network"], profile, tuple(about["averaged"])))
    return found


def rebuild(folder: Path, network: str, length: float, step: int | None = None) -> Rebuilt:
    """The average of `network` with relative `length` after `step` steps, from the snapshots in `folder`.

    Args:
        step: one that has a snapshot; None is the last.

    Raises:
        UserError: no snapshots, or none of that step.
    """
    stored = [item for item in _undamaged(folder, step) if item.network == network]
    there = sorted({item.profile.step for item in stored})
    if not there:
        raise UserError(
            f"{folder}: no snapshots of averages of {network}"
            f"{'' if step is None else f' up to step {step}'}; train with train.ema_lengths=[0.05,0.10]"
        )
    last = there[-1]
    if step not in (None, last):
        raise UserError(f"{folder}: no snapshot of step {step}; the last before it is of step {last}")
    found = fit(Profile(last, exponent_of(length)), [item.profile for item in stored])
    return Rebuilt(last, _sum(stored, found.factors, last), found)


def _sum(stored: Sequence[Stored], factors: Sequence[float], last: int) -> dict[str, Tensor]:
    """Averages times factors, added in float64; what is no average as it is in the last snapshot.

    One file at a time, and a float64 copy of the network: however many snapshots there are, memory holds one.
    """
    newest = next(item for item in stored if item.profile.step == last)
    total: dict[str, Tensor] = {}
    for item, factor in zip(stored, factors, strict=True):
        if abs(factor) < NEGLIGIBLE:
            continue
        with safe_open(item.file, framework="pt") as file:
            for name in item.averaged:
                value = file.get_tensor(name).double().mul_(factor)
                total[name] = total[name].add_(value) if name in total else value
    found = {name: value.float() for name, value in total.items()}
    with safe_open(newest.file, framework="pt") as file:
        others = set(file.keys()) - found.keys()
        return found | {name: file.get_tensor(name) for name in sorted(others)}
