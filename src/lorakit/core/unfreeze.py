"""Whole modules trained beside the deltas (a classifier head, norms, biases, everything).

The trained parameters are new objects in the modules' places; the originals are kept, so that switching, disabling and detaching are
exact, and a weight tied to one that stays frozen is untied by being trained. Parameters of a lower precision train in fp32 and are cast
inside forward.
"""

import fnmatch
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.errors import Incompatible, NoSuchSite, did_you_mean
from lorakit.core.generated import generate
from lorakit.core.site import ours

Pattern = str | Callable[[nn.Module, str], bool]
"""A name, suffix or glob; or a predicate of a module and the name of its parameter (parts/unfrozen), which may match none."""


@dataclass
class Unfrozen:
    """One parameter by address, its original and its trained form."""

    name: str
    module: nn.Module
    attribute: str
    original: nn.Parameter
    trained: nn.Parameter

    def install(self, on: bool) -> None:
        """Put the trained (or the original) parameter in place."""
        self.module.register_parameter(self.attribute, self.trained if on else self.original)


def unfreeze(model: nn.Module, patterns: Iterable[Pattern]) -> list[Unfrozen]:
    """Clone every parameter whose path, module or module suffix matches a pattern. Raises NoSuchSite for a pattern that matches none."""
    places = [
        (f"{path}.{name}".lstrip("."), path, module, name)
        for path, module in model.named_modules()
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False)
        if not ours(path) and p is not None
    ]
    found: dict[str, Unfrozen] = {}
    clones: dict[int, nn.Parameter] = {}  # weights that are tied and both trained stay tied
    for pattern in patterns:
        hits = [(full, path, m, p) for full, path, m, p in places if (pattern(m, p) if callable(pattern) else _hits(pattern, full, path))]
        if not hits and isinstance(pattern, str):
            names = {path.rsplit(".", 1)[-1] for _, path, _, _ in places}
            raise NoSuchSite(f"unfreeze entry {pattern!r} matches no module with parameters. {did_you_mean(pattern, names)}")
        for full, _, module, name in hits:
            original = getattr(module, name)
            if not original.is_floating_point():
                raise Incompatible(f"unfreeze entry {pattern!r} names {full}, whose packed codes cannot be trained; leave it out")
            trained = clones.setdefault(id(original), _trained(original))
            found.setdefault(full, Unfrozen(full, module, name, original, trained))
    for entry in found.values():
        wide = entry.trained.dtype
        if entry.original.dtype != wide:
            cast_inside(entry.module, entry.original.dtype)
    return list(found.values())


def _hits(pattern: str, full: str, path: str) -> bool:
    prefixes = [path, full, *(path[:i] for i, c in enumerate(path) if c == ".")]
    return any(p == pattern or p.endswith("." + pattern) or fnmatch.fnmatchcase(p, pattern) for p in prefixes)


def _trained(original: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(original.detach().to(torch.promote_types(original.dtype, torch.float32), copy=True))


def cast_inside(module: nn.Module, stored: torch.dtype) -> None:
    """Swap the class so that forward sees the parameters in the input's dtype (for ids: in the dtype they were stored in)."""
    if not hasattr(type(module), "casting"):
        module.__class__ = _casting_class(type(module), stored)  # type: ignore[arg-type]  # mypy finds no __hash__ on type[Module]


def stop_casting(module: nn.Module) -> None:
    """Undo `cast_inside`."""
    plain = getattr(type(module), "casting", None)
    if plain is not None:
        module.__class__ = plain


@functools.cache
def _casting_class(plain: type[nn.Module], stored: torch.dtype) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        dtype = x.dtype if x.is_floating_point() else stored
        names = [n for n, p in self.named_parameters(recurse=False) if p.is_floating_point()]
        for name in names:  # an instance attribute shadows the registered parameter of the same name
            self.__dict__[name] = self._parameters[name].to(dtype)  # type: ignore[union-attr]
        try:
            return plain.forward(self, *args, **kwargs)
        finally:
            for name in names:
                del self.__dict__[name]

    return generate("Casting", _casting_class, plain, stored, forward=forward, casting=plain)
