"""Adapters at rest: factors, checks, and what is not s·B·A."""

import dataclasses

import pytest
import torch

from lorakit import AdapterMismatch, NotExportable, list_methods
from tests.laws.subject import far, subject


@pytest.mark.parametrize("name", list_methods())
def test_factors_at_rest_are_those_of_the_live_branches(name: str) -> None:
    adapted = subject(name, "gpt2", sites=["c_attn[q]", "mlp"])
    state = adapted.state()
    live = [branch.factors() for branch in adapted.branches()]
    if adapted.methods["default"].beyond or any(f is None or f.gain is not None for f in live):
        said = "rescales W itself at 6 sites" if adapted.methods["default"].combine.full_rank() else "not s·B·A|no factors|more than"
        with pytest.raises(NotExportable, match=said):
            state.factors()
        return
    found = state.factors()
    assert list(found) == [b.site.name for b in adapted.branches()]
    for branch in adapted.branches():
        f = found[branch.site.name]
        whole = branch.weight().detach()
        part = whole if branch.index is None else whole[branch.index]
        assert far(f.s * f.B @ f.A, part) < 1e-5
        assert f.gain is None
        assert not f.A.requires_grad


def test_checks_name_what_is_wrong() -> None:
    state = subject("lora", sites="qv").state()
    key = next(iter(state.tensors))

    def broken(**changes: object) -> str:
        tensors = {k: v for k, v in (dict(state.tensors) | changes).items() if v is not None}
        with pytest.raises(AdapterMismatch) as caught:
            dataclasses.replace(state, tensors=tensors).check(state.tensors, "here")
        return str(caught.value)

    assert f"1 missing ({key}" in broken(**{key: None})
    assert "not expected" in broken(**{"extra.A": torch.zeros(1)})
    assert "Did you mean" in broken(**{key: None, key.replace("q_proj", "q_porj"): torch.zeros(1)})
    assert "shape (3,)" in broken(**{key: torch.zeros(3)})
    shape = state.tensors[key].shape
    assert "holds torch.int64; expected floating-point numbers" in broken(**{key: torch.zeros(shape, dtype=torch.int64)})
    for value in (torch.nan, torch.inf, -torch.inf):
        one = torch.zeros(shape)
        one.view(-1)[-1] = value
        assert "NaN or infinite" in broken(**{key: one})
        assert "NaN or infinite" in broken(**{key: one.index_fill(-1, torch.tensor([0]), torch.inf)})  # inf − inf
    large = torch.full(shape, torch.finfo(torch.float32).max)  # their sum overflows
    dataclasses.replace(state, tensors={**state.tensors, key: large}).check(state.tensors, "here")


def test_tensors_of_a_part_are_not_those_of_the_whole() -> None:
    state = subject("lora", "gpt2", sites=["c_attn[q]", "c_attn[v]"]).state()
    for site in state.sites:
        assert set(state.of(site)) == {"A", "B"}
        assert state.of(site)["B"].shape[0] == site.d_out
