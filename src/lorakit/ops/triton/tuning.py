"""Which tile sizes are tried: on a GPU several, once for each kind of shape; under Triton's interpreter one small one.

What is tuned never cuts the dimension that is summed over, so a choice changes the time and no bit of the result. Choices are kept in
Triton's cache folder for the next process.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton

INTERPRETED: bool = triton.knobs.runtime.interpret
"""TRITON_INTERPRET=1 when Triton was imported: kernels then run on the CPU, for tests."""
_TOKENS = frozenset({"n", "key", "whole", "part", "bucket"})
"""Arguments that change from step to step: their values are not compiled in."""


def tuned(
    *tried: tuple[dict[str, int], int, int], small: dict[str, int], key: list[str], restored: tuple[str, ...] = ()
) -> Callable[..., Any]:
    """Decorate a kernel to be tuned anew for each value of `key`: `tried` are (tile sizes, warps, stages), `small` the tile sizes of the
    interpreter, `restored` what the kernel writes in place."""
    configs = [triton.Config(sizes, num_warps=warps, num_stages=stages) for sizes, warps, stages in tried]

    def decorate(kernel: Callable[..., Any]) -> Any:
        known = [name for name in inspect.signature(kernel).parameters if name in _TOKENS]
        jitted = triton.jit(kernel, do_not_specialize=known)
        found = [triton.Config(small)] if INTERPRETED else configs
        return triton.autotune(found, key=key, restore_value=restored, cache_results=True)(jitted)

    return decorate


def bucket(n: int) -> int:
    """The power of two that n does not exceed: ragged batches of one size share their tuning."""
    return max(16, _power_of_two(n))


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def splits(programs: int, most: int, device: torch.device) -> int:
    """Into how many parts a sum is cut so that the GPU is full, a power of two up to `most`, when there are `programs` without."""
    wanted = min(2 * processors(device) // max(1, programs), most)
    return 1 << max(1, wanted).bit_length() - 1


def rank_tile(r: int) -> int:
    """The r-wide side of a tile: r up to a power of two, at least 16 (the least that a product of tiles takes) and at most 128."""
    return min(128, max(16, _power_of_two(r)))


def _power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << max(0, n - 1).bit_length()
