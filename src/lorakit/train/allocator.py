"""The C library's allocator on Linux, told to keep what is freed: a training step asks for the same memory again and again.

As it comes, glibc gives the top of its heap back to the system when much of it is free, which in every step it is, and the next step's
first touch of each page is a fault. Keeping it took a bf16 step of 0.7 s down by a tenth to a seventh (docs/log.md). It stays below the
process's own peak.
"""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h."""


def keep_freed_memory() -> bool:
    """Tell glibc, for the rest of the process; False where the C library is another one."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        tell = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    tell.argtypes, tell.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return all([tell(TRIM_THRESHOLD, 2**31 - 1), tell(MMAP_THRESHOLD, 2**25)])  # both are as large as it takes
