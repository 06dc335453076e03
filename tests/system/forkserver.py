"""Starts the command line many times for the price of one import.

Not a test. Reads one JSON request a line, answers one JSON line. {"argv": [...]} forks a process that runs
`latentgen ARGV` as its own program, in its own process group; {"wait": PID} waits for its end.

A program may carry "hooks": {"kill": [FUNCTION, CALL, SIGNAL]} sends itself a signal when a function has been called
so often (before that call's work for SIGKILL, after it for others), {"free_bytes": N} makes the disk look full,
{"eater": [CALL, FILE, N]} leaves N bytes of FILE's disk when the CALL-th checkpoint is about to be written,
{"pause": FILE} trains no step until FILE is there, {"chunk": N} makes caches work in smaller pieces,
{"env": {...}} sets its environment (two of a world make one run),
{"patience": {...}} how soon processes give each other up, {"ask": [FUNCTION, CALL, SIGNAL, TIMES]} sends itself a
signal before a call, so often, {"halt": [FUNCTION, CALL, SECONDS]} sleeps before a call, {"slow": [FUNCTION, SECONDS]}
before each, {"fail": [FUNCTION, CALL, TEXT]} meets a user's mistake,
{"room": N} lets memory run out where a U-Net is trained with more than N examples at once,
{"draws": FOLDER} records all draws, {"wrong": [WHAT, STAGE, STEPS, VALUE]} puts the VALUE ("nan") into the loss, or a
number of a gradient, a batch or a weight, in these steps of a stage.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def main() -> None:
    for name in ("latentgen.recipe.run", "latentgen.recipe.plan", "latentgen.cli.main", "latentgen.cli.drawing"):
        importlib.import_module(name)
    gc.freeze()  # the children need not look through all that was imported
    for line in sys.stdin:
        request = json.loads(line)
        answer = wait(request["wait"], request["timeout"]) if "wait" in request else start(request)
        print(json.dumps(answer), flush=True)


def wait(pid: int, timeout: float) -> int | None:
    """The exit status as `subprocess` gives it (negative: killed by that signal); None when it had to be stopped."""
    end = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.01)


def start(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        os.chdir(request["cwd"])
        for number, name in enumerate((os.devnull, request["stdout"], request["stderr"])):
            handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, number)
            os.close(handle)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = program(request)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def program(request: dict[str, Any]) -> int:
    """What Python does with a script, as far as its exit status goes."""
    for name, value in request["hooks"].items():
        HOOKS[name](value)
    sys.argv = ["latentgen", *request["argv"]]
    from latentgen.cli.main import run

    try:
        run()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def around(
    path: str, call: int | None, before: Callable[[], object], after: Callable[[], object] = lambda: None
) -> None:
    """Have something done before and after the `call`-th call of a function, MODULE:NAME, or each call."""
    module_name, _, name = path.partition(":")
    owner: Any = importlib.import_module(module_name)
    *outer, name = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    plain, calls = getattr(owner, name), 0

    def counted(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        now = call in (calls, None)
        if now:
            before()
        result = plain(*args, **named)
        if now:
            after()
        return result

    setattr(owner, name, counted)


def kill(value: tuple[str, int, int]) -> None:
    path, call, number = value
    if number == signal.SIGKILL:
        around(path, call, lambda: os.kill(os.getpid(), number))
    else:  # as a terminal does on Ctrl-C: to the data workers as well
        around(path, call, lambda: None, lambda: os.killpg(0, number))


def ask(value: tuple[str, int, int, int]) -> None:
    path, call, number, times = value

    def send() -> None:
        for again in range(times):
            time.sleep(1.2 * (again > 0))  # or it would be taken for an echo
            os.kill(os.getpid(), number)

    around(path, call, send)


def halt(value: tuple[str, int, float]) -> None:
    path, call, seconds = value
    around(path, call, lambda: time.sleep(seconds))


def fail(value: tuple[str, int, str]) -> None:
    from latentgen.core.errors import UserError

    path, call, text = value

    def strike() -> None:
        raise UserError(text)

    around(path, call, strike)


def slow(value: tuple[str, float]) -> None:
    path, seconds = value
    around(path, None, lambda: time.sleep(seconds))


def patience(value: dict[str, float]) -> None:
    from latentgen.engine import watch

    watch.PATIENCE = watch.Patience(**value)


def free_bytes(value: int) -> None:
    usage = type(shutil.disk_usage("/"))
    shutil.disk_usage = lambda path: usage(1 << 40, (1 << 40) - value, value)


def chunk(value: int) -> None:
    from latentgen.data.cache import ArrayCache

    assert ArrayCache.fill.__kwdefaults__
    ArrayCache.fill.__kwdefaults__["chunk"] = value


def draws(value: str) -> None:
    from recorder import record

    record(value)


def eater(value: tuple[int, str, int]) -> None:
    """Another program on the same disk, which takes all that is left of it between the check and the save."""
    from latentgen.engine import saver

    plain, calls = saver.write_contents, 0

    def write_contents(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == value[0]:
            size = shutil.disk_usage(Path(value[1]).parent).free - value[2]
            Path(value[1]).write_bytes(bytes(size))
        return plain(*arguments)

    saver.write_contents = write_contents


def room(value: int) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    plain = UNet2DConditionModel.forward

    def forward(self: Any, sample: torch.Tensor, *args: Any, **named: Any) -> Any:
        if self.training and sample.device.type != "meta" and len(sample) > value:
            raise torch.OutOfMemoryError("no room")
        return plain(self, sample, *args, **named)

    UNet2DConditionModel.forward = forward  # type: ignore[method-assign]


def pause(value: str) -> None:
    from latentgen.engine.step import Stepper

    plain = Stepper.__call__

    def step(*arguments: Any) -> None:
        while not Path(value).exists():
            time.sleep(0.01)
        plain(*arguments)

    Stepper.__call__ = step  # type: ignore[method-assign]


def wrong(value: tuple[str, str, list[int], str]) -> None:
    from latentgen.engine.step import Stepper

    what, stage, steps, number = value
    plain = Stepper.gradients

    def gradients(self: Any, phase: Any, micro_batches: Any, *, alone: bool = False) -> Any:
        (draw, batch), *_ = micro_batches
        first = next(self.trained.plain[phase.trains[0]].parameters())
        bad = what if self.task.name == stage and draw.step in steps else ""
        if bad == "weight":
            first.data[(0,) * first.ndim] = float(number)
        if bad == "batch":
            next(v for v in batch.values() if isinstance(v, Tensor) and v.is_floating_point())[0].fill_(float(number))
        parts, seen = plain(self, phase, micro_batches, alone=alone)
        if bad == "loss":
            seen = [{**values, "loss": values["loss"] * float(number)} for values in seen]
        if bad == "gradient":
            first.grad[(0,) * first.ndim] = float(number)
        return parts, seen

    Stepper.gradients = gradients  # type: ignore[method-assign]


def clock(value: int) -> None:
    """The clock of the wall jumps about, by up to days, as seeded by `value`; the monotonic one cannot."""
    plain, jumps = time.time, random.Random(value)
    time.time = lambda: plain() + jumps.uniform(-1e6, 1e6)
    time.time_ns = lambda: int(time.time() * 1e9)


HOOKS: dict[str, Callable[[Any], None]] = {
    "clock": clock,
    "eater": eater,
    "pause": pause,
    "kill": kill,
    "ask": ask,
    "halt": halt,
    "slow": slow,
    "fail": fail,
    "patience": patience,
    "env": os.environ.update,
    "free_bytes": free_bytes,
    "chunk": chunk,
    "draws": draws,
    "room": room,
    "wrong": wrong,
}

if __name__ == "__main__":
    main()
