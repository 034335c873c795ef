"""The trainable parameters of an adapter, as (module, attribute, site, role): never tensors, because FSDP2 replaces them."""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from lorakit.core.site import Site

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Param:
    """One parameter by address. `site` is None for a module unfrozen as a whole (role "full")."""

    name: str
    module: nn.Module
    attribute: str
    role: str
    site: Site | None

    @property
    def tensor(self) -> nn.Parameter:
        """The parameter as it is now."""
        return getattr(self.module, self.attribute)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ParamTable:
    """Every trainable parameter of a run, in a fixed order."""

    rows: tuple[Param, ...]

    def __iter__(self) -> Iterator[Param]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def by_role(self, role: str) -> list[Param]:
        """All parameters of one role."""
        return [p for p in self.rows if p.role == role]

    def pairs(self) -> list[tuple[Param, Param]]:
        """(A, B) of every site that trains both."""
        found = {(id(p.module), p.role): p for p in self.rows}
        return [(p, found[id(p.module), "B"]) for p in self.by_role("A") if (id(p.module), "B") in found]

    def groups(self, key: Callable[[Param], K]) -> dict[K, list[Param]]:
        """Partition by a function; every parameter lands in exactly one group."""
        out: dict[K, list[Param]] = {}
        for p in self.rows:
            out.setdefault(key(p), []).append(p)
        return out

    def numel(self) -> int:
        """Number of trainable values."""
        return sum(p.tensor.numel() for p in self.rows)
