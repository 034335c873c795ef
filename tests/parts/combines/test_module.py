"""A module after its site, or beside the block."""

import pytest
import torch

from lorakit import Incompatible, Method, get_method
from lorakit.core.context import Ctx
from lorakit.parts.combines.module import Beside, ModuleSpec, Serial
from lorakit.parts.deltas.bottleneck import DenseBottleneck
from tests.laws.subject import awaken, subject
from tests.methods.tools import normal


def test_serial_sees_the_frozen_output_and_beside_the_input_or_what_it_reads():
    (branch, *_) = subject("adapter_houlsby", dtype=torch.float64).branches()
    delta = branch.delta
    assert isinstance(delta, DenseBottleneck)
    x, y, z = (normal(3, 32, seed=i) for i in range(3))
    ctx = Ctx(torch.zeros(2, dtype=torch.int64), memo={"there": z})
    assert torch.equal(Serial()(x, y, branch.base, delta, ctx), delta(y, ctx))
    assert torch.equal(Beside()(x, y, branch.base, delta, ctx), delta(x, ctx))
    delta.reads = ("there",)
    assert torch.equal(Beside()(x, y, branch.base, delta, ctx), delta(z, ctx))
    delta.reads = ("elsewhere",)
    with pytest.raises(Incompatible, match="'elsewhere', which did not run before it"):
        Beside()(x, y, branch.base, delta, ctx)


def test_a_low_rank_pair_is_no_module():
    with pytest.raises(Incompatible, match="ModuleSpec needs a delta with"):
        Method(get_method("lora").delta, combine=ModuleSpec())


def test_dropout_is_on_what_the_module_sees():
    adapted = awaken(subject("adapter_houlsby", dropout=0.5, train_norms=False))
    model = adapted.model.train()
    outs = []
    for step in (0, 1, 0):
        with adapted.given(step=step):
            outs.append(model(input_ids=torch.arange(3, 9)[None]).logits.detach())
    assert torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0], outs[1])
