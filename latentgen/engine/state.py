"""What changes while a stage trains, to and from a checkpoint: the same file whether networks are cut or whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch import nn

from latentgen.engine import optim, sharding
from latentgen.engine.checkpoint import Checkpoint, Tensors
from latentgen.engine.ema import Ema
from latentgen.engine.meter import Meter


@dataclass(frozen=True)
class State:
    """The changing parts of a stage; optimizers are accelerate's wrappers."""

    modules: dict[str, nn.Module]
    averages: dict[str, Ema]
    optimizers: dict[str, Any]
    meter: Meter
    accelerator: Accelerator

    def snapshot(self, step: int) -> Checkpoint:
        """The state after `step` steps. All processes must ask; the main one gets the tensors, whole."""
        cut: dict[str, Tensors] = {f"weights-{name}": dict(m.state_dict()) for name, m in self.modules.items()}
        cut |= {f"ema-{name}": ema.state_dict() for name, ema in self.averages.items()}
        cut |= {f"optimizer-{name}": optim.flatten(o.optimizer) for name, o in self.optimizers.items()}
        main = self.accelerator.is_main_process
        tensors = {group: sharding.gather(values, keep=main) for group, values in cut.items()}
        tensors["meter"] = self.meter.state_dict(self.accelerator)
        scaler = self.accelerator.scaler
        return Checkpoint(step, tensors, {"scaler": scaler.state_dict() if scaler is not None else None})

    def restore(self, found: Checkpoint) -> None:
        """Take a checkpoint, which every process has read; each keeps its part."""
        for name, module in self.modules.items():
            sharding.load(module, found.tensors[f"weights-{name}"])
        for name, ema in self.averages.items():
            ema.load_state_dict(found.tensors[f"ema-{name}"])
        for name, optimizer in self.optimizers.items():
            optim.unflatten(optimizer.optimizer, found.tensors[f"optimizer-{name}"])
        self.meter.load_state_dict(found.tensors["meter"], self.accelerator.device)
        if self.accelerator.scaler is not None and found.data["scaler"]:
            self.accelerator.scaler.load_state_dict(found.data["scaler"])
