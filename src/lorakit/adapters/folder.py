"""A folder whose files are replaced as a whole: however a save ends, what is read afterwards is all old or all new.

    1. the new files go into folder/.saving-<random>/, each flushed to the disk
    2. that folder is renamed to folder/.saved: from here on the new files are the ones that are read
    3. each is moved over its old namesake, and the empty .saved is removed

Readers look in .saved first, so a save that died in step 3 counts, and the next save finishes it. Other files in the folder are left alone.
The new files lie inside the folder, not beside it, so that a mount point or the working directory can be saved to. One writer a folder.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lorakit.core.errors import CheckpointError

SAVING = ".saving-"
SAVED = ".saved"
REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EEXIST: "a file has that name",
    errno.ENOTDIR: "a part of that path is a file",
    errno.EROFS: "the disk is read-only",
}


def write_files(folder: str | Path, files: Mapping[str, bytes]) -> Path:
    """Replace these files of a folder, made if need be: all or none. Raises CheckpointError; the folder then holds what it held before."""
    folder = Path(folder)
    with _reported(folder, files), _unmade(folder):
        folder.mkdir(parents=True, exist_ok=True)
        finish(folder)
        os.rename(_staged(folder, files), folder / SAVED)
        try:
            _sync(folder)
            finish(folder)
        except BaseException:
            _withdraw(folder, files)
            raise
    return folder


def locate(folder: str | Path, name: str) -> Path | None:
    """Where a file of the folder is now, or None."""
    candidates = (Path(folder) / SAVED / name, Path(folder) / name)
    return next((path for path in candidates if path.is_file()), None)


def finish(folder: Path) -> None:
    """Step 3, also that of a save that died in it; and what a save that died in step 1 left is removed."""
    saved = folder / SAVED
    if saved.is_dir():
        for path in sorted(saved.iterdir()):
            os.replace(path, folder / path.name)
        saved.rmdir()
        _sync(folder)
    _clear(folder)


def _staged(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Step 1: the folder with the new files."""
    staged = folder / f"{SAVING}{secrets.token_hex(4)}"
    staged.mkdir()
    for name, data in files.items():
        _write(staged / name, data)
    _sync(staged)
    return staged


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Flush a folder's entries: its renames are then on the disk."""
    if os.name == "nt":  # Windows cannot open a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _withdraw(folder: Path, files: Mapping[str, bytes]) -> None:
    """Undo step 2, by a rename again, as long as no file was moved; afterwards the new files are the ones in force."""
    saved = folder / SAVED
    if saved.is_dir() and {path.name for path in saved.iterdir()} == set(files):
        os.rename(saved, folder / f"{SAVING}{secrets.token_hex(4)}")


def _clear(folder: Path) -> None:
    for path in folder.glob(f"{SAVING}*"):
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _unmade(folder: Path) -> Iterator[None]:
    """On failure, no staged files and no empty new folders are left."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        _clear(folder)
        with suppress(OSError):  # innermost first; one that is not empty, or was never made, ends it
            for path in new:
                path.rmdir()
        raise


@contextmanager
def _reported(folder: Path, files: Mapping[str, bytes]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = REASONS.get(error.errno or 0) or error.strerror or str(error)
        state = "yet the new files are complete and in force" if _holds(folder, files) else "what was saved there before is unchanged"
        raise CheckpointError(f"cannot save to {folder}: {reason}; {state}") from error


def _holds(folder: Path, files: Mapping[str, bytes]) -> bool:
    """Whether a reader finds these files."""
    with suppress(OSError):
        return all((path := locate(folder, name)) is not None and path.read_bytes() == data for name, data in files.items())
    return False
