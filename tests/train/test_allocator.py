"""Freed memory stays with the process: counted page faults, in a process of its own."""

import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from lorakit.train.allocator import keep_freed_memory
assert keep_freed_memory()  # glibc took both
def step():
    held = [torch.ones(2**20) for _ in range(100)]  # 4 MB each, then all of them free
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_the_same_memory_is_used_again() -> None:
    """Without it three such steps take some 300,000 faults where the heap's end is free, which chance decides."""
    done = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 1000
