"""Who is given up, and who is not. Processes that really die are in tests/system/test_watch.py."""

from __future__ import annotations

import copy
import socket
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from latentgen.core.errors import Interrupted, Lost
from latentgen.engine import watch as watch_module
from latentgen.engine.heartbeat import Line, Said, call, called, listen
from latentgen.engine.watch import Patience, Watch

PATIENCE = Patience(beat=0.05, silence=30.0, hang=100.0, parting=0.5, grace=1000.0, meeting=20.0)


def make(rank: int, world: int, patience: Patience = PATIENCE) -> Watch:
    process: Any = SimpleNamespace(process_index=rank, num_processes=world, local_process_index=rank)
    return Watch(process, patience=patience)


def lines(*ranks: int) -> dict[int, Any]:
    """Open lines on which something has just come."""
    return {rank: SimpleNamespace(closed=False, silent=0.0) for rank in ranks}


def heard(watch: Watch, *, still: list[float], marks: list[int]) -> None:
    """All that it knows of three processes."""
    watch.said = {
        rank: Said("here", 100 + rank, doing=f"thing {marks[rank]}", marks=marks[rank], still=still[rank])
        for rank in range(3)
    }
    watch._lines = lines(1, 2)


@given(st.lists(st.floats(0, 1000), min_size=3, max_size=3), st.lists(st.integers(0, 3), min_size=3, max_size=3))
def test_the_hindmost_hang_when_nobody_moves_and_not_before(still: list[float], marks: list[int]) -> None:
    watch = make(0, 3)
    heard(watch, still=still, marks=marks)
    watch._judge(0.0)
    hindmost = [rank for rank in range(3) if marks[rank] == min(marks)] if min(still) > PATIENCE.hang else []
    for rank in range(3):
        assert (f"process {rank} of 3 (host here, pid {100 + rank}) has not moved for 100 s" in watch.lost) == (
            rank in hindmost
        )
    assert watch._gone.is_set() == bool(hindmost)


def test_only_the_main_process_judges_who_hangs() -> None:
    watch = make(1, 3)
    heard(watch, still=[1000.0] * 3, marks=[1, 1, 1])
    watch._lines = lines(0)
    watch._judge(0.0)
    assert not watch.lost


@pytest.mark.parametrize("left", ["", "done", "stopped", "failed"])
@pytest.mark.parametrize("fault", ["closed", "silent"])
def test_who_has_left_is_not_missed(left: str, fault: str) -> None:
    watch = make(0, 3)
    heard(watch, still=[0.0] * 3, marks=[5, 5, 5])
    watch.said[2].left = left
    watch._lines[2].closed = fault == "closed"
    for _ in range(31):
        watch._judge(1.0 if fault == "silent" else 0.0)
        watch._lines[1].silent = 0.0
    assert ("process 2 of 3" in watch.lost) == (left == "")
    assert "process 1 of 3" not in watch.lost
    assert watch._gone.is_set() == (left != "done")


def test_following_networks_moves_stops_and_leaves_nothing_behind() -> None:
    watch, network = make(0, 1), nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    plain = network(torch.ones(2))
    with watch.following([network]):
        assert torch.equal(network(torch.ones(2)), plain)
        assert watch._moves == 4, "each layer's call"
        twin = copy.deepcopy(network)
        twin(torch.ones(2))
        assert watch._moves == 8, "a copy made for export counts too"
        watch.stop.ask()
        with pytest.raises(Interrupted):
            network(torch.ones(2))
    assert torch.equal(network(torch.ones(2)), plain)
    assert not any(part._forward_pre_hooks for part in network.modules())


def test_a_stranger_is_not_let_in() -> None:
    server = listen()
    port, found = server.getsockname()[1], {}
    thread = threading.Thread(target=lambda: found.update(called(server, 12, 3, 20.0)))
    thread.start()
    strangers = [b"GET / HTTP/1.1\n\n", b'[["token"]]\n', b'{"token": 11, "rank": 1}\n']
    held = []
    for text in strangers:
        held.append(socket.create_connection(("127.0.0.1", port)))
        held[-1].sendall(text)
    mine = [call(port, 12, rank, 20.0) for rank in (2, 1)]
    thread.join(20)
    assert sorted(found) == [1, 2]
    mine[0].send({"said": "x" * 100_000})
    assert mine_received(found[2]) == [{"said": "x" * 100_000}], "however it is cut on the way"
    mine[1].connection.close()
    assert found[1].receive() == []
    assert found[1].closed
    for connection in (*held, mine[0].connection, *(line.connection for line in found.values())):
        connection.close()


def mine_received(line: Line) -> list[dict[str, Any]]:
    came: list[dict[str, Any]] = []
    while not came and not line.closed:
        came = line.receive()
    return came


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[BaseException | None]]:
    """Runs both processes of a world as two threads, with what each does; returns what each ends with."""
    meeting, numbers = threading.Barrier(2), [0, 0]

    def mains(process: Any, number: int) -> int:
        numbers[process.process_index] = number
        meeting.wait()
        found = numbers[0]
        meeting.wait()
        return found

    def anywhere(process: Any, here: bool) -> bool:
        assert not here
        meeting.wait()
        return here

    monkeypatch.setattr(watch_module, "mains", mains)
    monkeypatch.setattr(watch_module, "anywhere", anywhere)

    def run(*work: Callable[[], None]) -> list[BaseException | None]:
        ends: list[BaseException | None] = [None, None]

        def process(rank: int) -> None:
            try:
                with make(rank, 2):
                    work[rank]()
            except BaseException as error:
                ends[rank] = error

        threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        return ends

    return run


def fails(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


BROKEN = RuntimeError("Connection closed by peer")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("other", "becomes"),
    [
        (ValueError("a mistake"), Lost),
        (Interrupted("asked"), Interrupted),
        (None, RuntimeError),  # one that is done is not why a connection broke
    ],
    ids=["a mistake", "a stop", "nothing"],
)
def test_a_broken_connection_is_explained_by_what_the_other_process_says(
    rank: int, other: BaseException | None, becomes: type[BaseException], both: Any
) -> None:
    work = [fails(BROKEN), fails(BROKEN)]
    work[1 - rank] = fails(other) if other is not None else lambda: None
    ends = both(*work)
    assert ends[1 - rank] is other
    assert type(ends[rank]) is becomes
    assert isinstance(ends[rank], Lost) == ("ended with an error" in str(ends[rank]))


def test_processes_that_are_done_part_in_peace(both: Any) -> None:
    assert both(lambda: None, lambda: None) == [None, None]
