"""Memory that is freed stays with the program: the next block of its size costs no page fault."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from latentgen.core.allocator import keep_memory

PROGRAM = """
import resource
{before}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        b"x" * 2**26
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def faults(before: str) -> int:
    found = subprocess.run([sys.executable, "-c", PROGRAM.format(before=before)], capture_output=True, check=True)
    return int(found.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_freed_block_is_used_again() -> None:
    assert faults("") >= 4 * 2**26 // 2**21  # pages of 2 MiB at most; above 32 MiB each block is mapped
    assert faults("from latentgen.core.allocator import keep_memory; assert keep_memory()") == 0


def test_what_the_environment_says_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not keep_memory()
