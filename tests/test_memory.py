"""The allocator's switch, by what it is for: page faults."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from selfsup.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    return [torch.empty(40_000_000, dtype=torch.uint8).fill_(1) for _ in range(4)]
for _ in range(6):  # until the heap has found its size
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True, timeout=120
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has the switch")
def test_freed_memory_is_used_again():
    pages = 5 * 4 * 40_000_000 // 4096
    assert faults("default") > pages / 2  # else the test could not fail
    assert faults("keep") < pages / 100
