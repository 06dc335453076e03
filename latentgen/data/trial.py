"""A process that tries pictures out: `python -m latentgen.data.trial`. Decoders of hostile files may crash it or hang.

It reads pictures from standard input, each as two numbers (its bytes, the most pixels) and its content, and answers
with a line of JSON: its height and width, or why it cannot be used. It imports little, so that it starts soon.
"""

from __future__ import annotations

import json
import signal
import struct
import sys

from latentgen.data.images import BadPicture, decode_pixels

HEADER = struct.Struct(">QQ")
MEMORY = 8 << 30
"""Bytes of address space: a decoder that wants more is refused, not the machine brought down."""


def main() -> None:
    """Answer until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asked for pictures ends this process with its pipe
    _limit_memory()
    while header := sys.stdin.buffer.read(HEADER.size):
        length, max_pixels = HEADER.unpack(header)
        answer = json.dumps(trial(sys.stdin.buffer.read(length), max_pixels))
        sys.stdout.buffer.write(answer.encode() + b"\n")
        sys.stdout.buffer.flush()


def trial(content: bytes, max_pixels: int) -> dict[str, object]:
    """`size`, height and width of the upright picture, or `reason`."""
    try:
        pixels = decode_pixels(content, max_pixels=max_pixels)
    except BadPicture as error:
        return {"reason": str(error)}
    return {"size": list(pixels.shape[:2])}


def _limit_memory() -> None:
    if sys.platform == "win32":
        return
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_AS)
    wanted = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, most))


if __name__ == "__main__":
    main()
