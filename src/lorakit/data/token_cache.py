"""Samples on disk, found again by content: an entry is a folder of flat arrays and an index, named by a hash of all that decides its bits.

Where: LORAKIT_CACHE/tokens, or XDG_CACHE_HOME/lorakit/tokens, or ~/.cache/lorakit/tokens. LORAKIT_CACHE=off: samples stay in memory.
LORAKIT_CACHE_GB (20 by default): what all entries may take; the ones used longest ago go first.

An entry is written beside its place and moved there whole. Several processes that want the same one wait for the first of them. One that is
not what its index says is made again.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from lorakit.core.errors import BadParameter, CheckpointError
from lorakit.data.account import Counts
from lorakit.data.cache_folder import cache_folder
from lorakit.data.samples import Layout, Samples, gathered

FORMAT = 2
"""Raised whenever this package's own code would make other samples of the same rows, or count otherwise."""
INDEX = "index.json"
PARTIAL = ".partial-"
STALE = 86_400.0
"""Seconds after which what a killed process left is removed."""
TYPES = {"ids": np.int32, "offsets": np.int64, "labels": np.int32, "label_offsets": np.int64, "kinds": np.int32, "marks": np.int64}

Parts = Iterable[tuple[Samples[Any], Counts]]


@dataclass(frozen=True)
class Entry:
    """Samples that lie on disk, and what was counted when they were made."""

    samples: Samples[Any]
    counts: Counts
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenCache:
    """A folder of entries of at most `limit` bytes together."""

    root: Path
    limit: int

    @classmethod
    def here(cls) -> Self | None:
        """What the environment says; None where it says off."""
        folder = cache_folder()
        if folder is None:
            return None
        size = os.environ.get("LORAKIT_CACHE_GB", "20")
        try:
            limit = float(size)
        except ValueError:
            limit = math.nan
        if not 0 < limit < math.inf:
            raise BadParameter(f"LORAKIT_CACHE_GB={size!r}; expected a number of gigabytes, e.g. 20, or LORAKIT_CACHE=off")
        return cls(folder / "tokens", int(limit * 1e9))

    def entry(self, tokenizer: PreTrainedTokenizerBase, rules: Any, rows_hash: str, parts: Callable[[], Parts]) -> Entry:
        """The samples of these rows under these rules: found, or made from `parts()` and kept. Raises CheckpointError, BadParameter.

        `rules` is a dataclass of plain values with a `layout`.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if not os.access(self.root, os.W_OK):
                raise PermissionError(13, "it is not writable")
        except OSError as error:
            why = f"tokens are not cached, since {self.root} cannot be used ({error.strerror}); set LORAKIT_CACHE to a folder, or to off"
            return _in_memory(parts(), rules.layout, why)
        place = self.root / key_of(tokenizer, rules, rows_hash)
        found = self._read(place, rules.layout)
        if found is None:
            with self._alone(place):
                found = self._read(place, rules.layout) or self._made(place, rules.layout, parts())
        with suppress(OSError):
            os.utime(place / INDEX)
        return found

    def _read(self, place: Path, layout: Layout) -> Entry | None:
        """The entry, if it is there and whole."""
        try:
            index = json.loads((place / INDEX).read_text(encoding="utf-8"))
            said = index.pop("sha256")
            if said != _sha256(index) or index["format"] != FORMAT:
                return None
            found = {name: _mapped(place / f"{name}.npy", TYPES[name], n) for name, n in index["arrays"].items()}
            counts = Counts(**index["counts"] | {"named": tuple(index["counts"]["named"])})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        offsets, ids = found["offsets"], found["ids"]
        if int(offsets[-1]) != len(ids) or int(offsets[0]):
            return None
        labels = found.get("labels", ids)  # where every token is its own label, they are not written twice
        return Entry(Samples(layout, ids, offsets, labels, found.get("label_offsets"), found.get("kinds"), found.get("marks")), counts)

    def _made(self, place: Path, layout: Layout, parts: Parts) -> Entry:
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=self.root))
        try:
            _write(partial, layout, parts)
            if self._read(place, layout) is None:  # else another process was faster, on a file system without locks
                self._remove(place)  # damaged, if it is there
                partial.rename(place)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            why = error.strerror or error
            raise CheckpointError(f"cannot write tokens to {self.root}: {why}; set LORAKIT_CACHE to another folder, or to off") from None
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(partial, ignore_errors=True)
        made = self._read(place, layout)
        if made is None:
            raise CheckpointError(f"what was written to {place} cannot be read again; set LORAKIT_CACHE to another folder, or to off")
        self._tidy(place)
        return made

    def _tidy(self, keep: Path) -> None:
        """Remove what was used longest ago until the rest fits, and what killed processes left."""
        entries = []
        for folder in self.root.iterdir():
            with suppress(OSError):
                if folder.name.startswith(PARTIAL):
                    if time.time() - folder.stat().st_mtime > STALE:
                        shutil.rmtree(folder, ignore_errors=True)
                elif folder.is_dir():
                    entries.append(((folder / INDEX).stat().st_mtime, sum(f.stat().st_size for f in folder.iterdir()), folder))
        room = self.limit - sum(size for _, size, _ in entries)
        for _, size, folder in sorted(entries):
            if room < 0 and folder != keep:
                self._remove(folder)
                room += size

    def _remove(self, folder: Path) -> None:
        """Gone from its place at once; who has it mapped goes on reading."""
        aside = folder.with_name(f"{PARTIAL}{folder.name}-{os.getpid()}")
        with suppress(OSError):
            folder.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)

    @contextmanager
    def _alone(self, place: Path) -> Iterator[None]:
        """Hold the entry's lock; it ends with its process. On a file system without locks, each process makes its own."""
        from filelock import FileLock  # Transformers needs it, too

        lock = FileLock(place.with_suffix(".lock"))
        try:
            lock.acquire()
        except (OSError, NotImplementedError):
            yield
            return
        try:
            yield
        finally:
            lock.release()


def key_of(tokenizer: PreTrainedTokenizerBase, rules: Any, rows_hash: str) -> str:
    """sha256 of the rows, the whole tokenizer (a fast one) and its template, the rules, and who applied them."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    facts = {
        "format": FORMAT,
        "rows": rows_hash,
        "rules": asdict(rules),
        "tokenizer": [
            type(tokenizer).__name__,
            {name: value for name, value in backend.items() if name not in ("truncation", "padding")},
            {name: str(value) for name, value in tokenizer.special_tokens_map.items()},
            tokenizer.chat_template,
            tokenizer.pad_token_id,
            tokenizer.truncation_side,
        ],
        "versions": [transformers.__version__, tokenizers.__version__],
    }
    return _sha256(facts)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _in_memory(parts: Parts, layout: Layout, why: str) -> Entry:
    return Entry(*gathered(parts, layout), (why,))


# --------------------------------------------------------------------------------------------------------------------- the arrays
def _write(folder: Path, layout: Layout, parts: Parts) -> None:
    """All arrays and the index. Of the samples, only a few at a time are in memory."""
    counts, all_learned = Counts(), layout == "token"
    arrays = {name: _Array(folder / f"{name}.npy", TYPES[name]) for name in TYPES}
    known = False
    try:
        arrays["offsets"].add(np.zeros(1))
        arrays["label_offsets"].add(np.zeros(1))
        for samples, more in parts:
            counts += more
            all_learned = all_learned and np.array_equal(samples.ids, samples.labels)
            known = known or samples.kinds is not None
            arrays["offsets"].add(arrays["ids"].n + samples.offsets[1:])
            if samples.label_offsets is not None:
                arrays["label_offsets"].add(arrays["labels"].n + samples.label_offsets[1:])
            arrays["ids"].add(samples.ids)
            arrays["labels"].add(samples.labels)
            arrays["kinds"].add(samples.every_kind)
            arrays["marks"].add(() if samples.marks is None else samples.marks)
    finally:
        for array in arrays.values():
            array.close()
    unused = {"labels": all_learned, "label_offsets": layout != "target", "kinds": not known, "marks": not arrays["marks"].n}
    for name in [name for name, drop in unused.items() if drop]:
        (folder / f"{name}.npy").unlink()
        del arrays[name]
    index = {"format": FORMAT, "arrays": {name: array.n for name, array in arrays.items()}, "counts": asdict(counts)}
    index = json.loads(json.dumps(index))
    (folder / INDEX).write_text(json.dumps(index | {"sha256": _sha256(index)}), encoding="utf-8")


class _Array:
    """A file as `np.save` writes it, of one dimension that grows."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.dtype, self.n = np.dtype(dtype), 0
        self.file = path.open("wb")
        self._head()

    def _head(self) -> None:
        # numpy leaves room in the header for the first dimension to grow
        head = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.n,)}
        np.lib.format.write_array_header_1_0(self.file, head)

    def add(self, values: Any) -> None:
        """More entries behind those."""
        self.file.write(np.ascontiguousarray(values, dtype=self.dtype).tobytes())
        self.n += len(values)

    def close(self) -> None:
        """Say how many there are."""
        self.file.seek(0)
        self._head()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def _mapped(path: Path, dtype: Any, n: int) -> Any:
    """The array, mapped; ValueError if it is not of this type and length."""
    if not n:
        return np.zeros(0, dtype=dtype)
    array = np.lib.format.open_memmap(path, mode="r")  # never an array of objects
    if array.shape != (n,) or array.dtype != np.dtype(dtype):
        raise ValueError(f"{path} is {array.dtype} {array.shape}")
    return array
