"""L16: two gloo processes, the base sharded by FSDP2 and the adapters whole, equal one process. One pair of processes for all methods."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from lorakit import list_methods
from lorakit.train.distributed import shard
from tests.laws.steps import Run
from tests.laws.subject import batch, far, logits, same_bits, subject

RANKS, STEPS = 2, 3
UNMASKED = {"keys": 0.0, "hidden": 0.0, "dropout": 0.0}  # a mask of a half batch is not the half of the whole batch's


def trained(name: str, rank: int | None, *, forget: bool = False) -> dict[str, Tensor]:
    """The first step's gradients and the tensors after three; of one process on whole batches when `rank` is None."""
    adapted = subject(name, model={"num_hidden_layers": 2}, **UNMASKED)
    gradients: list[Tensor] = []

    def reduce(grads: list[Tensor]) -> None:
        for g in grads if rank is not None and not forget else ():
            dist.all_reduce(g)
            g /= RANKS
        if not gradients:
            gradients.extend(g.clone() for g in grads)

    def data(i: int) -> Tensor:
        rows = batch(i, rows=2 * RANKS)
        return rows if rank is None else rows[2 * rank : 2 * rank + 2]

    if rank is not None:
        shard(adapted.model, adapted.params())
    Run(adapted, total=8, data=data, reduce=reduce).steps(STEPS)
    out = logits(adapted.model.eval(), batch())
    return {f"grad {i}": g for i, g in enumerate(gradients)} | adapted.tensors("default") | {"logits": out}


def work(rank: int, folder: str, names: list[str], forget: bool = False) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        for name in names:
            torch.save({k: v.detach().clone() for k, v in trained(name, rank, forget=forget).items()}, f"{folder}/{name}.{rank}")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def together() -> Iterator[Path]:
    """A folder with what each process ended with."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (folder, list_methods()), nprocs=RANKS)
        yield Path(folder)


def check_L16(name: str, folder: Path) -> None:
    first, second = (torch.load(folder / f"{name}.{rank}") for rank in range(RANKS))
    alone = trained(name, None)
    assert first.keys() == second.keys() == alone.keys()
    assert all(same_bits(first[k], second[k]) for k in first), "the two processes hold different adapters"
    for key, want in alone.items():
        assert far(first[key], want) < (1e-4 if key.startswith("grad") else 2e-2), (key, far(first[key], want))  # Adam enlarges rounding


@pytest.mark.slow
@pytest.mark.parametrize("name", list_methods())
def test_L16(name: str, together: Path) -> None:
    check_L16(name, together)
