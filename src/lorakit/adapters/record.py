"""What an adapter is besides its tensors, as JSON: format version, recipe, sites, meta. Sorted keys: equal adapters are equal bytes.

A record is read as hostile: bounded in size, typed field by field, and no name in it ever becomes a path.
"""

import json
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from lorakit.adapters.pattern import checked
from lorakit.core.adapter import Adapter
from lorakit.core.errors import BadParameter, CheckpointError, NoSuchMethod
from lorakit.core.method import Recipe, get_method
from lorakit.core.site import Site

FORMAT = "lorakit.adapter"
VERSION = 1
SIZE_LIMIT = 64 * 2**20
"""Bytes of a JSON file."""
SIDE_LIMIT = 2**31
"""Rows or columns of one weight."""
EXPERTS_LIMIT = 2**16

Side = Field(ge=1, le=SIDE_LIMIT)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class SiteRecord(_Strict):
    """One site."""

    name: str
    kind: Literal["linear", "embedding", "experts", "router"]
    d_in: int = Side
    d_out: int = Side
    layer: int | None
    role: str
    rows: list[list[int]] | None
    experts: int | None = Field(default=None, ge=1, le=EXPERTS_LIMIT)
    """Only there where kind is "experts"."""

    def site(self) -> Site:
        """The site; its rows are [start, stop] pairs here."""
        rows = None if self.rows is None else tuple(range(start, stop) for start, stop in self.rows)
        return Site(self.name, self.kind, self.d_in, self.d_out, self.layer, self.role, rows, self.experts)

    @pydantic.model_validator(mode="after")
    def _rows_fit(self) -> "SiteRecord":
        pairs = self.rows if self.rows is not None else [[0, self.d_out]]
        if not all(len(p) == 2 and 0 <= p[0] < p[1] for p in pairs) or sum(p[1] - p[0] for p in pairs) != self.d_out:
            raise ValueError(f"the rows of {self.name!r} are not [start, stop] pairs of {self.d_out} rows together")
        if (self.kind == "experts") != (self.experts is not None):
            raise ValueError(
                f"{self.name!r} is of kind {self.kind!r} with experts={self.experts}; stacked weights have a number, others none"
            )
        return self


class RecipeRecord(_Strict):
    """A method's name and arguments."""

    name: str
    kwargs: dict[str, Any]


class BaseRecord(_Strict):
    """The base's fingerprint."""

    name: str
    checkpoint: str | None
    rows: str | None


class Record(_Strict):
    """A whole record."""

    format: Literal["lorakit.adapter"]
    version: int
    recipe: RecipeRecord
    sites: list[SiteRecord]
    meta: dict[str, Any]

    @pydantic.model_validator(mode="after")
    def _sites_differ(self) -> "Record":
        seen: set[str] = set()
        for site in self.sites:
            if site.name in seen:
                raise ValueError(f"the site {site.name!r} is there twice")
            seen.add(site.name)
        return self


class _Head(BaseModel):
    format: str
    version: int


def to_json(value: dict[str, Any]) -> bytes:
    """Canonical bytes of a JSON object. Raises CheckpointError for what JSON cannot hold."""
    try:
        plain = json.loads(json.dumps(value))  # keys become strings before they are sorted
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the adapter's meta or parameters hold what JSON cannot: {error}") from error
    return (json.dumps(plain, indent=2, sort_keys=True) + "\n").encode()


def record_of(adapter: Adapter) -> dict[str, Any]:
    """The record of an adapter."""
    sites = [
        {**{f: getattr(s, f) for f in ("name", "kind", "d_in", "d_out", "layer", "role")}, "rows": _pairs(s), **_stack(s)}
        for s in adapter.sites
    ]  # fmt: skip
    recipe = {"name": adapter.recipe.name, "kwargs": {k: _plain(v, adapter) for k, v in adapter.recipe.kwargs.items()}}
    return {"format": FORMAT, "version": VERSION, "recipe": recipe, "sites": sites, "meta": adapter.meta}


def _pairs(site: Site) -> list[list[int]] | None:
    return None if site.rows is None else [[r.start, r.stop] for r in site.rows]


def _stack(site: Site) -> dict[str, int]:
    return {} if site.experts is None else {"experts": site.experts}


def _plain(value: Any, adapter: Adapter) -> Any:
    """A predicate for sites is stored as the names of the sites it chose."""
    return [s.name for s in adapter.sites] if callable(value) else value


def read_record(data: bytes, path: Path) -> Record:
    """A checked record. Raises CheckpointError."""
    try:
        head = _Head.model_validate_json(data)
        if head.format == FORMAT and head.version > VERSION:
            raise CheckpointError(f"{path} has format version {head.version}; this lorakit reads up to {VERSION}: upgrade lorakit")
        record = Record.model_validate_json(data)
        if "base" in record.meta:
            BaseRecord.model_validate(record.meta["base"])
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path} is not an adapter's record: {where + ': ' if where else ''}{first['msg']}") from error
    return record


def recipe_in(record: Record, path: Path) -> Recipe:
    """The recipe, rebuilt through the registry. Raises NoSuchMethod or BadParameter, naming the file and the nearest names."""
    for value in record.recipe.kwargs.values():
        for key in value if isinstance(value, dict) else ():
            checked(key, path)
    try:
        recipe = get_method(record.recipe.name, **record.recipe.kwargs).recipe
    except (NoSuchMethod, BadParameter) as error:
        raise type(error)(f"{path}: {error}") from error
    assert recipe is not None
    return recipe


def read_bounded(path: Path) -> bytes:
    """A JSON file's bytes. Raises CheckpointError when there are too many."""
    size = path.stat().st_size
    if size > SIZE_LIMIT:
        raise CheckpointError(f"{path} has {size} bytes; no adapter's record is larger than {SIZE_LIMIT}")
    return path.read_bytes()
