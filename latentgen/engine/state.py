"""What changes while a stage trains, to and from a checkpoint: the same file whether networks are cut or whole."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from latentgen.engine import optim, sharding
from latentgen.engine.checkpoint import Checkpoint, Tensors, Wanted
from latentgen.engine.guard import Guard
from latentgen.engine.memory import Fitting
from latentgen.engine.meter import Meter
from latentgen.engine.rollback import GOOD, Rollback
from latentgen.engine.trained import Trained
from latentgen.engine.validation import Validation


class State:
    """The changing parts of a stage."""

    def __init__(
        self,
        trained: Trained,
        meter: Meter,
        guard: Guard,
        fitting: Fitting,
        rollback: Rollback,
        validation: Validation | None = None,
    ) -> None:
        self.trained, self.averages, self.optimizers = trained, trained.averages(), trained.optimizers
        self.accelerator = trained.accelerator
        self.meter, self.guard, self.fitting, self.validation = meter, guard, fitting, validation
        self.rollback = rollback

    def groups(self) -> dict[str, Tensors]:
        """What a step changes: these tensors themselves."""
        tensors = self._of_networks()
        tensors |= {f"optimizer-{name}": optim.flatten(o.optimizer) for name, o in self.optimizers.items()}
        return tensors | {"spikes": self.guard.spikes.state_dict()}

    def _of_networks(self) -> dict[str, Tensors]:
        modules, changing = self.trained.plain, self.trained.changing
        weights = {f"weights-{name}": changing[name].tensors(module) for name, module in modules.items()}
        return weights | {f"ema-{name}": ema.state_dict() for name, ema in self.averages.items()}

    def put(self, tensors: Mapping[str, Tensors]) -> None:
        """Take such groups back, copied; what is cut is given as this process's rows, or whole."""
        own = self._of_networks()
        for name in self.trained.plain:
            sharding.load(own[f"weights-{name}"], tensors[f"weights-{name}"])
        for name, ema in self.averages.items():
            ema.load_state_dict(tensors[f"ema-{name}"])
        for name, optimizer in self.optimizers.items():
            optim.unflatten(optimizer.optimizer, tensors[f"optimizer-{name}"])
        if "spikes" in tensors:  # checkpoints made before there were any have none
            self.guard.spikes.load_state_dict(tensors["spikes"])

    def snapshot(self, step: int) -> Checkpoint:
        """The state after `step` steps, of the tensors themselves, which training changes. All processes must ask."""
        tensors = self.groups()
        kept = self.rollback.contents(tensors)
        tensors["meter"] = self.meter.state_dict(self.accelerator)
        if self.validation is not None:
            tensors["validation"] = self.validation.state_dict()
        scaler = self.accelerator.scaler
        data = {
            "scaler": scaler.state_dict() if scaler is not None else None,
            "guard": self.guard.state_dict(),
            "good": self.rollback.state_dict(),
            "micro_batch": self.fitting.size,
        }
        return Checkpoint(step, tensors, data, kept)

    def wanted(self) -> Wanted:
        """The rows of each tensor of a checkpoint that this process has use for."""
        own = self._of_networks()
        trained = {
            f"optimizer-{name}": [p for group in o.optimizer.param_groups for p in group["params"]]
            for name, o in self.optimizers.items()
        }

        def rows(group: str, name: str, shape: torch.Size) -> range | None:
            group = group.removeprefix(GOOD)
            if group in trained:  # a parameter's moments are cut like itself
                like: Tensor | None = trained[group][int(name.partition(".")[0])]
            else:
                like = own.get(group, {}).get(name)
            return None if like is None or like.shape != shape else sharding.rows(like)

        return rows

    def restore(self, found: Checkpoint) -> None:
        """Take a checkpoint, of which every process has read what it has use for."""
        self.put(found.tensors)
        self.guard.load_state_dict(found.data["guard"])
        if found.data.get("good"):
            self.rollback.load_state_dict(found.data["good"], found.tensors)
        self.fitting.size = found.data.get("micro_batch") if self.fitting.active else None
        self.meter.load_state_dict(found.tensors["meter"], self.accelerator.device)
        if self.validation is not None and "validation" in found.tensors:  # it may be asked for later
            self.validation.load_state_dict(found.tensors["validation"])
        if self.accelerator.scaler is not None and found.data["scaler"]:
            self.accelerator.scaler.load_state_dict(found.data["scaler"])
