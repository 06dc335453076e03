"""Where a run keeps what it makes. docs/run-folder.md is the reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ADAPTER_INDEX = "adapter.json"
"""In an adapter folder, what it holds and what it belongs to."""


@dataclass(frozen=True)
class RunFolder:
    """The paths below `runs/NAME`; makes nothing by itself."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def model(self) -> Path:
        """The finished diffusers model folder: present only when every stage is done."""
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        """What fine-tuning learned beside the model it started from: small matrices, words."""
        return self.path / "adapter"

    @property
    def control(self) -> Path:
        """The finished ControlNet, where one was trained instead of a model."""
        return self.path / "control"

    def samples(self, stage: str) -> Path:
        """Preview grids of one stage, one PNG a preview step."""
        return self.path / "samples" / stage

    def ema(self, stage: str) -> Path:
        """Snapshots of a stage's averages of `train.ema_lengths`."""
        return self.path / "ema" / stage

    def checkpoints(self, stage: str) -> Path:
        return self.path / "checkpoints" / stage

    def result(self, stage: str) -> Path:
        """What a finished stage hands to the next: present only when the stage is done."""
        return self.path / "stages" / stage


def newest_with_averages(root: Path, stage: str) -> Path | None:
    """The run folder below `root` with the newest snapshots of a stage's averages, or None."""
    found = [folder for folder in root.glob(f"*/ema/{stage}/*") if folder.is_dir()]
    return max(found, key=lambda folder: (folder.stat().st_mtime_ns, str(folder))).parents[2] if found else None


def newest_finished(root: Path) -> Path | None:
    """The most recently finished run's model folder or adapter folder below `root`, or None."""
    results = ("*/model/model_index.json", f"*/adapter/{ADAPTER_INDEX}")
    done = [file for result in results for file in root.glob(result) if file.is_file()]
    return max(done, key=lambda file: (file.stat().st_mtime_ns, str(file))).parent if done else None
