"""Starts the command line many times for the price of one import.

Not a test. Reads one JSON request a line, answers one JSON line. {"argv": [...]} forks a process that runs
`latentgen ARGV` as its own program, in its own process group; {"wait": PID} waits for its end.

A program may carry "hooks": {"kill": [FUNCTION, CALL, SIGNAL]} sends itself a signal when a function has been called
so often (before that call's work for SIGKILL, after it for others), {"free_bytes": N} makes the disk look full,
{"chunk": N} makes caches work in smaller pieces, {"draws": FOLDER} records all draws.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

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


def kill(value: tuple[str, int, int]) -> None:
    path, call, number = value
    module_name, _, name = path.partition(":")
    owner: Any = importlib.import_module(module_name)
    *outer, name = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    plain, calls = getattr(owner, name), 0

    def counted(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and number == signal.SIGKILL:
            os.kill(os.getpid(), number)
        result = plain(*args, **named)
        if calls == call:
            os.killpg(0, number)  # as a terminal does on Ctrl-C: to the data workers as well
        return result

    setattr(owner, name, counted)


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


HOOKS = {"kill": kill, "free_bytes": free_bytes, "chunk": chunk, "draws": draws}

if __name__ == "__main__":
    main()
