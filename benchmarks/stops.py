"""Ask a run to stop at random instants, and see that it has saved, leaves soon and loses no step.

    python benchmarks/stops.py [--instants 50] [--processes 1 2] [--seed 0] [--out benchmarks/results/stops.md]

All three networks of a small recipe are trained as a user starts them, by one process and by two. SIGTERM comes at a
random time after the run has begun to do one certain thing (a step, a validation, a preview, a save, caching, writing a
result), which the instants take in turns. It goes to all processes, up to 50 ms apart; every fifth time only to one of
two. Each must leave with exit code 75, having trained at most one step more; the same command then continues. As often
as the run is done another is begun. At the end its weights must be, in every bit, those of a run that nobody stopped.

"Steps lost" are steps done when the processes left, less those in the newest checkpoint. Processes are forked, not
started, so that a start costs a second and not ten.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import mmap
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from small_run import free_port, write_recipe

from latentgen.core.errors import STOPPED

STAGES = ("vae", "clip", "unet")
SIZES = {"size": 64, "holdout": 8, "steps": 24, "save_every": 4, "preview_every": 4, "preview_steps": 30}
DOING = ("starting", "a step", "a validation", "a preview", "a save", "caching", "a result or the model")
WORDS = {
    "step": 1,
    "data": 1,
    "validation": 2,
    "preview": 3,
    "after": 1,
    "caching": 5,
    "its": 6,
    "done": 6,
    "writing": 6,
}
"""Of the marks that a run makes: what each is counted as."""


class Board:
    """What a run says of itself to this script: what it does, whether it saves meanwhile, the steps it has done."""

    def __init__(self) -> None:
        self.cells = mmap.mmap(-1, 8)

    def clear(self) -> None:
        self.cells[:] = bytes(8)

    def ready(self, processes: int) -> bool:
        """Whether all hear signals."""
        return all(self.cells[5 + rank] for rank in range(processes))

    def doing(self) -> str:
        return "a save" if self.cells[1] else DOING[self.cells[0]]

    def done(self) -> dict[str, int]:
        """Stage -> steps done since the start, and before it; the last cell has those since the start."""
        return {stage: self.cells[2 + i] for i, stage in enumerate(STAGES)}


def observe(board: Board, rank: int) -> None:
    """In a process that trains: write on the board; the first one says more."""
    from latentgen.engine.loop import Loop
    from latentgen.engine.saver import Saver
    from latentgen.engine.step import Stepper
    from latentgen.engine.stop import StopRequest
    from latentgen.engine.watch import Watch

    mark, write, step, restore = Watch.mark, Saver._write, Stepper.__call__, Loop._restore
    enter = StopRequest.__enter__

    def entered(self: StopRequest) -> StopRequest:
        enter(self)
        board.cells[5 + rank] = 1
        return self

    def marked(self: Watch, doing: str) -> None:
        words = doing.replace(",", "").split()
        board.cells[0] = next((WORDS[word] for word in words if word in WORDS), 0)
        mark(self, doing)

    def written(self: Saver, *arguments: Any) -> None:
        board.cells[1] = 1
        write(self, *arguments)
        board.cells[1] = 0

    def stepped(self: Stepper, number: int, *arguments: Any) -> None:
        step(self, number, *arguments)
        board.cells[7] += 1
        board.cells[2 + STAGES.index(self.task.name)] = number + 1

    def restored(self: Loop) -> int:
        start = restore(self)
        board.cells[2 + STAGES.index(self.task.name)] = start
        return start

    StopRequest.__enter__ = entered  # type: ignore[method-assign]
    if rank > 0:
        return
    Watch.mark, Saver._write = marked, written  # type: ignore[method-assign]
    Stepper.__call__, Loop._restore = stepped, restored  # type: ignore[method-assign]


@dataclass
class Run:
    """A folder with a recipe, trained by so many processes."""

    folder: Path
    processes: int
    board: Board = field(default_factory=Board)

    def __post_init__(self) -> None:
        write_recipe(self.folder, **SIZES)

    def start(self) -> list[int]:
        """Fork the processes; returns their numbers."""
        self.board.clear()
        port = free_port()
        pids = []
        for rank in range(self.processes):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.processes, "LOCAL_WORLD_SIZE": self.processes}
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {key: str(value) for key, value in {**world, **place}.items()} if self.processes > 1 else {}
            pids.append(fork(lambda environment=environment, rank=rank: self._train(environment, rank), self.log(rank)))
        return pids

    def log(self, rank: int) -> Path:
        return self.folder / f"{rank}.log"

    def _train(self, environment: dict[str, str], rank: int) -> None:
        from latentgen.cli.main import run_verb

        os.environ.update(environment)
        observe(self.board, rank)
        recipe, runs = str(self.folder / "recipe.yaml"), str(self.folder / "runs")
        sys.argv = ["train.py", "--config", recipe, "--runs", runs, "--device", "cpu"]
        run_verb("train")

    def newest(self, stage: str) -> int:
        """Step of the newest checkpoint; 0 without one."""
        folder = self.folder / "runs" / "small" / "checkpoints" / stage
        return max((int(path.name) for path in folder.glob("*[0-9]")), default=0)

    def result(self) -> dict[str, bytes]:
        """Path -> content of every file of weights."""
        runs = self.folder / "runs"
        files = sorted(path for part in ("model", "stages") for path in runs.glob(f"small/{part}/**/*.safetensors"))
        return {str(path.relative_to(runs)): path.read_bytes() for path in files}


def fork(work: Callable[[], object], log: Path) -> int:
    """Run `work` in a process of its own, which writes to `log`; returns its number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pids: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


@dataclass
class Line:
    """One line of the table."""

    instants: int = 0
    seconds: float = 0.0
    more: int = 0
    lost: int = 0


class Trial:
    """Many instants for one number of processes."""

    def __init__(self, folder: Path, processes: int, rand: random.Random) -> None:
        self.folder, self.processes, self.rand = folder, processes, rand
        self.lines = {what: Line() for what in DOING}
        self.faults: list[str] = []
        self.whole = self.finished(self.new())

    def new(self) -> Run:
        return Run(self.folder / f"{self.processes}-{len(list(self.folder.iterdir()))}", self.processes)

    def finished(self, run: Run) -> dict[str, bytes]:
        codes = ended(run.start())
        assert not any(codes), run.log(0).read_text()
        return run.result()

    def instants(self, count: int) -> int:
        """Stop runs at so many instants; returns how many runs that took."""
        run, runs, number = self.new(), 1, 0
        while number < count:
            if self.stop(run, number):
                number += 1
            else:  # it was done before
                self.compare(run)
                run, runs = self.new(), runs + 1
        self.finished(run)
        self.compare(run)
        return runs

    def compare(self, run: Run) -> None:
        if run.result() != self.whole:
            self.faults.append(f"{run.folder.name}: its weights are not those of a run that nobody stopped")

    def stop(self, run: Run, number: int) -> bool:
        """Start the run and stop it; False when it was done before."""
        pids, board, rand = run.start(), run.board, self.rand
        wanted, skip, most = DOING[number % len(DOING)], rand.uniform(0.0, 2.0), 8.0
        while not board.ready(self.processes) and running(pids[0]):
            time.sleep(0.001)
        begun = time.monotonic()
        while running(pids[0]):
            passed = time.monotonic() - begun
            if passed > most or (board.doing() == wanted and (passed > skip or wanted not in DOING[1:5])):
                break
            time.sleep(0.0005)
        time.sleep(rand.uniform(0.0, 0.001 if wanted == "a save" else 0.02))
        what, trained = board.doing(), board.cells[7]
        asked = rand.sample(pids, len(pids))
        if number % 5 == 4 and what != "starting":
            asked = asked[:1]
        asked_at = time.monotonic()
        for pid in asked:
            if running(pid):
                os.kill(pid, signal.SIGTERM)
            time.sleep(rand.uniform(0.0, 0.05) if len(pids) > 1 else 0.0)
        codes = ended(pids)
        seconds = time.monotonic() - asked_at
        if not any(codes):
            return False
        more = board.cells[7] - trained
        lost = sum(max(0, done - run.newest(stage)) for stage, done in board.done().items())
        line = self.lines[what]
        line.instants, line.seconds = line.instants + 1, max(line.seconds, seconds)
        line.more, line.lost = max(line.more, more), max(line.lost, lost)
        if set(codes) != {STOPPED} or more > 1 or lost > 0:
            said = [run.log(rank).read_text()[-1500:] for rank in range(self.processes)]
            self.faults.append(f"instant {number} ({what}): codes {codes}, {more} steps more, {lost} lost; {said}")
        return True


def running(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def table(trial: Trial) -> list[str]:
    rows = [f"| {trial.processes} | {what} | {line.instants} | {line.seconds:.1f} | {line.more} | {line.lost} |"
            for what, line in trial.lines.items() if line.instants]  # fmt: skip
    lines = trial.lines.values()
    total = f"{sum(x.instants for x in lines)} | {max(x.seconds for x in lines):.1f} | {max(x.more for x in lines)}"
    return [*rows, f"| {trial.processes} | **all** | {total} | {max(x.lost for x in lines)} |"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instants", type=int, default=50, help="for each number of processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the table there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("latentgen.recipe.run", "latentgen.recipe.plan", "latentgen.cli.main"):
        importlib.import_module(name)
    gc.freeze()
    rows, faults = [], []
    for processes in options.processes:
        with tempfile.TemporaryDirectory() as text:
            trial = Trial(Path(text), processes, random.Random(options.seed))
            runs = trial.instants(options.instants)
        rows += table(trial)
        faults += trial.faults
        same = "all ended in the weights of one that nobody stopped, in every bit" if not trial.faults else "FAULTS"
        print(f"{processes} processes: {runs} runs were stopped; {same}", flush=True)
    names = ("seconds until all had left, at most", "steps done after it, at most", "steps lost, at most")
    head = [f"| processes | SIGTERM during | instants | {' | '.join(names)} |", "|---|---|---|---|---|---|"]
    text = "\n".join([*head, *rows])
    print(text)
    print("\n".join(faults))
    if options.out is not None:
        where = f"{os.cpu_count()} cores, one thread a process, torch {torch.__version__}"
        options.out.write_text(f"`python benchmarks/stops.py --seed {options.seed}` on {where}:\n\n{text}\n")
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(main())
