"""What processes tell each other of themselves, and the connections for it: each of the others has one to the main."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Said:
    """What a process says of itself.

    Args:
        doing: the last mark of its main thread.
        marks: how many there were; all processes come by the same ones.
        still: seconds in which its main thread has not moved.
        asked: it was asked to stop.
        left: "done", "stopped" or "failed", once it leaves.
        knows: of which processes it has heard that they leave.
    """

    host: str
    pid: int
    doing: str = "starting"
    marks: int = 0
    still: float = 0.0
    asked: bool = False
    left: str = ""
    knows: list[int] = field(default_factory=list)


class Line:
    """A connection to another process, on which JSON texts go, one a line.

    Attributes:
        closed: the other process has ended it, or has died.
        silent: seconds since something came, which the listener counts.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.closed, self.silent = connection, False, 0.0
        self._rest = b""
        os.register_at_fork(after_in_child=connection.close)  # data workers must not keep it open

    def send(self, value: dict[str, Any]) -> None:
        try:
            self.connection.sendall(json.dumps(value).encode() + b"\n")
        except OSError:
            self.closed = True

    def receive(self) -> list[dict[str, Any]]:
        """What has come; waits until something has, or the other end is closed."""
        try:
            came = self.connection.recv(1 << 16)
        except OSError:
            came = b""
        self.closed = self.closed or not came
        *whole, self._rest = (self._rest + came).split(b"\n")
        try:
            found = [dict(json.loads(text)) for text in whole]
        except (ValueError, TypeError):  # no process of this run
            self.closed = True
            return []
        self.silent = 0.0 if found else self.silent
        return found


def listen() -> socket.socket:
    """The main process's end, for other machines too, at a port that is free."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def call(port: int, token: int, rank: int, seconds: float) -> Line:
    """Connect to the main process, which gave `port` and `token`.

    Raises:
        OSError: it cannot be reached in so many seconds.
    """
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    line = Line(socket.create_connection((address, port), seconds))
    line.send({"token": token, "rank": rank})
    return line


def called(server: socket.socket, token: int, world: int, seconds: float) -> dict[int, Line]:
    """Wait for the calls of all other processes; returns rank -> line.

    Raises:
        OSError: one does not come in so many seconds.
    """
    lines: dict[int, Line] = {}
    server.settimeout(seconds)
    with server:
        while len(lines) < world - 1:
            line = Line(server.accept()[0])
            line.connection.settimeout(seconds)
            for hello in line.receive():
                if hello.get("token") == token:  # otherwise it is a stranger
                    lines[hello["rank"]] = line
    return lines
