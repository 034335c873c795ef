"""Several processes, started by Accelerate's launcher: each holds the adapters whole and sums their gradients; the base is replicated
(DDP's role) or sharded by FSDP2 (`accelerate launch --use_fsdp`).

Only the adapters' gradients cross the network, in one flat all-reduce a step.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorakit.core.params import ParamTable
from lorakit.core.site import ours


@dataclass(frozen=True)
class World:
    """This process among all: rank, size, its device, and whether the base is to be sharded."""

    rank: int
    size: int
    device: torch.device
    sharded: bool

    @property
    def main(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over all processes, in place, in one flat all-reduce."""
        if self.size > 1 and tensors:
            flat = torch.cat([t.reshape(-1) for t in tensors])
            dist.all_reduce(flat)
            for t, piece in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                t.copy_(piece.view_as(t))

    def total_(self, tensor: Tensor) -> None:
        """Sum one tensor over all processes, in place, wherever it lies."""
        if self.size > 1:
            moved = tensor.to(self.device)
            self.sum_([moved])
            tensor.copy_(moved)

    def total(self, *values: float) -> list[float]:
        """Sums of plain numbers over all processes."""
        packed = torch.tensor(values, dtype=torch.float64, device=self.device)
        self.sum_([packed])
        return packed.tolist()

    def wait(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


def world() -> World:
    """What the launcher's environment says; a single process without one."""
    from accelerate import PartialState

    cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true" or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu)
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and state.num_processes > 1
    return World(state.process_index, state.num_processes, state.device, sharded)


def shard(model: nn.Module, table: ParamTable) -> None:
    """FSDP2 over the model's repeated blocks and its root; the adapters stay whole on every process."""
    from torch.distributed.fsdp import fully_shard

    keep = {row.tensor for row in table} | {p for n, p in model.named_parameters() if ours(n)}
    for block in blocks(model):
        fully_shard(block, ignored_params=keep)
    fully_shard(model, ignored_params=keep)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers: members of the longest ModuleList of each stack."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    longest = max((len(m) for m in lists), default=0)
    return [layer for m in lists if len(m) == longest for layer in m]
