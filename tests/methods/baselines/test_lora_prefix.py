"""LoRA with prefix tuning (arXiv:2106.09685, section 5.1): both parts are theirs, and they add up."""

import pytest
import torch

from lorakit import Incompatible, NotExportable, NotMergeable, attach
from lorakit.adapters.peft import to_peft
from tests.laws.steps import Run
from tests.laws.subject import base, batch, far, logits, same_bits, small, subject


@pytest.mark.parametrize("form", ["layer", "embedding"])
def test_it_is_lora_and_the_prefix_and_nothing_else(form: str) -> None:
    adapted = subject("lora_prefix", form=form)
    both = {k: v.clone() for k, v in adapted.tensors("default").items()}
    counts = [subject(name, **kwargs).params().numel() for name, kwargs in (("lora", {}), ("prefix", {"form": form}))]
    assert adapted.params().numel() == sum(counts)
    model = base()
    alone = attach(model, small("lora"))
    alone.load_tensors("default", both)
    alone.add("prefix", small("prefix", form=form))
    alone.load_tensors("prefix", both)
    assert far(logits(alone.switch("default", "prefix").model, batch()), logits(adapted.model, batch())) < 1e-6
    for part in ("default", "prefix"):  # each matters
        assert far(logits(alone.switch(part).model, batch()), logits(adapted.model, batch())) > 1e-2


def test_the_prefix_learns_faster_by_its_ratio() -> None:
    adapted = subject("lora_prefix", awake=False, form="layer", ratio=50.0)
    run = Run(adapted, total=4, lr=1e-3)
    rates = {name: group["lr"] for group in run.optimizer.param_groups for name in group["names"]}
    assert {rate for name, rate in rates.items() if name.endswith(("prefix.K", "prefix.V"))} == {50e-3}
    assert {rate for name, rate in rates.items() if name.endswith((".A", ".B"))} == {1e-3}


def test_it_is_kept_whole(tmp_path: object) -> None:
    adapted = subject("lora_prefix")
    with pytest.raises(NotMergeable, match="prompt stays"):
        adapted.merge()
    with pytest.raises(NotExportable, match="prompt stays"):
        to_peft(adapted.state(), tmp_path, model=base())
    with pytest.raises(Incompatible, match="cannot be scaled"):
        adapted.scale("default", 2.0)
    assert same_bits(logits(adapted.detach(), batch()), logits(base(), batch()))


def test_a_prefix_helps_where_low_rank_updates_of_few_sites_cannot() -> None:
    """Planted: the base behind hidden words, and LoRA where it changes nothing that a constant input could (rank 1 at one late site)."""
    ids = batch(3, rows=6, length=6)
    hidden = batch(9, rows=1, length=4)[0]
    with torch.no_grad():
        target = base()(input_ids=torch.cat([hidden.expand(6, -1), ids], dim=1)).logits[:, 4:]
    left = {}
    for name in ("lora", "lora_prefix"):
        adapted = attach(base(), small(name, r=1, sites=["layers.1.mlp.up_proj"], tokens=4))
        optimizer = torch.optim.AdamW([p.tensor for p in adapted.params()], lr=0.05)
        for _ in range(80):
            loss = (adapted.model(input_ids=ids).logits - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        left[name] = loss.item()
    assert left["lora_prefix"] < 0.5 * left["lora"], left
