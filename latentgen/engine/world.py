"""Devices, precision and processes, through accelerate; and the refusal to train in another world than asked for.

accelerate 1.15 starts ONE process for `accelerate launch --cpu --num_processes 2` and says nothing; and two torchrun
ranks on a machine without a GPU each believe to be alone unless `cpu=True` is passed. Both would train wrong silently.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil
import torch
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file
from accelerate.utils import InitProcessGroupKwargs
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from latentgen.core.errors import UserError
from latentgen.engine.agreement import LONGEST_WAIT
from latentgen.engine.sharding import Sharding

logger = logging.getLogger(__name__)

TWO_CPU = "accelerate launch --config_file configs/accelerate/two-cpu.yaml train.py --device cpu"
FSDP = "ACCELERATE_USE_FSDP"
WRAPPINGS = {
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
    "accelerate's parallelism_config": "ACCELERATE_USE_PARALLELISM_CONFIG",
}


@dataclass(frozen=True)
class World:
    """The processes, their devices and precision; and how networks are cut over them, if they are."""

    accelerator: Accelerator
    sharding: Sharding | None


def launcher_command() -> list[str]:
    """Command line of the `accelerate launch` above this process, or []."""
    for parent in psutil.Process().parents()[:3]:
        try:
            words = parent.cmdline()
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
        names = {Path(word).name for word in words}
        if {"accelerate", "launch"} <= names or {"accelerate-launch", "accelerate.commands.launch"} & names:
            return words
    return []


def processes_asked(
    launcher: Sequence[str], environment: Mapping[str, str], default_config: Path | None = None
) -> int | None:
    """How many processes the launcher was asked for, or None when it did not say.

    Args:
        launcher: the launcher's command line, [] without one.
        environment: the process's environment (torchrun sets WORLD_SIZE).
        default_config: what `accelerate config` wrote, which `accelerate launch` reads unless told otherwise.
    """
    if "WORLD_SIZE" in environment:
        return int(environment["WORLD_SIZE"])
    number, file = option(launcher, "num_processes"), option(launcher, "config_file")
    if number is not None and number.isdigit():
        return int(number)
    config = Path(file) if file is not None else default_config if launcher else None
    if config is not None and config.is_file():
        found = (yaml.safe_load(config.read_text()) or {}).get("num_processes")
        return int(found) if found is not None else None
    return None


def option(launcher: Sequence[str], name: str) -> str | None:
    """What the launcher's command line says after `--name`, with hyphens or underscores; None if nothing."""
    for word, after in pairwise([*launcher, ""]):
        key, _, value = word.partition("=")
        if key.replace("-", "_") == f"__{name}":
            return value or after
    return None


def check_world(found: int, asked: int | None, wanted: int | None) -> None:
    """Raise `UserError` when the number of processes found is not the one asked for.

    Args:
        asked: by the launcher, as `processes_asked` tells.
        wanted: by the recipe.
    """
    for number, by in ((asked, "the launcher was asked for"), (wanted, "the recipe (train.processes) asks for")):
        if number is not None and number != found:
            raise UserError(
                f"{by} {number} process{'es' if number > 1 else ''}, {found} found: nothing was trained; "
                f"for two CPU processes use `{TWO_CPU}`"
            )


def check_precision(precision: str, environment: Mapping[str, str], launcher: Sequence[str] = ()) -> None:
    """Raise `UserError` when the launcher's mixed precision contradicts the recipe's.

    `accelerate launch` passes "no" on also where nobody chose it: unless its command line says so, that is a warning.

    Args:
        launcher: the launcher's command line, [] without one.
    """
    launched = environment.get("ACCELERATE_MIXED_PRECISION", "").lower()
    wanted = {"fp32": "no"}.get(precision, precision)
    if launched in ("", wanted):
        return
    if launched != "no" or option(launcher, "mixed_precision") is not None:
        raise UserError(
            f"train.precision is {precision} but the launcher says --mixed_precision {launched}: make them agree, "
            f"with --mixed_precision {wanted} or another train.precision"
        )
    logger.warning("the launcher's mixed_precision: no is ignored, train.precision decides: %s", precision)


def warn_of_slow_bf16(capability: str) -> None:
    """Say so where a processor, known by what PyTorch calls it, multiplies bfloat16 number by number."""
    if capability in ("DEFAULT", "AVX2"):
        logger.warning(
            "train.precision: bf16 is many times slower than fp32 on this processor (%s has no instructions for it); "
            "say train.precision=fp32",
            capability,
        )


def check_wrapping(environment: Mapping[str, str], precision: str) -> None:
    """Raise `UserError` when the launcher asks for a wrapping, or a variety of FSDP, that this trainer cannot do."""
    for name, variable in WRAPPINGS.items():
        if asks(environment, variable):
            raise UserError(
                f"the launcher asks for {name}, which this trainer cannot do; "
                "use configs/accelerate/many-gpus.yaml, or fsdp2.yaml beside it"
            )
    if not asks(environment, FSDP):
        return
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(
            f"the launcher asks for FSDP version {version}, this trainer does version 2: set fsdp_version: 2, "
            "or use configs/accelerate/fsdp2.yaml"
        )
    for setting in ("offload_params", "activation_checkpointing"):
        if asks(environment, f"FSDP_{setting.upper()}"):
            raise UserError(f"the launcher says fsdp_{setting}: true, which this trainer cannot do; leave it out")
    if precision == "fp16":
        raise UserError("train.precision: fp16 cannot be trained with FSDP; use bf16 or fp32")


def check_found(modules: Mapping[str, nn.Module], cut: Collection[str], processes: int) -> None:
    """Raise `UserError` unless every trained network is wrapped as asked for.

    Libraries leave a network alone where they cannot wrap it, without a word: each process would train its own.

    Args:
        modules: the networks as they are called.
        cut: names of those that FSDP2 was asked to cut; the others are to be under DDP.
        processes: how many there are; one needs no wrapping.
    """
    for name, module in modules.items():
        if name in cut:
            parts = [p for p in module.parameters() if p.ndim > 0]
            here = sum(p.to_local().numel() for p in parts if isinstance(p, DTensor))
            whole = [p for p in parts if not isinstance(p, DTensor) or p.device_mesh.size() != processes]
            most = sum(-(-p.shape[0] // processes) * p.shape[1:].numel() for p in parts)
            found = isinstance(module, FSDPModule) and not whole and here <= most
            asked = f"FSDP2, cut over {processes} processes"
        else:
            trained = any(p.requires_grad for p in module.parameters())
            found = processes == 1 or not trained or isinstance(module, DistributedDataParallel)
            asked = f"DDP over {processes} processes"
        if not found:
            raise UserError(
                f"{asked} was asked for, but the network {name} is a plain {type(module).__name__}: nothing was "
                "trained; use a launcher file of configs/accelerate"
            )


def sharding_asked(environment: Mapping[str, str]) -> Sharding | None:
    """What the launcher says of FSDP2, when it asks for it."""
    if not asks(environment, FSDP):
        return None
    policy = environment.get("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP")
    if policy != "SIZE_BASED_WRAP":
        logger.warning("fsdp_auto_wrap_policy: %s is ignored; layers are grouped by fsdp_min_num_params", policy)
    least = int(environment.get("FSDP_MIN_NUM_PARAMS", Sharding.min_parameters))
    return Sharding(least, environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false")


def asks(environment: Mapping[str, str], variable: str) -> bool:
    """Whether a switch is on, as launchers spell it."""
    return environment.get(variable, "false").lower() in ("true", "1")


def make_world(precision: str, processes: int | None = None, device: str | None = None) -> World:
    """The accelerator of this process, and how to shard when the launcher asks for it.

    Args:
        precision: "fp32", "bf16" or "fp16".
        processes: refuse to go on unless exactly so many processes are found.
        device: "cpu" forces the CPU; None takes a GPU when there is one.

    Raises:
        UserError: the world, the wrapping or the precision found is not the one asked for.
    """
    if device not in (None, "cpu"):
        raise UserError(f"--device {device}: training takes cpu, or the GPUs that the launcher gives it (leave it out)")
    launcher = launcher_command()
    check_precision(precision, os.environ, launcher)
    check_wrapping(os.environ, precision)
    sharding = sharding_asked(os.environ)
    if sharding is not None:
        os.environ[FSDP] = "false"  # accelerate is to hold processes and precision, and leave the networks alone
    cpu = device == "cpu" or not torch.accelerator.is_available()
    if cpu and precision == "fp16":
        raise UserError("train.precision: fp16 needs a GPU; use bf16 or fp32 on the CPU")
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision={"fp32": "no"}.get(precision, precision),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )
    if cpu and precision == "bf16" and accelerator.is_main_process:
        warn_of_slow_bf16(torch.backends.cpu.get_cpu_capability())
    asked = processes_asked(launcher, os.environ, Path(default_config_file))
    check_world(accelerator.num_processes, asked, processes)
    if sharding is not None:
        if accelerator.num_processes == 1:
            raise UserError(
                "the launcher asks for FSDP, 1 process found: nothing to share, nothing was trained; "
                "ask for more processes, or use configs/accelerate/one-gpu.yaml"
            )
        count = accelerator.num_processes
        logger.info("FSDP2: weights, gradients, moments and averages are cut over %d processes", count)
    if cpu and (launcher or "WORLD_SIZE" in os.environ):
        _share_cores()
    return World(accelerator, sharding)


def _share_cores() -> None:
    """Launchers set OMP_NUM_THREADS=1 for every process; give each its share of the cores instead."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // local))
