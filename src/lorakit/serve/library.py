"""A library: finished adapters in one folder, each with a vector of what its task's inputs are like, searched by a prompt's vector.

    e_i = mean over m sample inputs x of E(x)          cos(q, e_i), the k largest          (LoraRetriever, arXiv:2402.09997)

    library.json             format version, the encoder's name, the base's, {name, samples} of every adapter
    library.safetensors      `embeddings` [N, d], fp32, in that order
    <name>/                  the adapter, in lorakit's format

The k that were found have weights 1/k each, in one of three ways:

    selection     k = 1
    mixture       y = W x + 1/k Σ s_j B_j A_j x                          exact
    fusion        y = W x + (1/k Σ √s_j B_j)(1/k Σ √s_j A_j) x           cross terms; for equal s it is the published s B̂ Â

per sample of a batch (serve/mixture.py), or for one prompt as a file (`export`). An embedding is of its own samples alone: adding an
adapter changes no other's. A library is read as hostile: bounded, typed, and a name is one folder right below, never a path.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pydantic
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from lorakit.adapters.bases import check_same_base
from lorakit.adapters.folder import locate, write_files
from lorakit.adapters.io import load_adapter, save_adapter
from lorakit.adapters.mix import mix
from lorakit.adapters.record import read_bounded, to_json
from lorakit.adapters.weights import pack, read
from lorakit.core.adapter import Adapter
from lorakit.core.errors import AdapterMismatch, BadParameter, CheckpointError, did_you_mean
from lorakit.data.row import Row, Shape, shape_of
from lorakit.data.source import load_rows
from lorakit.serve.encoder import Encoder
from lorakit.serve.mixture import Mixture, attach_mixture

MANIFEST, VECTORS = "library.json", "library.safetensors"
FORMAT: Literal["lorakit.library"] = "lorakit.library"
VERSION = 1
LIMIT = 100_000
"""Adapters in a library."""
PATTERN = r"[A-Za-z0-9_-]{1,100}"


class Way(NamedTuple):
    """How the adapters that were found act together."""

    form: str
    """Of the mixture on a model."""
    space: str
    """Of the mix at rest that is the same."""
    most: int | None = None
    """More than this many are never taken."""


WAYS = {"selection": Way("outputs", "delta", 1), "mixture": Way("outputs", "delta"), "fusion": Way("factors", "factor:both")}


class Hit(NamedTuple):
    """An adapter that was found, and the cosine of its vector with the query."""

    name: str
    similarity: float


class Entry(BaseModel):
    """One adapter of the manifest."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = Field(pattern=f"^{PATTERN}$")
    samples: int = Field(ge=1)


class Manifest(BaseModel):
    """The manifest."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["lorakit.library"]
    version: int
    encoder: str
    model: str | None
    entries: list[Entry] = Field(min_length=1, max_length=LIMIT)


@dataclass(frozen=True)
class Library:
    """What a folder holds; nothing of the adapters is read before it is asked for."""

    folder: Path
    encoder: str
    """Name of the encoder that made the vectors."""
    model: str | None
    """The base as the adapters name it."""
    entries: tuple[Entry, ...]
    embeddings: Tensor
    """[N, d]."""

    @property
    def names(self) -> tuple[str, ...]:
        """In the order in which they were added."""
        return tuple(entry.name for entry in self.entries)

    def encode(self, encoder: Encoder, texts: Sequence[str]) -> Tensor:
        """Queries [b, d], by the encoder that the library was made with. Raises AdapterMismatch for another."""
        _check_encoder(self, encoder)
        return encoder.encode(texts)

    def search(self, query: Tensor, k: int = 3, *, without: Collection[str] = ()) -> list[Hit]:
        """The k adapters (or all, where there are fewer) nearest to a vector [d], the nearest first, but those in `without`."""
        self._check(query, k, without)
        found, names = F.cosine_similarity(query.double()[None], self.embeddings.double(), dim=1), self.names
        order = (i for i in found.argsort(descending=True, stable=True).tolist() if names[i] not in without)
        return [Hit(names[i], float(found[i])) for i in islice(order, k)]

    def weights(self, queries: Tensor, k: int = 3, *, without: Collection[str] = ()) -> tuple[tuple[str, ...], Tensor]:
        """The p adapters that any of the queries [b, d] finds, and each query's weights [b, p]: 1/k for its own k, 0 for the others'."""
        found = [self.search(query, k, without=without) for query in queries]
        places = {name: i for i, name in enumerate(dict.fromkeys(hit.name for hits in found for hit in hits))}
        g = torch.zeros(len(found), len(places))
        for row, hits in zip(g, found, strict=True):
            row[[places[hit.name] for hit in hits]] = 1 / len(hits)
        return tuple(places), g

    def adapter(self, name: str) -> Adapter:
        """One adapter, its tensors read as they are used. Raises BadParameter, CheckpointError."""
        if name not in self.names:
            raise BadParameter(f"no adapter of {self.folder} is called {name!r}. {did_you_mean(name, self.names)}")
        return load_adapter(_inside(self.folder, name), lazily=True)

    def adapters(self) -> dict[str, Adapter]:
        """All of them by name."""
        return {name: self.adapter(name) for name in self.names}

    def export(self, names: Sequence[str], how: str = "mixture", *, force: bool = False) -> Adapter:
        """What these adapters are together with weights 1/k, as one plain LoRA. Raises as `mix` does."""
        way, few = _way(how, len(names))
        return mix([self.adapter(name) for name in names[:few]], "linear", weights=[1 / few] * few, space=way.space, force=force)

    def attach(
        self, model: nn.Module, queries: Tensor, k: int = 3, *, how: str = "mixture", without: Collection[str] = (), force: bool = False
    ) -> tuple[Mixture, Tensor]:
        """Put what the queries [b, d] find on a base: the mixture, and the weights [b, p] under which a batch of b samples runs."""
        way, few = _way(how, k)
        names, g = self.weights(queries, few, without=without)
        return attach_mixture(model, {name: self.adapter(name) for name in names}, form=way.form, force=force), g

    def _check(self, query: Tensor, k: int, without: Collection[str]) -> None:
        if query.shape != self.embeddings.shape[1:]:
            raise AdapterMismatch(
                f"a query has shape {tuple(query.shape)}, and the library's vectors {tuple(self.embeddings.shape[1:])}: "
                f"they are of different encoders; the library's is {self.encoder}"
            )
        if not query.isfinite().all():
            raise BadParameter("the query holds NaN or infinite values")
        if k < 1 or set(self.names) <= set(without):
            raise BadParameter(f"k={k} of {len(set(self.names) - set(without))} adapters: expected at least one of each")


def open_library(folder: str | Path) -> Library:
    """What a folder says it holds. Raises CheckpointError."""
    folder = Path(folder)
    path, vectors = locate(folder, MANIFEST), locate(folder, VECTORS)
    if path is None or vectors is None:
        raise CheckpointError(f"{folder} is no library: it has no {MANIFEST if path is None else VECTORS}; `lorakit library add` makes one")
    manifest = _manifest(path)
    embeddings = read(vectors).get("embeddings")
    n = len(manifest.entries)
    if embeddings is None or embeddings.dim() != 2 or len(embeddings) != n or not embeddings.is_floating_point():
        raise CheckpointError(f"{vectors} holds no `embeddings` of the {n} adapters that {path} lists")
    if not embeddings.isfinite().all():
        raise CheckpointError(f"{vectors} holds NaN or infinite values")
    return Library(folder, manifest.encoder, manifest.model, tuple(manifest.entries), embeddings.float())


def add(
    folder: str | Path,
    name: str,
    adapter: Adapter,
    texts: Sequence[str],
    encoder: Encoder,
    *,
    model: str | None = None,
    force: bool = False,
) -> Library:
    """Copy an adapter into a library, made if need be, under a name, with the mean vector of `texts`, inputs of its task.

    One writer a folder. `model`: the base's name, for an adapter that does not say it.

    Raises BadParameter, AdapterMismatch for another encoder, or (unless `force`) for another base than the first adapter's.
    """
    folder = Path(folder)
    before = open_library(folder) if locate(folder, MANIFEST) is not None else None
    if not re.fullmatch(PATTERN, name):
        raise BadParameter(f"name {name!r}: use up to 100 letters, digits, '_' and '-'")
    if not texts:
        raise BadParameter(f"no sample input of {name!r} was given; expected a handful")
    if before is not None:
        _check_new(before, name, adapter, encoder, force)
    vector = encoder.encode(texts).double().mean(0, keepdim=True).float()
    if not vector.isfinite().all():
        raise BadParameter(f"the encoder makes no finite vector of the samples of {name!r}")
    if "model" not in adapter.meta and model is not None:
        adapter = replace(adapter, meta={**adapter.meta, "model": model})
    save_adapter(adapter, _inside(folder, name))
    entries = [*(before.entries if before is not None else ()), Entry(name=name, samples=len(texts))]
    embeddings = vector if before is None else torch.cat([before.embeddings, vector])
    base = before.model if before is not None else adapter.meta.get("model")
    manifest = Manifest(format=FORMAT, version=VERSION, encoder=encoder.name, model=base, entries=entries)
    write_files(folder, {MANIFEST: to_json(manifest.model_dump()), VECTORS: pack({"embeddings": embeddings})})
    return open_library(folder)


def sample_inputs(data: str, m: int) -> list[str]:
    """What a task's inputs are like: m rows of the training side of `data`, evenly spread, without their answers. Raises DataError."""
    rows = load_rows(data, "train")
    step = max(1, len(rows) // m)
    return [INPUTS[shape_of(row)](row) for row in rows[::step][:m]]


INPUTS: dict[Shape, Callable[[Row], str]] = {
    "text": lambda row: str(row["text"]),
    "classify": lambda row: str(row["text"]),
    "pair": lambda row: str(row["prompt"]),
    "chat": lambda row: _asked(row["messages"]),
    "tag": lambda row: " ".join(row["tokens"]),
    "preference": lambda row: _asked(row["prompt"]),
    "feedback": lambda row: _asked(row["prompt"]),
}


def _asked(prompt: str | list[Row]) -> str:
    """What everybody but the assistant said."""
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt if m["role"] != "assistant")


def _check_new(library: Library, name: str, adapter: Adapter, encoder: Encoder, force: bool) -> None:
    if name in library.names:
        raise BadParameter(f"{library.folder} has an adapter {name!r} already; choose another name (--name)")
    _check_encoder(library, encoder)
    if not force:
        first = library.names[0]
        check_same_base({first: library.adapter(first).meta, name: adapter.meta})


def _check_encoder(library: Library, encoder: Encoder) -> None:
    if encoder.name != library.encoder:
        raise AdapterMismatch(f"the library's vectors are those of {library.encoder}, which {encoder.name} cannot be compared with")


def _manifest(path: Path) -> Manifest:
    try:
        manifest = Manifest.model_validate_json(read_bounded(path))
    except pydantic.ValidationError as error:
        first: Any = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path} is not a library's manifest: {where + ': ' if where else ''}{first['msg']}") from None
    if manifest.version > VERSION:
        raise CheckpointError(f"{path} has format version {manifest.version}; this lorakit reads up to {VERSION}: upgrade lorakit")
    twice = [name for name, count in Counter(entry.name for entry in manifest.entries).items() if count > 1]
    if twice:
        raise CheckpointError(f"{path} lists {twice[0]!r} twice")
    return manifest


def _inside(folder: Path, name: str) -> Path:
    """The folder of an adapter. Raises CheckpointError where a link leads out of the library."""
    path = folder / name
    if path.resolve() != folder.resolve() / name:
        raise CheckpointError(f"{path} is a link that leads out of the library")
    return path


def _way(how: str, k: int) -> tuple[Way, int]:
    """The way, and of how many adapters at most. Raises BadParameter."""
    if how not in WAYS:
        raise BadParameter(f"how={how!r} is none of the ways to put adapters together. {did_you_mean(how, WAYS)}")
    if k < 1:
        raise BadParameter(f"{k} adapters make nothing together; expected at least one")
    way = WAYS[how]
    return way, k if way.most is None else min(k, way.most)
