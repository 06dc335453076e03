"""The process that tries pictures out, with decoders added that crash and hang on certain files."""

from __future__ import annotations

import os
import signal
import time

from PIL import Image, ImageFile

from latentgen.data.trial import main

DEEDS = {
    b"SEGV": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    b"ABRT": os.abort,
    b"HANG": lambda: time.sleep(1000),
    b"EXIT": lambda: os._exit(3),
    b"LOUD": lambda: (os.write(2, b"noise"), (_ for _ in ()).throw(SyntaxError("no picture")))[1].__next__(),
    b"HUGE": lambda: bytearray(1 << 46),
}


class Deed(ImageFile.ImageFile):
    format = "DEED"

    def _open(self) -> None:
        DEEDS[self.fp.read(4)]()


Image.register_open("DEED", Deed, lambda prefix: prefix[:4] in DEEDS)
main()
