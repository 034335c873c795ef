"""Classes made at run time: a subclass with another forward, swapped in as a module's class. Nameless, they pickle by their maker."""

from collections.abc import Callable
from typing import Any

from torch import nn

Maker = Callable[..., type[nn.Module]]
Spelled = type[nn.Module] | tuple[Any, ...]
"""A class, or (maker, spelled plain class, further arguments) that make it again."""


def generate(prefix: str, maker: Maker, plain: type[nn.Module], *rest: Any, **body: Any) -> type[nn.Module]:
    """A subclass of `plain` with these attributes, which `maker(plain, *rest)` makes again."""

    def reduce(self: nn.Module) -> tuple[Any, ...]:
        return _instance, (_spell(type(self)),), self.__dict__

    made = {"made_by": (maker, plain, *rest), "__reduce__": reduce, "__module__": plain.__module__}
    return type(prefix + plain.__name__, (plain,), made | body)


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The class beneath those that this project generates."""
    return next(c for c in type(module).__mro__ if "made_by" not in vars(c))


def _spell(cls: type[nn.Module]) -> Spelled:
    if "made_by" not in vars(cls):
        return cls
    maker, plain, *rest = vars(cls)["made_by"]
    return (maker, _spell(plain), *rest)


def _make(spelled: Spelled) -> type[nn.Module]:
    if not isinstance(spelled, tuple):
        return spelled
    maker, plain, *rest = spelled
    made: type[nn.Module] = maker(_make(plain), *rest)
    return made


def _instance(spelled: Spelled) -> nn.Module:
    cls = _make(spelled)
    return cls.__new__(cls)
