"""SGD over a parameter table, with momentum.

v ← momentum · v + g        w ← w − lr · v        (no state where momentum is 0)
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from lorakit.core.params import ParamTable
from lorakit.core.site import MIXTURES, Kind


@dataclass(frozen=True)
class SGD:
    """torch.optim.SGD in one group, in the table's order."""

    kinds: ClassVar[frozenset[Kind]] = MIXTURES

    momentum: float = 0.0

    @property
    def rule(self) -> str:
        """The optimizer's row in the memory estimator's table of states."""
        return "sgd+momentum" if self.momentum else "sgd"

    def build(self, table: ParamTable, *, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        """The optimizer of a run."""
        group = {"params": [p.tensor for p in table], "names": [p.name for p in table]}
        return torch.optim.SGD([group], lr=lr, momentum=self.momentum, weight_decay=weight_decay)
