"""AdamW over the table: each parameter in one group, at its rate."""

import pytest
import torch

from lorakit.parts.optimizers.adamw import AdamW
from tests.laws.subject import batch, loss_of, subject


def test_every_parameter_is_in_exactly_one_group() -> None:
    adapted = subject("dora", sites=["qv", "embedding"], unfreeze=("lm_head",))
    table = adapted.params()
    built = AdamW(ratios=(("B", 16.0), ("m", 0.5)), embedding_lr=1e-6).build(table, lr=1e-3)
    placed = [id(p) for g in built.param_groups for p in g["params"]]
    assert sorted(placed) == sorted(id(p.tensor) for p in table)
    rate = {n: g["lr"] for g in built.param_groups for n in g["names"]}
    for p in table:
        want = 1e-6 if p.site is not None and p.site.kind == "embedding" else 1e-3 * {"B": 16.0, "m": 0.5}.get(p.role, 1.0)
        assert rate[p.name] == want
    assert len({g["lr"] for g in built.param_groups}) == len(built.param_groups) == 4


def test_its_step_is_torchs() -> None:
    ours, theirs = subject("lora"), subject("lora")
    a = AdamW(betas=(0.8, 0.9), eps=1e-6).build(ours.params(), lr=1e-2, weight_decay=0.1)
    b = torch.optim.AdamW([p.tensor for p in theirs.params()], lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    for adapted, optimizer in ((ours, a), (theirs, b)):
        for i in range(3):
            loss_of(adapted.model, batch(i)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(p.tensor, q.tensor) for p, q in zip(ours.params(), theirs.params(), strict=True))


def test_schedules_scale_all_groups_alike() -> None:
    adapted = subject("lora")
    optimizer = AdamW(ratios=(("B", 16.0),)).build(adapted.params(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (i + 1))
    optimizer.step()
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([5e-4, 8e-3])
