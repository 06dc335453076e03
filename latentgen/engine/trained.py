"""The networks of a stage while they are trained: as they are, wrapped for several processes, averaged, optimized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentgen.core.errors import UserError
from latentgen.engine import optim, sharding
from latentgen.engine.ema import Ema
from latentgen.engine.ema_host import HostEma
from latentgen.engine.ema_lengths import EmaLengths
from latentgen.engine.settings import LoopSettings
from latentgen.engine.sharding import Sharding
from latentgen.engine.task import Task
from latentgen.engine.world import check_found


class Trained:
    """Takes the task's modules to the device and puts their wrappers into `task.modules`.

    With `shards`, the networks that have an average are cut over the processes; the others, small, are left to DDP.

    Attributes:
        plain: name -> the network itself.
        ema: name -> the average that is previewed and exported.
        lengths: the averages for `latentgen ema`.
        optimizers: phase -> accelerate's wrapper.

    Raises:
        UserError: a network is not wrapped as asked for.
    """

    def __init__(
        self, task: Task, settings: LoopSettings, accelerator: Accelerator, shards: Sharding | None = None
    ) -> None:
        self.accelerator = accelerator
        self.plain = {name: module.to(accelerator.device) for name, module in task.modules.items()}
        kind = HostEma if settings.ema_device == "cpu" else Ema
        if kind is HostEma and shards is not None:
            raise UserError("train.ema_device: with FSDP averages are cut over the processes already; leave it out")
        self.ema = {name: kind(self.plain[name], settings.ema_decay) for name in task.averaged}
        self.lengths = EmaLengths(
            {name: self.plain[name] for name in task.averaged},
            settings.ema_lengths,
            settings.snapshot_every(),
            wide=settings.ema_precision == "fp32",
            kind=kind,
        )
        if shards is not None:
            for name, ema in self.ema.items():
                sharding.shard(self.plain[name], shards, accelerator.device)
                ema.follow_sharded(self.plain[name])
            self.lengths.follow_sharded()
        self.optimizers: dict[str, Any] = {}
        fast_bf16 = accelerator.mixed_precision == "bf16" and accelerator.device.type == "cuda"
        for phase in task.phases():
            optimizer = optim.build_optimizer(
                {name: self.plain[name] for name in phase.trains},
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
                rates=phase.rates,
                no_decay=phase.no_decay,
            task.modules[name] = accelerator.prepare_model(module.train(), evaluation_mode=cut)
        check_found(task.modules, self.ema.keys() if shards is not None else (), accelerator.num_processes)

    def averages(self) -> dict[str, Ema]:
        """All that is tracked, by the name it has in a checkpoint."""
        return {**self.ema, **self.lengths.averages}

    def move_averages(self, step: int, skip: Tensor) -> None:
        """After optimizer step `step`, unless `skip` is 1."""
        for name, ema in self.ema.items():
            ema.update(self.plain[name], step, skip)
        self.lengths.update(step, skip)

    def averaged(self, *, everywhere: bool = False) -> Mapping[str, nn.Module]:
        """The averaged networks, whole. All processes must ask; the main one gets them, or all do."""
        averages = {name: ema.on(self.accelerator.device) for name, ema in self.ema.items()}
        return sharding.assemble(averages, everywhere or self.accelerator.is_main_process)
