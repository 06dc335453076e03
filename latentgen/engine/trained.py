"""The networks of a stage while they are trained: as they are, wrapped for several processes, averaged, optimized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentgen.core.errors import UserError
from latentgen.engine import optim, sharding
from latentgen.engine.changing import Changing
from latentgen.engine.ema import Ema
from latentgen.engine.ema_host import HostEma
from latentgen.engine.ema_lengths import EmaLengths
from latentgen.engine.settings import LoopSettings
from latentgen.engine.sharding import Sharding
from latentgen.engine.task import Phase, Task
from latentgen.engine.world import check_found


class Trained:
    """Takes the task's modules to the device and puts their wrappers into `task.modules`.

    With `shards`, the networks that have an average are cut over the processes; the others, small, are left to DDP.

    Attributes:
        plain: name -> the network itself.
        changing: name -> what of it changes.
        ema: name -> the average that is previewed and exported.
        lengths: the averages for `latentgen ema`.
        optimizers: phase -> accelerate's wrapper.

    Raises:
        UserError: a network is not wrapped as asked for; a phase has nothing to train of one, or in half precision.
    """

    def __init__(
        self, task: Task, settings: LoopSettings, accelerator: Accelerator, shards: Sharding | None = None
    ) -> None:
        self.accelerator = accelerator
        self.plain = {name: module.to(accelerator.device) for name, module in task.modules.items()}
        self.changing = {name: Changing(module) for name, module in self.plain.items()}
        for phase in task.phases():
            self._check(phase)
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
                rates=phase.rates,
                no_decay=phase.no_decay,
            )
            self.optimizers[phase.name] = accelerator.prepare(optimizer)
        for name, module in self.plain.items():
            cut = shards is not None and name in self.ema
            # In accelerate's words, evaluation_mode is mixed precision without DDP, which takes nothing that is frozen.
            bare = cut or not self.changing[name].parameters
            task.modules[name] = accelerator.prepare_model(module.train(), evaluation_mode=bare)
        check_found(task.modules, self.ema.keys() if shards is not None else (), accelerator.num_processes)

    def _check(self, phase: Phase) -> None:
        """Raise `UserError` for what no optimizer could train, or only with updates that are lost to rounding."""
        assert {*phase.rates, *phase.no_decay} <= {*phase.trains}, phase
        for name in phase.trains:
            trained = self.changing[name].parameters
            if not trained:
                raise UserError(
                    f"the network {name} has nothing to train: all of it is frozen; leave it out, or adapt it"
                )
            for key in sorted(trained):
                dtype = self.plain[name].get_parameter(key).dtype
                if dtype.itemsize < 4:
                    raise UserError(
                        f"the network {name} cannot be trained in {str(dtype).removeprefix('torch.')} ({key}): load "
                        "what is trained in float32; train.precision is what it computes in"
                    )

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
