"""How a module meets its site: after it, on the frozen output, or beside the block, on the block's input.

serial    y + M(y)
beside    y + M(x)        x: what the block's first projection reads, from the forward's memo; a site without one reads its own input
"""

from dataclasses import dataclass

from torch import Tensor

from lorakit.core.base import Base
from lorakit.core.combine import Combine
from lorakit.core.context import Ctx
from lorakit.core.delta import Delta
from lorakit.core.errors import Incompatible
from lorakit.core.site import Site


class Serial(Combine):
    """The module after the site: it sees what the site puts out, bias included."""

    def forward(self, x: Tensor, y: Tensor, base: Base, delta: Delta, ctx: Ctx) -> Tensor:
        return delta(delta.drop(y, ctx), ctx)  # type: ignore[no-any-return]

    def weight(self, base: Base, delta: Delta) -> Tensor:
        return delta.weight()


class Beside(Combine):
    """The module beside the block that the site ends."""

    def forward(self, x: Tensor, y: Tensor, base: Base, delta: Delta, ctx: Ctx) -> Tensor:
        for path in delta.reads:
            if path not in ctx.memo:
                raise Incompatible(f"a parallel module reads the input of {path!r}, which did not run before it in this forward")
            x = ctx.memo[path]
        return delta(delta.drop(x, ctx), ctx)  # type: ignore[no-any-return]

    def weight(self, base: Base, delta: Delta) -> Tensor:
        return delta.weight()


@dataclass(frozen=True)
class ModuleSpec:
    """Serial, or beside the block."""

    beside: bool = False
    requires: frozenset[str] = frozenset({"module"})

    def build(self, site: Site, base: Base, delta: Delta) -> Combine:
        return Beside() if self.beside else Serial()

    def count(self, site: Site) -> int:
        return 0

    def full_rank(self) -> bool:
        return False
