"""What the C library does with memory that is given back."""

from __future__ import annotations

import ctypes
import os
import platform
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Of <malloc.h>; see mallopt(3)."""

LARGEST = 2**31 - 1
OLD_LARGEST_MAPPED = 32 * 2**20
GROW_BY = 64 * 2**20


def keep_memory() -> bool:
    """Let glibc keep large blocks that are freed, for the next time; True where it does so from now on.

    It returns them to the system by default, each activation of each step, and the next step pays for every page anew:
    some thousand page faults a step. The program then stays as large as it once was. What the environment says of
    it (MALLOC_TRIM_THRESHOLD_ and its kin) is left alone, as are other C libraries.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mapped = mallopt(M_MMAP_THRESHOLD, LARGEST) or mallopt(M_MMAP_THRESHOLD, OLD_LARGEST_MAPPED)
    return bool(mapped and mallopt(M_TRIM_THRESHOLD, LARGEST) and mallopt(M_TOP_PAD, GROW_BY))
