"""Plain values that tell the loop how long, how fast and where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LoopSettings:
    """How a stage is trained; the fields are those of the recipe's `train` section."""

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


@dataclass(frozen=True)
class StagePaths:
    """Where a stage writes."""

    checkpoints: Path
    samples: Path
    metrics: Path
    tensorboard: Path
