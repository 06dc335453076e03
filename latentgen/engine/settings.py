"""Plain values that tell the loop how long, how fast and where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from latentgen.engine.optim import learning_rate


@dataclass(frozen=True)
class LoopSettings:
    """How a stage is trained; the fields are those of the recipe's `train` section, and of `preview`.

    Args:
        fit_micro_batch: find how many examples fit into memory at once, and lower it when it runs out.
    """

    steps: int
    optimizer: str
    learning_rate: float
    schedule: str
    warmup_steps: int
    final_learning_rate: float
    weight_decay: float
    beta1: float
    beta2: float
    grad_clip: float
    ema_decay: float
    log_every: int
    save_every: int
    keep_last: int
    preview_every: int
    fit_micro_batch: bool = False
    trackers: tuple[str, ...] = ()
    bad_steps: int = 10
    spikes: float | None = 20.0
    rollback_every: int | None = None
    keep_every: int | None = None
    keep_best: int = 0
    ema_lengths: tuple[float, ...] = ()
    ema_snapshots: int | None = None
    ema_precision: str = "fp16"
    ema_device: str | None = None

    def snapshot_every(self) -> int:
        """Steps between two snapshots of the averages of `ema_lengths`: a twentieth of the run unless it is said."""
        return self.ema_snapshots or max(1, self.steps // 20)

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step `step` (from 0)."""
        return learning_rate(
            step,
            peak=self.learning_rate,
            schedule=self.schedule,
            warmup=self.warmup_steps,
            steps=self.steps,
            final=self.final_learning_rate,
        )


@dataclass(frozen=True)
class StagePaths:
    """Where a stage writes."""

    checkpoints: Path
    samples: Path
    metrics: Path
    tensorboard: Path
    ema: Path | None = None
