"""The table of trainable parameters: by address, in a fixed order, once each."""

import torch
from torch import nn

from lorakit import attach, get_method
from tests.laws.subject import base, subject


def test_rows_name_sites_and_roles() -> None:
    adapted = subject("dora", sites="qv", unfreeze=("lm_head",))
    rows = list(adapted.params())
    assert [p.name for p in rows[:3]] == [f"model.layers.0.self_attn.q_proj.{x}" for x in ("A", "B", "m")]
    assert rows[-1].name == "unfrozen.lm_head.weight"
    assert {p.role for p in rows} == {"A", "B", "m", "full"}
    assert {len(adapted.params().by_role(x)) for x in "ABm"} == {4}
    assert len({id(p.tensor) for p in rows}) == len(rows)


def test_a_row_is_an_address_not_a_tensor() -> None:
    adapted = subject("lora", sites="q_proj")
    table = adapted.params()
    row = table.rows[0]
    row.module.A = nn.Parameter(torch.zeros(1))
    assert row.tensor.numel() == 1


def test_pairs_and_groups() -> None:
    for name, pairs in (("lora", 4), ("lora_fa", 0), ("adalora", 4), ("pissa", 4)):
        table = subject(name, sites="qv").params()
        assert len(table.pairs()) == pairs
        assert all(a.site == b.site and (a.role, b.role) == ("A", "B") for a, b in table.pairs())
        groups = table.groups(lambda p: p.role)
        assert sum(map(len, groups.values())) == len(table)
        assert sum(p.tensor.numel() for rows in groups.values() for p in rows) == table.numel()


def test_two_active_adapters_at_one_site_are_told_apart_by_module() -> None:
    adapted = attach(base(), get_method("lora", sites="q_proj"), name="a").add("b", get_method("lora", sites="q_proj"), seed=1)
    table = adapted.switch("a", "b").params()
    assert len(table.pairs()) == 4
    assert len({id(p.tensor) for p in table}) == 8
