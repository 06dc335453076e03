"""A toy of which most is frozen: an adapter on a base in half precision, a learned token, a critic that starts late."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import faulty
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentgen.core.rand import Draw
from latentgen.engine.loop import Loop
from latentgen.engine.settings import StagePaths
from latentgen.engine.sharding import Sharding
from latentgen.engine.task import Phase

STEPS = 6
SETTINGS = replace(
    faulty.SETTINGS, steps=STEPS, save_every=1, log_every=4, ema_lengths=(0.1,), ema_snapshots=2, ema_precision="fp32"
)
FROZEN = {"scale", "base.0.weight", "base.0.bias", "base.1.weight", "base.1.bias"}
NORM = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
TRAINED = {"down.weight", "up.weight", "up.bias"}


class Cast(nn.Linear):
    """Weights in half precision, computed in the input's."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


class Adapted(nn.Module):
    """Frozen: a scalar, and a base of which a layer is called twice. Trained: matrices large and small."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.base = nn.ModuleList([Cast(6, 16), Cast(16, 16)]).bfloat16()
        self.requires_grad_(False)
        self.norm = nn.BatchNorm1d(16, momentum=0.5, affine=False) if norm else nn.Identity()
        self.down = nn.Linear(16, 3, bias=False)
        self.up = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.base[0](x) * self.scale.exp())
        x = self.base[1](torch.tanh(self.base[1](self.norm(x)))) + self.up(x)
        return self.down(x)


class Token(nn.Module):
    """A row beside a frozen table."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.zeros(1, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.row


class Partial:
    """Regression, with a critic that is frozen while it judges.

    Args:
        norm: with statistics of batches, which several processes do not share.
        seed: of all weights.
    """

    name = "toy"

    def __init__(self, norm: bool = True, seed: int = 0) -> None:
        torch.manual_seed(seed)
        still = nn.Linear(3, 3).requires_grad_(False)
        self.modules: dict[str, nn.Module] = {
            "net": Adapted(norm), "token": Token(), "critic": nn.Linear(3, 1), "still": still,
        }  # fmt: skip
        self.critic = self.modules["critic"]
        self.averaged: tuple[str, ...] = ("net", "token", "still")

    def phases(self) -> tuple[Phase, ...]:
        first = Phase("net", ("net", "token"), rates={"token": 3.0}, no_decay=("token",))
        return first, Phase("critic", ("critic",), start=2)

    def losses(self, phase: str, batch: Any, draw: Draw) -> dict[str, Tensor]:
        out = self.modules["still"](self.modules["net"](self.modules["token"](batch["x"])))
        if phase == "critic":
            self.critic.requires_grad_(True)
            return {"loss": (self.modules["critic"](out.detach()) - 1).square().mean()}
        judged = self.critic.requires_grad_(False)(out).mean()
        return {"loss": (out - batch["y"]).square().mean() - 0.1 * judged}

    def preview(self, averaged: Mapping[str, nn.Module], step: int, folder: Path) -> dict[str, float]:
        with torch.no_grad():
            return {"out": float(averaged["still"](averaged["net"](averaged["token"](torch.ones(1, 6)))).sum())}


def partial_loop(
    folder: Path,
    accelerator: Accelerator,
    shards: Sharding | None = None,
    *,
    norm: bool = True,
    seed: int = 0,
    micro: int | None = None,
    **changes: Any,
) -> Loop:
    settings = replace(SETTINGS, **changes)
    paths = StagePaths(folder / "c", folder / "s", folder / "m.jsonl", folder / "tb", folder / "e")
    loader = faulty.data(accelerator, settings.steps, micro)
    return Loop(Partial(norm, seed), loader, settings, accelerator, paths, shards)
