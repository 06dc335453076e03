"""Processes of one run watch each other, so that none waits without end for one that is gone.

Each has a thread that says every second what its main thread is doing, over a connection of its own. The main process
judges the others, and tells all of them; the others judge the main process. One that dies closes its connection. One
that is halted, or whose machine dies, falls silent. One whose main thread hangs still speaks, but in time nobody moves.

Who only waits for others does not move either, and is not to blame: as long as any process moves, none hangs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import select
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from types import TracebackType

from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from latentgen.core.errors import LOST, STOPPED, Interrupted, Lost
from latentgen.engine.agreement import anywhere, mains
from latentgen.engine.heartbeat import Line, Said, call, called, listen
from latentgen.engine.stop import SAID, StopRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """Seconds.

    Args:
        beat: from one heartbeat to the next.
        silence: without a heartbeat, until a process is given up.
        hang: without a movement of any process, until the hindmost are given up.
        parting: that one which leaves waits for the others to hear of it; that one with a broken connection waits to
            hear why.
        grace: that a process has to leave by itself, once it knows that another is gone.
        meeting: for the connections at the start.
    """

    beat: float = 1.0
    silence: float = 30.0
    hang: float = 1800.0
    parting: float = 5.0
    grace: float = 30.0
    meeting: float = 60.0


PATIENCE = Patience()
"""Of every run."""


class Watch:
    """As a context manager: watches the other processes, if there are any, while they train.

    When one is gone, this one is to leave too: by `Lost` where a broken connection raised an error in the main thread,
    otherwise, `Patience.grace` later, with exit code `LOST` (`STOPPED` where the other one stopped on request).

    Args:
        stop: learns here that another process was asked to stop.
    """

    def __init__(
        self, accelerator: Accelerator, stop: StopRequest | None = None, patience: Patience | None = None
    ) -> None:
        self.accelerator, self.stop, self.patience = accelerator, stop or StopRequest(), patience or PATIENCE
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.said: dict[int, Said] = {self.rank: Said(socket.gethostname(), os.getpid())}
        self.lost = ""
        self._moves = 0
        self._lines: dict[int, Line] = {}
        self._gone = threading.Event()
        self._ending = False
        self._thread: threading.Thread | None = None

    def mark(self, doing: str) -> None:
        """The main thread begins something that all processes do, at about the same time."""
        mine = self.said[self.rank]
        mine.doing, mine.marks = doing, mine.marks + 1
        self._moves += 1

    def move(self) -> None:
        """The main thread is still at it."""
        self._moves += 1

    @contextlib.contextmanager
    def following(self, networks: Iterable[nn.Module]) -> Iterator[None]:
        """Within it each layer's call is a movement, and raises `Interrupted` where a stop was asked for."""

        def look(module: nn.Module, arguments: object) -> None:
            self.move()
            if self.stop.asked:
                raise Interrupted(SAID)

        handles = [part.register_forward_pre_hook(look) for network in networks for part in network.modules()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __enter__(self) -> Watch:
        if self.world > 1:
            with self.stop.postponed():
                try:
                    self._meet()
                except RuntimeError:
                    if self.stop.asked:  # as the others were, which have left
                        raise Interrupted(SAID) from None
                    raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        with self.stop.postponed():  # a launcher sends signals when a process has failed
            why = error
            if isinstance(error, RuntimeError):
                self._gone.wait(self.patience.parting)
                why = self._explained(error)
            self._leave(why)
            if isinstance(why, Interrupted):
                why = self._explained(why)
            if why is not None and why is not error:
                raise why from error

    def _leave(self, error: BaseException | None) -> None:
        """Tell the others, and see that they hear it."""
        asked = isinstance(error, KeyboardInterrupt)
        self.said[self.rank].left = "done" if error is None else "stopped" if asked else "failed"
        self._wake()
        wait = 0.0 if asked and not isinstance(error, Interrupted) else self.patience.parting
        end = time.monotonic() + wait
        while time.monotonic() < end and not all(self._heard(rank) for rank in self._lines):
            time.sleep(0.01)
        self._ending = True
        self._wake()
        assert self._thread is not None
        self._thread.join()
        for connection in (*self._bell, *(line.connection for line in self._lines.values())):
            connection.close()

    def _heard(self, rank: int) -> bool:
        """Whether a process knows that this one leaves, or never will."""
        other = self.said.get(rank)
        return self._lines[rank].closed or (other is not None and self.rank in other.knows)

    def _wake(self) -> None:
        self._bell[1].send(b".")

    def _explained(self, error: RuntimeError | Interrupted) -> BaseException:
        """What is really the matter, where another process is gone."""
        self._blame_failed()
        if self.lost:
            return Lost(self.lost)
        if self._gone.is_set() and isinstance(error, RuntimeError):
            return Interrupted(SAID)
        return error

    def _blame_failed(self) -> None:
        failed = [rank for rank, said in list(self.said.items()) if said.left == "failed" and rank != self.rank]
        if failed and not self.lost:
            self._give_up(failed[:1], "ended with an error")

    def _meet(self) -> None:
        """Connect the others with the main process; all must call it."""
        server = listen() if self.rank == 0 else None
        port = mains(self.accelerator, server.getsockname()[1] if server else 0)
        token = mains(self.accelerator, secrets.randbits(62))
        lines: dict[int, Line] = {}
        try:
            seconds = self.patience.meeting
            lines = called(server, token, self.world, seconds) if server else {0: call(port, token, self.rank, seconds)}
        except OSError as error:
            logger.warning("the processes cannot watch each other (%s): if one dies, others may wait for it", error)
        if anywhere(self.accelerator, not lines):
            return
        self._lines, self._bell = lines, socket.socketpair()
        self._thread = threading.Thread(target=self._work, name="watch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        """The thread: hear, judge, speak."""
        before, due, moves, gone = time.monotonic(), 0.0, -1, 0.0
        told: object = None
        mine = self.said[self.rank]
        while not self._ending:
            self._hear(max(0.0, due - before))
            now = time.monotonic()
            passed = min(now - before, 2 * self.patience.beat)  # halted itself, it could not have heard the others
            before = now
            mine.still, moves = (mine.still + passed if moves == self._moves else 0.0), self._moves
            mine.asked = self.stop.asked
            mine.knows = [rank for rank, said in self.said.items() if said.left]
            self._judge(passed)
            news = (self.lost, [(said.asked, said.left) for said in self.said.values()], mine.knows)
            if now >= due or news != told:
                due, told = now + self.patience.beat, news
                self._speak()
            gone += passed if self._gone.is_set() else 0.0
            if gone > self.patience.grace and not mine.left:
                self._blame_failed()
                os._exit(LOST if self.lost else STOPPED)
        self._speak()

    def _hear(self, seconds: float) -> None:
        """Take what comes, waiting for it so long at most."""
        lines = {line.connection: line for line in self._lines.values() if not line.closed}
        for connection in select.select([self._bell[0], *lines], [], [], seconds)[0]:
            if connection is self._bell[0]:
                connection.recv(1)
                continue
            for message in lines[connection].receive():
                self.lost = self.lost or message["lost"]
                for rank, said in message["said"].items():
                    if int(rank) != self.rank:
                        self.said[int(rank)] = Said(**said)
        if any(said.asked for said in self.said.values()):
            self.stop.ask()

    def _speak(self) -> None:
        ours = self.said if self.rank == 0 else {self.rank: self.said[self.rank]}
        message = {"said": {rank: asdict(said) for rank, said in ours.items()}, "lost": self.lost}
        for line in self._lines.values():
            if not line.closed:
                line.send(message)

    def _judge(self, passed: float) -> None:
        """See whether another process is gone."""
        for rank, line in self._lines.items():
            line.silent += passed
            if rank in self.said and self.said[rank].left:
                continue
            if line.closed:
                self._give_up([rank], "has died")
            elif line.silent > self.patience.silence:
                self._give_up([rank], f"has not answered for {self.patience.silence:g} s")
        there = {rank: said for rank, said in self.said.items() if not said.left}
        if self.rank == 0 and there and min(said.still for said in there.values()) > self.patience.hang:
            least = min(said.marks for said in there.values())
            hindmost = [rank for rank, said in there.items() if said.marks == least]
            self._give_up(hindmost, f"has not moved for {self.patience.hang:g} s")
        if self.lost or any(
            said.left in ("stopped", "failed") for rank, said in self.said.items() if rank != self.rank
        ):
            self._gone.set()

    def _give_up(self, ranks: list[int], why: str) -> None:
        """Say who is lost: the main process does, or, where that is lost, one process on each machine."""
        if self.lost:
            return
        names = []
        for rank in ranks:
            said = self.said.get(rank)
            where = f" (host {said.host}, pid {said.pid})" if said is not None else ""
            doing = f"; it was at: {said.doing}" if said is not None else ""
            names.append(f"process {rank} of {self.world}{where} {why}{doing}")
        self.lost = "; ".join(names)
        main_here = 0 in self.said and self.said[0].host == self.said[self.rank].host
        if self.rank == 0 or self.accelerator.local_process_index == int(main_here):
            said = f"error: {self.lost}; the newest checkpoint is untouched; run the same command again"
            tqdm.write(said, file=sys.stderr)  # above the bars that the main thread has left
