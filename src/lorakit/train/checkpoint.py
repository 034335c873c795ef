"""Checkpoints of a run: one folder each, made whole by a rename, pruned to the newest few.

A process killed at any moment leaves either the folder or a `.partial` that nobody reads.
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from lorakit.core.errors import CheckpointError

NAME = re.compile(r"checkpoint-(\d{8})")


def checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(p for p in run.glob("checkpoint-*") if NAME.fullmatch(p.name) and p.is_dir())


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps done."""
    match = NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match.group(1))


def write_checkpoint(run: Path, step: int, fill: Callable[[Path], None], *, keep: int) -> Path:
    """Fill a new folder, put it in place atomically, then drop all but the newest `keep`.

    A full disk or a read-only folder raises CheckpointError; earlier checkpoints survive.
    """
    final = run / f"checkpoint-{step:08d}"
    partial = final.with_suffix(".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        if final.exists():
            shutil.rmtree(final)
        os.rename(partial, final)
        sync(run)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        left = checkpoints(run)
        raise CheckpointError(
            f"cannot write {final}: {error.strerror or error}; the last good checkpoint is {left[-1] if left else 'none'}"
        ) from error
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return final


def sync(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
