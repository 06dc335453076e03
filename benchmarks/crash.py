"""Kill training everywhere, damage its files, and see that it goes on: what the run folder promises, tried.

    python benchmarks/crash.py [--quick] [--kills 200] [--programs 12] [--damages 500] [--docs]

* Random kills: a small network is trained by the real loop in a process of its own, killed with SIGKILL after a random
  time, and started again, over and over, with keep_last 1 and 3. Each start must go on by itself from the newest
  complete checkpoint; a complete one must be there from the first on, also between two looks while training runs; and
  of what was saved at most one interval may be lost: the checkpoint that was being written. (An interval is 5 steps
  here, as long as the write of a checkpoint, so that many kills come in the middle of one.) The run is finished at the
  end, and its weights must be those of a run that was never killed, in every bit.
* Kills in a save: one at every operation on the disk that a save makes (before it; and, where bytes are written, in the
  middle of them), for a save beside older ones. Then training goes on.
* Kills of the program: `train.py` as a user starts it, all three networks, killed after random times.
* Damage: a bit flipped, or the end cut off, in a random file of the newest checkpoint, at a random place. Each must be
  found before a tensor is used, named, and the older checkpoint taken.

Exits with 1 if anything did not hold. A process is forked, not started, so that a kill costs a fraction of a second.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from small_run import write_recipe
from torch import Tensor, nn

from latentgen.core.rand import Draw
from latentgen.data.loader import Cut, Loader
from latentgen.data.order import Shuffled
from latentgen.engine import saver
from latentgen.engine.checkpoint import Checkpoint, load_newest, name_of, steps_in, tidy
from latentgen.engine.loop import Loop
from latentgen.engine.settings import LoopSettings, StagePaths
from latentgen.engine.task import Phase

INTERVAL, BATCH = 5, 4
SETTINGS = LoopSettings(
    steps=10**9,
    optimizer="adamw",
    learning_rate=0.01,
    schedule="constant",
    warmup_steps=0,
    final_learning_rate=0.0,
    weight_decay=0.01,
    beta1=0.9,
    beta2=0.99,
    grad_clip=1.0,
    ema_decay=0.9,
    log_every=10**9,
    save_every=INTERVAL,
    keep_last=1,
    preview_every=10**9,
)
OPERATIONS = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")


class Toy:
    """Regression by a network of a megabyte, so that a save takes a while."""

    name = "toy"

    def __init__(self) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 1))
        self.modules: dict[str, nn.Module] = {"net": net}
        self.averaged: tuple[str, ...] = ("net",)

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("net", ("net",)),)

    def losses(self, phase: str, batch: Any, draw: Draw) -> dict[str, Tensor]:
        x = batch["x"]
        return {"loss": (self.modules["net"](x) - x.sum(dim=1, keepdim=True)).square().mean()}

    def preview(self, averaged: Mapping[str, nn.Module], step: int, folder: Path) -> dict[str, float]:
        return {}


def fetch(draw: Draw) -> dict[str, Tensor]:
    return {"x": draw.normal("x", (8,))}


class Board:
    """Numbers that a killed process has left: step it began with, steps done, steps of its saves begun."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 24)

    def write(self, place: int, value: int) -> None:
        struct.pack_into("q", self._memory, 8 * place, value)

    def read(self) -> tuple[int, int, int]:
        begun, done, saved = struct.unpack_from("3q", self._memory)
        return begun, done, saved

    def clear(self) -> None:
        self._memory[:] = struct.pack("3q", -1, -1, -1)


BEGUN, DONE, SAVED = range(3)


def make_loop(folder: Path, steps: int, keep_last: int) -> Loop:
    paths = StagePaths(folder / "c", folder / "s", folder / "m.jsonl", folder / "tb")
    loader = Loader(fetch, Shuffled(64), 0, "toy", Cut(BATCH), steps)
    settings = replace(SETTINGS, steps=steps, keep_last=keep_last)
    return Loop(Toy(), loader, settings, Accelerator(cpu=True), paths)


def train(folder: Path, steps: int, keep_last: int, board: Board | None = None, pause: float = 0.0) -> None:
    """The child's work: the real loop, which says on the board how far it is."""
    loop = make_loop(folder, steps, keep_last)
    if board is not None:
        plain_step, plain_save = loop.step, loop.saver.save

        def step(number: int, parts: Any) -> None:
            if board.read()[BEGUN] < 0:
                board.write(BEGUN, number)
            plain_step(number, parts)
            board.write(DONE, number + 1)
            time.sleep(pause)

        def save(checkpoint: Checkpoint, score: float | None = None) -> None:
            plain_save(checkpoint, score)
            board.write(SAVED, checkpoint.step)  # handed over: the one before it is safe

        loop.step, loop.saver.save = step, save  # type: ignore[method-assign]
    loop.run()


def fork(work: Callable[[], object], quiet: bool = True) -> int:
    """Run `work` in a process of its own; returns its number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if quiet:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            os.dup2(null, 1)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@dataclass
class Result:
    """One line of the table."""

    what: str
    tried: int = 0
    faults: list[str] = field(default_factory=list)
    notes: dict[str, float] = field(default_factory=dict)

    def must(self, holds: bool, fault: str) -> None:
        if not holds:
            self.faults.append(fault)

    def most(self, note: str, value: float) -> None:
        self.notes[note] = max(value, self.notes.get(note, 0))

    def line(self) -> str:
        notes = ", ".join(f"{name} {value:g}" for name, value in self.notes.items())
        return f"| {self.what} | {self.tried} | {len(self.faults)} | {notes} |"


def newest(folder: Path) -> int:
    """Step of the newest complete checkpoint, verified to the last byte; -1 without one. Changes nothing."""
    found = load_newest(folder / "c")
    return -1 if found is None else found.step


def random_kills(folder: Path, kills: int, keep_last: int, rand: random.Random) -> Result:
    result, board = Result(f"SIGKILL at a random instant, keep_last {keep_last}"), Board()
    expected, ever = -1, False
    for number in range(kills):
        board.clear()
        pid = fork(lambda: train(folder, 10**9, keep_last, board, pause=0.002))
        begun, wait = time.monotonic(), rand.uniform(0.0, 0.6)
        if rand.random() < 0.8:  # most kills are to come while it trains, a few while it starts
            while board.read()[DONE] < 0 and time.monotonic() - begun < 60:
                time.sleep(0.001)
        end = time.monotonic() + wait
        while time.monotonic() < end:
            looks = bool(steps_in(folder / "c"))
            result.must(looks or not ever, f"kill {number}: a moment without a checkpoint")
            ever = ever or looks
            time.sleep(0.0005)
        os.kill(pid, signal.SIGKILL)
        result.must(ended(pid) == -signal.SIGKILL, f"kill {number}: it had ended by itself")
        start, done, saved = board.read()
        if start >= 0 and expected >= 0:
            result.must(start == expected, f"kill {number}: began with step {start}, not {expected}")
        there = newest(folder)
        result.must(there >= 0 or not ever, f"kill {number}: no complete checkpoint")
        result.must(saved < 0 or there >= saved - INTERVAL, f"kill {number}: {there} is there, {saved} was saved")
        result.must(done - max(there, 0) <= 2 * INTERVAL, f"kill {number}: {done - max(there, 0)} steps were lost")
        result.most(f"steps lost at most (an interval has {INTERVAL})", done - max(there, 0))
        expected, ever, result.tried = max(there, 0), ever or there >= 0, result.tried + 1
    goal = (max(expected, 0) // INTERVAL + 2) * INTERVAL
    result.must(ended(fork(lambda: train(folder, goal, keep_last))) == 0, "the run could not be finished")
    whole = folder.with_name(folder.name + "-whole")
    result.must(ended(fork(lambda: train(whole, goal, keep_last))) == 0, "the whole run could not be finished")
    result.must(same(folder, whole), "its weights are not those of a run that was never killed")
    result.must(not list((folder / "c").glob("*.partial")), "half a checkpoint was left behind")
    result.notes["steps in all"] = goal
    return result


def same(first: Path, second: Path) -> bool:
    one, two = load_newest(first / "c"), load_newest(second / "c")
    if one is None or two is None or one.step != two.step or one.tensors.keys() != two.tensors.keys():
        return False
    return all(
        tensors.keys() == two.tensors[group].keys()
        and all(torch.equal(value, two.tensors[group][name]) for name, value in tensors.items())
        for group, tensors in one.tensors.items()
    )


class Executioner:
    """Kills this process at the n-th operation that changes the disk: before it, or in the middle of a write."""

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, 0

    def install(self) -> None:
        for name in OPERATIONS:
            setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **named: Any) -> Any:
            if name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR):
                return plain(*arguments, **named)
            self._strike()
            if name == "write":
                handle, content = arguments
                plain(handle, content[: len(content) // 2])
                self._strike()
                return len(content) // 2 + plain(handle, content[len(content) // 2 :])
            return plain(*arguments, **named)

        return operation

    def _strike(self) -> None:
        self.seen += 1
        if self.seen == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def one_save(folder: Path, steps: int, keep_last: int, at: int) -> None:
    """Train to the next checkpoint and be killed at operation `at` of writing it."""
    plain = saver.begin_folder

    def begin_folder(path: Path) -> Path:
        Executioner(at).install()
        return plain(path)

    saver.begin_folder = begin_folder
    train(folder, steps, keep_last)


def save_kills(base: Path, folder: Path, keep_last: int, most: int | None) -> Result:
    """A kill at each operation of one save; `base` holds a run with its checkpoints."""
    result, before = Result(f"SIGKILL at each operation of a save, keep_last {keep_last}"), newest(base)
    steps = before + INTERVAL
    at = 0
    while True:
        at += 1
        shutil.copytree(base, folder)
        code = ended(fork(partial(one_save, folder, steps, keep_last, at)))
        if code == 0:
            break
        result.tried += 1
        result.must(code == -signal.SIGKILL, f"operation {at}: it ended with {code}")
        tidied = folder.with_name("tidied")
        shutil.copytree(folder / "c", tidied / "c")
        tidy(tidied / "c")
        there = newest(tidied)
        shutil.rmtree(tidied)
        result.must(there in (before, steps), f"operation {at}: the newest is {there}")
        result.must(bool(steps_in(folder / "c")), f"operation {at}: no checkpoint under its name")
        result.must(ended(fork(lambda: train(folder, steps + INTERVAL, keep_last))) == 0, f"operation {at}: no way on")
        result.must(newest(folder) == steps + INTERVAL, f"operation {at}: it did not go on")
        left = sorted(path.name for path in (folder / "c").iterdir())
        kept = [name_of(step) for step in (before - INTERVAL, before, steps, steps + INTERVAL)][-keep_last:]
        result.must(left == kept, f"operation {at}: {left} are left")
        shutil.rmtree(folder)
        if most is not None and at >= most:
            break
    shutil.rmtree(folder, ignore_errors=True)
    return result


def program_kills(folder: Path, kills: int, rand: random.Random) -> Result:
    result = Result("SIGKILL of train.py at a random instant")
    for name in ("latentgen.recipe.run", "latentgen.cli.main"):
        importlib.import_module(name)
    gc.freeze()
    sizes = {"size": 24, "holdout": 4, "steps": 12, "save_every": 3, "preview_every": 6, "preview_steps": 1}
    recipes = {name: write_recipe(folder / name, **sizes) for name in ("killed", "whole")}

    def program(name: str) -> None:
        from latentgen.cli.main import run_verb

        sys.argv = [
            "train.py",
            "--config",
            str(recipes[name]),
            "--runs",
            str(folder / name / "runs"),
            "--device",
            "cpu",
        ]
        run_verb("train")

    begun = time.monotonic()
    result.must(ended(fork(lambda: program("whole"))) == 0, "the whole run could not be finished")
    length = time.monotonic() - begun
    for _ in range(kills):
        pid = fork(lambda: program("killed"))
        time.sleep(rand.uniform(0.0, 0.6 * length))
        os.kill(pid, signal.SIGKILL)
        result.must(ended(pid) in (-signal.SIGKILL, 0), "it ended with an error")
        result.tried += 1
    result.must(ended(fork(lambda: program("killed"))) == 0, "the run could not be finished")
    for path in sorted((folder / "whole" / "runs").rglob("model/**/*.safetensors")):
        other = folder / "killed" / path.relative_to(folder / "whole")
        same_bytes = other.is_file() and other.read_bytes() == path.read_bytes()
        result.must(same_bytes, f"{path.name} is not that of a run that was never killed")
    return result


class Warnings(logging.Handler):
    """What was said of checkpoints."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def damages(folder: Path, count: int, rand: random.Random) -> Result:
    result = Result("a bit flipped, or the end cut off, in a file of the newest checkpoint")
    older, newer = steps_in(folder / "c")[-2:]
    place, warnings = folder / "c" / name_of(newer), Warnings()
    logger = logging.getLogger("latentgen.engine.checkpoint")
    logger.addHandler(warnings)
    for _ in range(count):
        path = rand.choice(sorted(place.iterdir()))
        content = path.read_bytes()
        if rand.random() < 0.5:
            at = rand.randrange(len(content))
            path.write_bytes(content[:at] + bytes([content[at] ^ (1 << rand.randrange(8))]) + content[at + 1 :])
            how = f"{path.name}: a bit of byte {at}"
        else:
            length = rand.choice([len(content) - 1, rand.randrange(len(content))])
            path.write_bytes(content[:length])
            how = f"{path.name}: cut to {length} bytes"
        warnings.said.clear()
        found = load_newest(folder / "c")
        result.must(found is not None and found.step == older, f"{how}: not found")
        named = any(str(place) in line and path.name in line for line in warnings.said)
        result.must(named, f"{how}: not named ({warnings.said})")
        result.tried += 1
        path.write_bytes(content)
    logger.removeHandler(warnings)
    result.must(newest(folder) == newer, "the undamaged one was refused")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few of each")
    parser.add_argument("--kills", type=int, help="random kills for each keep_last (200)")
    parser.add_argument("--programs", type=int, help="kills of train.py (12)")
    parser.add_argument("--damages", type=int, help="flips and cuts (500)")
    parser.add_argument("--operations", type=int, help="only the first so many operations of a save")
    parser.add_argument("--docs", action="store_true", help="write the table to results/crash.md")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    few = options.quick
    kills = options.kills if options.kills is not None else (10 if few else 200)
    programs = options.programs if options.programs is not None else (2 if few else 12)
    flips = options.damages if options.damages is not None else (60 if few else 500)
    torch.set_num_threads(1)
    logging.getLogger("latentgen").propagate = False
    logging.getLogger("latentgen").addHandler(logging.NullHandler())
    rand, results = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        for keep_last in (1, 3):
            base = folder / f"base-{keep_last}"
            train_quietly(base, 3 * INTERVAL, keep_last)
            report(results, save_kills(base, folder / "save", keep_last, options.operations))
            report(results, random_kills(folder / f"random-{keep_last}", kills, keep_last, rand))
        report(results, damages(folder / "base-3", flips, rand))
        if programs:
            report(results, program_kills(folder / "programs", programs, rand))
    every = Result("**all**", sum(r.tried for r in results), [fault for r in results for fault in r.faults])
    lines = ["| what | tried | failed | |", "|---|---|---|---|", *(result.line() for result in [*results, every])]
    table = "\n".join(lines)
    print(f"\n{table}")
    if options.docs:
        (Path(__file__).parent / "results" / "crash.md").write_text(table + "\n")
    return int(any(result.faults for result in results))


def train_quietly(folder: Path, steps: int, keep_last: int) -> None:
    code = ended(fork(lambda: train(folder, steps, keep_last)))
    assert code == 0, f"training ended with {code}"


def report(results: list[Result], result: Result) -> None:
    results.append(result)
    print(result.line(), flush=True)
    for fault in result.faults[:5]:
        print(f"    {fault}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
