"""One step: for every phase the micro-batches' gradients are summed, clipped, judged and applied; then averages move.

Nothing is read from the device here (on the CPU, where that costs nothing, the verdict is).
"""

from __future__ import annotations

import contextlib

import torch
from accelerate import Accelerator
from torch import Tensor

from latentgen.core.rand import seed_of
from latentgen.engine import optim, sharding
from latentgen.engine.guard import Guard
from latentgen.engine.memory import Fitting
from latentgen.engine.meter import Meter
from latentgen.engine.settings import LoopSettings
from latentgen.engine.task import MicroBatches, Phase, Task
from latentgen.engine.trained import Trained

Seen = list[dict[str, Tensor]]
"""What the task reported of each micro-batch."""


class Stepper:
    """Does the steps of one stage; call it."""

    def __init__(
        self,
        task: Task,
        trained: Trained,
        settings: LoopSettings,
        accelerator: Accelerator,
        meter: Meter,
        guard: Guard,
        fitting: Fitting,
    ) -> None:
        self.task, self.trained, self.settings, self.accelerator = task, trained, settings, accelerator
        self.meter, self.guard, self.fitting = meter, guard, fitting

    def __call__(self, step: int, micro_batches: MicroBatches) -> None:
        self.guard.begin()
        if any(phase.start == step for phase in self.task.phases()):
            self.guard.spikes.forget()
        for phase in self.task.phases():
            if step >= phase.start:
                self._phase(phase, step, micro_batches)
        self.guard.end()
        self.trained.move_averages(step, self.guard.skip)

    def gradients(self, phase: Phase, micro_batches: MicroBatches, *, alone: bool = False) -> tuple[MicroBatches, Seen]:
        """Set the gradients of the phase: the mean over this process's rows, which DDP takes the mean of.

        Args:
            alone: tell no other process.

        Returns:
            The micro-batches, as they are, and what was seen of each.
        """
        self.trained.optimizers[phase.name].zero_grad(set_to_none=True)
        parts, seen = len(micro_batches), Seen()
        for number, (draw, batch) in enumerate(micro_batches):
            # Dropout and the like draw from torch's own generator, which must not remember earlier steps.
            torch.manual_seed(seed_of(draw.seed, draw.stage, phase.name, draw.step, draw.rows.start))
            with contextlib.ExitStack() as stack:
                if alone or number < parts - 1:
                    for name in phase.trains:
                        stack.enter_context(self.accelerator.no_sync(self.task.modules[name]))
                losses = self.task.losses(phase.name, batch, draw)
                self.accelerator.backward(losses["loss"] / parts)
            seen.append({key: value.detach() for key, value in losses.items()})
        return micro_batches, seen

    def _phase(self, phase: Phase, step: int, micro_batches: MicroBatches) -> None:
        optimizer = self.trained.optimizers[phase.name]
        prefix = "" if phase.name == self.task.phases()[0].name else f"{phase.name}/"
        buffers = [(b, b.clone()) for module in self.trained.plain.values() for b in module.buffers()]
        done, seen = self.fitting.attempt(micro_batches, lambda parts: self.gradients(phase, parts))
        norm = self._clipped(optimizer)
        names = [prefix + key for key in (*seen[-1], "grad_norm")]
        skip = self.guard.judge(step, phase.name, names, [values["loss"] for values in seen], norm, done)
        for number, values in enumerate(seen):
            for key, value in values.items():
                self.meter.add(prefix + key, _unless(skip, value / len(seen)), count=number == len(seen) - 1)
        self.meter.add(f"{prefix}grad_norm", _unless(skip, norm))
        optim.set_rate(optimizer, self.settings.rate(step))
        self.guard.apply(optimizer)
        _take_back(buffers, skip)

    def _clipped(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Clip the gradient; its norm before that, over all processes, 0-d."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = self.accelerator.clip_grad_norm_(parameters, self.settings.grad_clip)
        norm = sharding.whole(torch.as_tensor(norm, device=self.accelerator.device))
        if self.accelerator.scaler is not None:  # float16 overflows by design: the scaler then skips the step
            norm = torch.where(norm.isfinite(), norm, torch.zeros_like(norm))
        return norm


@torch.no_grad()
def _take_back(buffers: list[tuple[Tensor, Tensor]], skip: Tensor) -> None:
    """Give buffers their values of before where the step is skipped: a forward pass moves statistics of batches."""
    for buffer, before in buffers:
        buffer.copy_(torch.where(skip > 0, before, buffer))


def _unless(skip: Tensor, value: Tensor) -> Tensor:
    """`value`, or zero where the step is skipped."""
    return torch.where(skip > 0, torch.zeros_like(value), value)
