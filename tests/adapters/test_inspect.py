"""What is said of an adapter is so: every figure against a dense ΔW."""

import builtins
import io
import json
import math

import pytest
import torch
from rich.console import Console

import lorakit
from lorakit.adapters.inspect import inspect_adapter, spectrum_plot
from tests.adapters.subject import shaken, tiny_model
from tests.laws.matrix import under
from tests.laws.subject import subject


@pytest.mark.parametrize("name", under("L3"))
def test_norms_and_spectra_are_those_of_the_dense_update(name):
    adapted = subject(name, "gpt2", sites=["c_attn[q]", "c_fc", "wte"])
    adapter = adapted.state()
    report = inspect_adapter(adapter)
    if adapted.branches()[0].bias() is not None:
        return  # the weights do not change
    for site, branch in zip(report.sites, adapted.branches(), strict=True):
        dense = branch.delta.weight().detach().double()
        values = torch.linalg.svdvals(dense)
        torch.testing.assert_close(
            torch.tensor(site.singular_values), values[: len(site.singular_values)], atol=1e-6, rtol=1e-5, check_dtype=False
        )
        assert values[len(site.singular_values) :].sum() < 1e-4
        assert site.norm == pytest.approx(dense.norm().item(), rel=1e-5)
        f = adapter.deltas()[site.name].factors()
        assert site.rank == (f.A.shape[0] if f is not None else branch.delta.bound())
        shares = values[values > 1e-9 * values[0]].square() / values.square().sum()
        assert site.effective_rank == pytest.approx(math.exp(-(shares * shares.log()).sum().item()), rel=1e-3)
    layer = [b.delta.weight() for b in adapted.branches() if b.site.layer == 0]
    assert report.layers["0"] == pytest.approx(math.sqrt(sum(w.square().sum().item() for w in layer)), rel=1e-5)
    assert set(report.layers) == {"0", "1", "other"}
    assert report.rescales == adapted.methods["default"].combine.full_rank()


@pytest.mark.parametrize("name", ["adapter_houlsby", "compacter", "bitfit"])
def test_where_weights_do_not_change_norms_are_those_of_the_tensors(name):
    adapted = subject(name, "gpt2")
    report = inspect_adapter(adapted.state())
    for site, branch in zip(report.sites, adapted.branches(), strict=True):
        assert site.norm == pytest.approx(torch.cat([p.detach().flatten() for p in branch.delta.parameters()]).norm().item(), rel=1e-5)
        assert (site.rank, site.singular_values, site.effective_rank) == (None, [], 0.0)
    assert report.notes == ["norms of the sites' tensors: the weights do not change"]
    assert json.loads(json.dumps(report.as_dict()))["sites"][0]["rank"] is None
    out = Console(file=io.StringIO(), width=140)
    out.print(report.table())
    assert "the weights do not change" in out.file.getvalue()
    assert not report.rescales


def test_bytes_base_and_whole_modules(tmp_path):
    adapted = shaken(tiny_model("llama"), "lora", r=2, sites=["q_proj"], unfreeze=("norm",))
    adapted.save(tmp_path)
    report = inspect_adapter(adapted.state(), folder=tmp_path)
    assert report.bytes["tensors"] == 4 * (2 * 2 * (32 + 32) + 32)
    assert report.bytes["adapter.safetensors"] == (tmp_path / "adapter.safetensors").stat().st_size
    assert report.base == adapted.fingerprint.as_dict()
    assert report.unfrozen["model.norm.weight"] == [32]
    assert json.loads(json.dumps(report.as_dict()))["sites"][0]["effective_rank"] == report.sites[0].effective_rank


def test_an_untrained_adapter_has_no_update():
    report = inspect_adapter(lorakit.attach(tiny_model("llama"), lorakit.get_method("lora")).state())
    assert {s.norm for s in report.sites} == {0.0}
    assert {s.effective_rank for s in report.sites} == {0.0}


def test_the_table(tmp_path):
    out = Console(file=io.StringIO(), width=140)
    out.print(inspect_adapter(shaken(tiny_model("gpt2"), "dora", sites=["c_attn[q]"], unfreeze=("ln_f",)).state()).table())
    text = out.file.getvalue()
    for expected in ("dora, 2 sites", "transformer.h.0.attn.c_attn[q]", "32×32", "norms of s·B·A alone", "transformer.ln_f.weight"):
        assert expected in text


def test_the_plot(tmp_path):
    report = inspect_adapter(shaken(tiny_model("llama"), "lora", sites=["q_proj", "embedding"]).state())
    assert spectrum_plot(report, tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_without_matplotlib(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(lorakit.MissingExtra, match=r"lorakit\[plot\]"):
        spectrum_plot(inspect_adapter(shaken(tiny_model("llama"), "lora").state()), tmp_path / "x.png")
