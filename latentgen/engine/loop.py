"""The training loop. It knows modules, phases and losses; it does not know pictures, captions or diffusion.

A step: for every phase the micro-batches' gradients are summed, clipped and applied; then the averages move. Nothing
is read from the device except on logging and saving steps. What survives a restart is in `State`; data and draws
follow from the step number alone.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.contrib.logging import logging_redirect_tqdm

from latentgen.core.errors import Interrupted
from latentgen.core.log import progress
from latentgen.core.rand import seed_of
from latentgen.engine import optim, sharding
from latentgen.engine.checkpoint import load_newest, save_checkpoint
from latentgen.engine.ema import Ema
from latentgen.engine.meter import Meter
from latentgen.engine.settings import LoopSettings, StagePaths
from latentgen.engine.sharding import Sharding
from latentgen.engine.state import State
from latentgen.engine.stop import StopRequest
from latentgen.engine.task import MicroBatches, Phase, StepData, Task
from latentgen.engine.trackers import Trackers

logger = logging.getLogger(__name__)


class Loop:
    """One stage's training: build it, then call `run`.

    With `shards`, the networks that have an average are cut over the processes; the others, small, are left to DDP.
    """

    def __init__(
        self,
        task: Task,
        data: StepData,
        settings: LoopSettings,
        accelerator: Accelerator,
        paths: StagePaths,
        shards: Sharding | None = None,
    ) -> None:
        self.task, self.data, self.settings, self.accelerator, self.paths = task, data, settings, accelerator, paths
        self.plain = {name: module.to(accelerator.device) for name, module in task.modules.items()}
        self.ema = {name: Ema(self.plain[name], settings.ema_decay) for name in task.averaged}
        if shards is not None:
            for name, ema in self.ema.items():
                sharding.shard(self.plain[name], shards, accelerator.device)
                ema.follow_sharded(self.plain[name])
        self.optimizers: dict[str, Any] = {}
        fast_bf16 = accelerator.mixed_precision == "bf16" and accelerator.device.type == "cuda"
        for phase in task.phases():
            optimizer = optim.build_optimizer(
                [self.plain[name] for name in phase.trains],
                kind=settings.optimizer,
                lr=settings.learning_rate,
                betas=(settings.beta1, settings.beta2),
                weight_decay=settings.weight_decay,
                dtype=torch.bfloat16 if fast_bf16 else torch.float32,
            )
            self.optimizers[phase.name] = accelerator.prepare(optimizer)
        for name, module in self.plain.items():
            cut = shards is not None and name in self.ema
            # In accelerate's words, evaluation_mode is mixed precision without DDP.
            task.modules[name] = accelerator.prepare_model(module.train(), evaluation_mode=cut)
        self.meter = Meter()
        self.state = State(self.plain, self.ema, self.optimizers, self.meter, accelerator)

    def averaged(self) -> Mapping[str, nn.Module]:
        """The averaged modules, to preview and export. All processes must ask; the main one gets them all, whole."""
        averages = {name: ema.averaged for name, ema in self.ema.items()}
        return sharding.assemble(averages, self.accelerator.is_main_process)

    def run(self) -> None:
        """Train to the last step, from the newest checkpoint when there is one.

        Raises:
            Interrupted: a signal asked to stop; the state is saved.
            FloatingPointError: the loss is not finite.
        """
        start, steps = self._restore(), self.settings.steps
        main = self.accelerator.is_main_process
        bar = progress(self.task.name, "step", total=steps, initial=start, disable=not main)
        trackers = Trackers(
            self.paths.metrics, self.paths.tensorboard, stage=self.task.name, start_step=start, active=main
        )
        redirect = logging_redirect_tqdm([logging.getLogger("latentgen")])
        with StopRequest() as stop, bar, trackers, redirect:
            if start == steps or start % self.settings.preview_every == 0:  # also one that a kill has swallowed
                self._preview(start, trackers)
            since, done = time.perf_counter(), start
            for step, micro_batches in self.data.iterate(start):
                self._step(step, micro_batches)
                count = step + 1
                last = count == steps
                logging_now, saving_now = (
                    last or count % every == 0 for every in (self.settings.log_every, self.settings.save_every)
                )
                stopping = self._agree(stop.asked, logging_now or saving_now)
                bar.update()
                if logging_now:
                    values = self.meter.read(self.accelerator)
                    now = time.perf_counter()
                    speed = {
                        "steps_per_second": (count - done) / (now - since),
                        "learning_rate": self.settings.rate(step),
                    }
                    trackers.log(count, "train", {**values, **speed})
                    bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
                    since, done = now, count
                if saving_now or stopping:
                    self._save(count)
                if stopping and not last:
                    raise Interrupted(f"stopped after step {count} of {steps}, saved; the same command continues")
                if last or count % self.settings.preview_every == 0:
                    self._preview(count, trackers)
        if self._agree(stop.asked, True):
            raise Interrupted(f"stopped after the last step of {self.task.name}, saved; the same command continues")

    def _step(self, step: int, micro_batches: MicroBatches) -> None:
        for phase in self.task.phases():
            if step >= phase.start:
                self._phase(phase, step, micro_batches)
        for name, ema in self.ema.items():
            ema.update(self.plain[name], step)

    def _phase(self, phase: Phase, step: int, micro_batches: MicroBatches) -> None:
        """One optimizer step: each process takes the mean over its rows, DDP the mean over processes."""
        optimizer, parts = self.optimizers[phase.name], len(micro_batches)
        optimizer.zero_grad(set_to_none=True)
        prefix = "" if phase.name == self.task.phases()[0].name else f"{phase.name}/"
        for number, (draw, batch) in enumerate(micro_batches):
            # Dropout and the like draw from torch's own generator, which must not remember earlier steps.
            torch.manual_seed(seed_of(draw.seed, draw.stage, phase.name, draw.step, draw.rows.start))
            with contextlib.ExitStack() as stack:
                if number < parts - 1:
                    for name in phase.trains:
                        stack.enter_context(self.accelerator.no_sync(self.task.modules[name]))
                losses = self.task.losses(phase.name, batch, draw)
                self.accelerator.backward(losses["loss"] / parts)
            for key, value in losses.items():
                self.meter.add(prefix + key, value / parts, count=number == parts - 1)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = self.accelerator.clip_grad_norm_(parameters, self.settings.grad_clip)
        norm = sharding.whole(torch.as_tensor(norm, device=self.accelerator.device))
        if self.accelerator.scaler is not None:  # float16 overflows by design: the scaler then skips the step
            norm = torch.where(norm.isfinite(), norm, torch.zeros_like(norm))
        self.meter.add(f"{prefix}grad_norm", norm)
        for group in optimizer.param_groups:
            group["lr"] = self.settings.rate(step)
        optimizer.step()

    def _agree(self, asked: bool, waiting: bool) -> bool:
        """Every process stops at the same step when one is asked to; several confer only where they wait anyway."""
        if self.accelerator.num_processes == 1:
            return asked
        if not waiting:
            return False
        flag = self.accelerator.reduce(torch.tensor(float(asked), device=self.accelerator.device), "sum")
        return bool(flag > 0)  # type: ignore[operator]

    def _preview(self, step: int, trackers: Trackers) -> None:
        averaged = self.averaged()
        if self.accelerator.is_main_process:
            values = self.task.preview(averaged, step, self.paths.samples)
            if values:
                trackers.log(step, "preview", values)
        self.accelerator.wait_for_everyone()

    def _save(self, step: int) -> None:
        self.meter.check(self.accelerator)
        snapshot = self.state.snapshot(step)
        if self.accelerator.is_main_process:
            save_checkpoint(self.paths.checkpoints, snapshot, self.settings.keep_last)
        self.accelerator.wait_for_everyone()

    def _restore(self) -> int:
        """Take the newest good checkpoint; return the number of steps done."""
        found = load_newest(self.paths.checkpoints)
        if found is None:
            return 0
        self.state.restore(found)
        logger.info("%s: continuing after step %d of %d", self.task.name, found.step, self.settings.steps)
        return found.step
