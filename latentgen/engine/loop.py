"""The training loop. It knows modules, phases and losses; it does not know pictures, captions or diffusion.

Step after step (`engine.step`), and between them what is due: a line of the log, a validation, a checkpoint, a preview.
What survives a restart is in `State`; data and draws follow from the step number alone.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from accelerate import Accelerator
from torch import nn
from tqdm.contrib.logging import logging_redirect_tqdm

from latentgen.core.errors import Interrupted, UserError
from latentgen.core.files import remove_folder
from latentgen.core.log import progress
from latentgen.engine.agreement import anywhere
from latentgen.engine.checkpoint import Keep, name_of, steps_in
from latentgen.engine.guard import Guard, require_finite
from latentgen.engine.memory import Fitting, Untouched, reserve
from latentgen.engine.meter import Meter
from latentgen.engine.rollback import Rollback
from latentgen.engine.saver import Saver
from latentgen.engine.settings import LoopSettings, StagePaths
from latentgen.engine.sharding import Sharding
from latentgen.engine.spikes import Spikes
from latentgen.engine.state import State
from latentgen.engine.step import Stepper
from latentgen.engine.task import StepData, Task
from latentgen.engine.trackers import Trackers
from latentgen.engine.trained import Trained
from latentgen.engine.validation import Validation
from latentgen.engine.watch import Watch

logger = logging.getLogger(__name__)


class Loop:
    """One stage's training: build it, then call `run`.

    Args:
        shards: see `Trained`.
        validation: measures the averages now and then.
        on_preview: called by the main process when there is something new to look at.
        watch: is told what this process is at, and knows whether to stop.
    """

    def __init__(
        self,
        task: Task,
        data: StepData,
        settings: LoopSettings,
        accelerator: Accelerator,
        paths: StagePaths,
        shards: Sharding | None = None,
        validation: Validation | None = None,
        on_preview: Callable[[], None] = lambda: None,
        watch: Watch | None = None,
    ) -> None:
        self.task, self.data, self.settings, self.accelerator, self.paths = task, data, settings, accelerator, paths
        self.validation, self.on_preview = validation, on_preview
        self.watch = watch or Watch(accelerator)
        self.stop = self.watch.stop
        if settings.fit_micro_batch and shards is not None:
            raise UserError("train.micro_batch: auto cannot be found with FSDP; give a number")
        self.trained = Trained(task, settings, accelerator, shards)
        self.meter = Meter()
        self.guard = Guard(accelerator, settings.bad_steps, Spikes(settings.spikes, accelerator.device))
        self.rollback = Rollback(accelerator, self.guard.spikes, settings.rollback_every)
        self.fitting = Fitting(accelerator, active=settings.fit_micro_batch)
        self.step = Stepper(task, self.trained, settings, accelerator, self.meter, self.guard, self.fitting)
        self.state = State(self.trained, self.meter, self.guard, self.fitting, self.rollback, validation)
        keep = Keep(settings.keep_last, settings.keep_every, settings.keep_best)
        self.saver = Saver(paths.checkpoints, keep, accelerator, sharded=shards is not None)
        if keep.best and validation is None and accelerator.is_main_process:
            logger.warning("train.keep_best: nothing is validated, so no checkpoint is kept for being good")

    def averaged(self) -> Mapping[str, nn.Module]:
        """The averaged modules, to preview and export. All processes must ask; the main one gets them all, whole."""
        return self.trained.averaged()

    def run(self) -> None:
        """Train to the last step, from the newest checkpoint when there is one.

        Raises:
            Interrupted: a signal asked to stop; the state is saved.
            FloatingPointError: too many steps in a row were not finite, or a weight is not, or going back to a good
                state did not help; nothing of that is saved.
            UserError: a checkpoint could not be written, or none of those there is undamaged.
        """
        start, steps = self._restore(), self.settings.steps
        intervals = (self.settings.log_every, self.settings.save_every)
        if self.settings.fit_micro_batch and start == 0:
            self._rehearse()
        main = self.accelerator.is_main_process
        bar = progress(self.task.name, "step", total=steps, initial=start, disable=not main)
        trackers = Trackers(
            self.paths.metrics,
            self.paths.tensorboard,
            stage=self.task.name,
            start_step=start,
            names=self.settings.trackers,
            active=main,
            again=("preview", "validation") if self._validation_due(start) else ("preview",),
        )
        redirect = logging_redirect_tqdm([logging.getLogger("latentgen")])
        with self.stop, self.stop.postponed(), self.saver, bar, trackers, redirect, self._reported():
            self._begin(start, trackers)
            pace = Pace(start)
            for step, micro_batches in self.data.iterate(start):
                count = step + 1
                self.watch.mark(f"{self.task.name}, step {count}")
                self.step(step, micro_batches)
                bar.update()
                logging_now, saving_now = (count == steps or count % every == 0 for every in intervals)
                stopping = self._stopping()
                self.saver.check(together=logging_now or saving_now)
                looking_back = self.rollback.due(count)
                if logging_now or saving_now or stopping or looking_back or self.guard.host:
                    self._look(trackers)
                if looking_back:
                    self._look_back(count, trackers)
                if logging_now:
                    values = self.meter.read(self.accelerator)
                    speed = {"steps_per_second": pace(count), "learning_rate": self.settings.rate(step)}
                    trackers.log(count, "train", {**values, **speed})
                    if "loss" in values:
                        bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
                if self._between(count, stopping, saving_now, trackers):
                    raise Interrupted(f"stopped after step {count} of {steps}, saved; the same command continues")
                self.watch.mark(f"{self.task.name}, data of step {count + 1}")
        if self._stopping():
            raise Interrupted(f"stopped after the last step of {self.task.name}, saved; the same command continues")

    def _between(self, count: int, stopping: bool, saving_now: bool, trackers: Trackers) -> bool:
        """Do what is due after `count` steps; True when a signal asks to stop, and all is saved."""
        last = count == self.settings.steps
        if self.trained.lengths.due(count, self.settings.steps):
            self._save_lengths(count)
        if not stopping and self._validation_due(count):  # before the checkpoint, which keeps the score
            stopping = not self._validate(count, trackers)
        if saving_now or stopping:
            self._save(count)
        if not stopping and (last or count % self.settings.preview_every == 0):
            stopping = not self._preview(count, trackers)
            if stopping and not saving_now:
                self._save(count)
        return stopping

    def _restore(self) -> int:
        """Take the newest good checkpoint; return the number of steps done."""
        found = self.saver.load(self.state.wanted())
        if found is None:
            return 0
        self.state.restore(found)
        logger.info("%s: continuing after step %d of %d", self.task.name, found.step, self.settings.steps)
        return found.step

    def _rehearse(self) -> None:
        """Find how many examples fit at once beside all that a run holds: moments, gradients, a preview, a save."""
        _, micro_batches = next(iter(self.data.iterate(0)))
        with Untouched(list(self.trained.plain.values())), tempfile.TemporaryDirectory() as folder:
            held = [reserve(optimizer.optimizer) for optimizer in self.trained.optimizers.values()]
            for phase in self.task.phases():
                self.fitting.rehearse(micro_batches, lambda parts, p=phase: self.step.gradients(p, parts, alone=True))
            averaged = self.averaged()
            if self.accelerator.is_main_process:
                with self.watch.following(averaged.values()):
                    self.task.preview(averaged, 0, Path(folder))
            self.state.snapshot(0)
            del held
        self.accelerator.wait_for_everyone()

    def _begin(self, start: int, trackers: Trackers) -> None:
        """What is due at the first step, or was when a kill or a signal came."""
        going = True
        if start == self.settings.steps or start % self.settings.preview_every == 0:
            going = self._preview(start, trackers)
        if going and self._validation_due(start):
            going = self._validate(start, trackers)
            if going and start > 0:  # the checkpoint of this step is to have its score
                self._save(start)
        if not going or self._stopping():
            raise Interrupted(f"stopped with {start} of {self.settings.steps} steps done; the same command continues")
        self.watch.mark(f"{self.task.name}, data of step {start + 1}")

    def _look(self, trackers: Trackers) -> None:
        """Read the guard's verdicts: bad steps leave the means, are written down, and may be too many."""
        entries = self.guard.read()
        for entry in entries:
            self.meter.forget(entry["names"])
            said = {key: value for key, value in entry.items() if key not in ("step", "names")}
            trackers.log(entry["step"], "guard", said)
        self.guard.raise_if_hopeless(entries)

    def _look_back(self, count: int, trackers: Trackers) -> None:
        """Keep a good state, or go back to it; averages of steps that are undone make no snapshots."""
        entry = self.rollback.look(count, self.state.groups(), self.state.put)
        if entry is None:
            return
        trackers.log(count, "guard", entry)
        if self.paths.ema is not None and self.accelerator.is_main_process:
            for step in steps_in(self.paths.ema):
                if step > entry["to"]:
                    remove_folder(self.paths.ema / name_of(step))

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """A run that stops because its numbers went wrong leaves a report."""
        try:
            yield
        except FloatingPointError:
            if self.accelerator.is_main_process:
                self.on_preview()
            raise

    def _validation_due(self, step: int) -> bool:
        return self.validation is not None and self.validation.due(step, self.settings.steps)

    def _validate(self, step: int, trackers: Trackers) -> bool:
        """Measure the averages; False when a signal asked to stop meanwhile, and nothing was measured."""
        assert self.validation is not None
        self.watch.mark(f"{self.task.name}, validation of step {step}")
        networks = self.trained.averaged(everywhere=True)
        values = self.validation.run(networks, step, self.accelerator, self._stopping)
        if values is None:
            return False
        trackers.log(step, "validation", values)
        return True

    def _stopping(self) -> bool:
        """Whether a signal asked any process to stop; then all are asked."""
        self.watch.move()
        stopping = anywhere(self.accelerator, self.stop.asked)
        if stopping:
            self.stop.asked = True
        return stopping

    def _save(self, step: int) -> None:
        """Begin to write a checkpoint, with the score of this very state, where it was measured."""
        snapshot = self.state.snapshot(step)
        require_finite(snapshot.tensors, self.accelerator, f"the checkpoint of step {step}")
        score = self.validation.score if self.validation is not None else None
        self.saver.save(snapshot, score.loss if score is not None and score.step == step else None)

    def _save_lengths(self, step: int) -> None:
        """Before the checkpoint of the same step, so that none of a step is ever without the snapshots up to it."""
        assert self.paths.ema is not None
        averages = {key: ema.state_dict() for key, ema in self.trained.lengths.averages.items()}
        require_finite(averages, self.accelerator, f"the snapshot of step {step}")
        self.trained.lengths.save(self.paths.ema, step, main=self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()

    def _preview(self, step: int, trackers: Trackers) -> bool:
        """Draw the averages; False when a signal asked to stop meanwhile, and the preview is due again."""
        self.watch.mark(f"{self.task.name}, preview of step {step}")
        averaged = self.averaged()
        if self.accelerator.is_main_process:
            with contextlib.suppress(Interrupted), self.watch.following(averaged.values()):
                values = self.task.preview(averaged, step, self.paths.samples)
                trackers.picture(step, self.paths.samples / f"{step:08d}.png")
                trackers.log(step, "preview", values)
                self.on_preview()
        self.watch.mark(f"{self.task.name}, after the preview of step {step}")
        return not self._stopping()


class Pace:
    """Steps a second since the last reading."""

    def __init__(self, done: int) -> None:
        self._done, self._since = done, time.perf_counter()

    def __call__(self, done: int) -> float:
        before, since = self._done, self._since
        self._done, self._since = done, time.perf_counter()
        return (done - before) / (self._since - since)
