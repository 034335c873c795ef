"""A pause of Python's garbage collector, for making many objects that stay.

Hundreds of modules are tens of thousands of objects. The collector looks through the young ones again and again while they are made, and
every so often through everything that the process holds, for garbage that is not there.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """No collection in the block."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
