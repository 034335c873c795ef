"""AdamW over a parameter table, with learning rates by role.

A group's rate is the run's rate times its multiplier, so that schedules act on all groups alike. Weight decay is one number, 0 by default,
and a role has it or not.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from lorakit.core.errors import Incompatible
from lorakit.core.params import Param, ParamTable
from lorakit.core.site import MIXTURES, Kind


@dataclass(frozen=True)
class AdamW:
    """torch.optim.AdamW. `ratios`: (role, multiplier) pairs; `embedding_lr`: a fixed rate for embedding sites (LoRA+), None for the
    run's; `undecayed`: roles without weight decay."""

    kinds: ClassVar[frozenset[Kind]] = MIXTURES
    rule: ClassVar[str] = "adamw"
    """The optimizer's row in the memory estimator's table of states."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    ratios: tuple[tuple[str, float], ...] = ()
    embedding_lr: float | None = None
    undecayed: tuple[str, ...] = ()

    def build(self, table: ParamTable, *, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        """One group per rate and decay, in the table's order. Raises Incompatible for an adapter of which nothing is trained."""
        if not len(table):
            raise Incompatible("there is nothing to train: the active adapter has no trainable parameters, as a compact one has none")
        kinds = table.groups(lambda p: (self.rate(p, lr), 0.0 if p.role in self.undecayed else weight_decay))
        groups = [
            {"params": [p.tensor for p in rows], "lr": rate, "weight_decay": decay, "names": [p.name for p in rows]}
            for (rate, decay), rows in kinds.items()
        ]
        return torch.optim.AdamW(groups, lr=lr, betas=self.betas, eps=self.eps, weight_decay=weight_decay)

    def rate(self, param: Param, lr: float) -> float:
        """The learning rate of one parameter."""
        if self.embedding_lr is not None and param.site is not None and param.site.kind == "embedding":
            return self.embedding_lr
        return lr * dict(self.ratios).get(param.role, 1.0)
