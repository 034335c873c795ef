"""Plain text files, alone or in a folder: each is one {"text"} row.

Suffixes read: .txt .md .rst .py. In a folder they are found recursively, in the order of their relative paths; hidden files
and folders (a leading dot) are passed over, and so are files without any text (an empty `__init__.py`).
"""

import os
from pathlib import Path

from lorakit.core.errors import DataError
from lorakit.data.row import Row

SUFFIXES = (".txt", ".md", ".rst", ".py")


def read_bytes(path: Path) -> bytes:
    """The file's bytes, or one line saying why they cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def decode(raw: bytes, path: Path) -> str:
    """UTF-8 text (a byte-order mark is dropped); DataError naming the line of the first byte that is not UTF-8."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line} is not UTF-8 (byte 0x{raw[error.start]:02x}); save it as UTF-8") from None


def read_text(path: Path) -> Row:
    """One row with the whole file."""
    text = decode(read_bytes(path), path)
    if not text.strip():
        raise DataError(f"{path} holds no text")
    return {"text": text}


def read_folder(folder: Path) -> list[Row]:
    """One row per text file below the folder."""
    texts = [decode(read_bytes(path), path) for path in text_files(folder)]
    rows = [{"text": text} for text in texts if text.strip()]
    if not rows:
        raise DataError(f"{folder} holds no text in files ending in {', '.join(SUFFIXES)}{_other_data(folder)}")
    return rows


def text_files(folder: Path) -> list[Path]:
    """The folder's text files, by relative path. Links to folders are not followed, so a cycle cannot trap the walk."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in files if not name.startswith(".") and Path(name).suffix in SUFFIXES]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _other_data(folder: Path) -> str:
    lines = sorted(folder.glob("*.jsonl"))
    return f"; to read its JSON Lines, name the file: {lines[0]}" if lines else ""
