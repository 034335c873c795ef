"""lorakit's own folders: the same bytes again and again, and hostile ones refused in one clear line."""

import errno
import json
import os
import pickle
import shutil

import pytest
import safetensors.torch
import torch

import lorakit
from lorakit.adapters import weights
from lorakit.adapters.io import load_adapter, save_adapter
from lorakit.adapters.record import SIZE_LIMIT
from lorakit.core.adapter import Adapter
from lorakit.core.method import Recipe
from tests.adapters.subject import logits, shaken, tiny_model
from tests.laws.subject import subject

FILES = ["adapter.json", "adapter.safetensors"]


def bytes_of(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture
def saved(tmp_path):
    """(an untouched model, a folder with a small adapter)."""
    adapted = shaken(tiny_model("llama"), "lora", r=2, sites=["q_proj"])
    adapted.save(tmp_path / "a")
    return tiny_model("llama"), tmp_path / "a"


def refused(model, folder, error, message):
    """Loading fails with one line that says this, and leaves the model as it was."""
    before = logits(model)
    with pytest.raises(error, match=message) as caught:
        lorakit.load(model, folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert torch.equal(logits(model), before)


# ----------------------------------------------------------------------------------------------------------------- round trips
@pytest.mark.parametrize("name", lorakit.list_methods())
@pytest.mark.parametrize(("arch", "kwargs"), [("llama", {"unfreeze": ("norm",)}), ("gpt2", {"sites": ["c_attn[q]", "c_fc", "wte"]})])
def test_saving_loading_and_saving_again_gives_the_same_bytes(name, arch, kwargs, tmp_path):
    adapted = subject(name, arch, **kwargs)
    adapted.meta = {
        "chat_template": "{{ '\n' }}{# ü #}",
        "metrics": {"loss": 0.1 + 0.2, "perplexity": float("inf"), 10: 1, 9: None},
        "steps": [1, 2],
    }
    adapted.save(tmp_path / "a")
    first = load_adapter(tmp_path / "a")
    save_adapter(first, tmp_path / "b")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    assert (first.recipe, first.sites) == (adapted.state().recipe, adapted.state().sites)
    again = lorakit.load(tiny_model(arch), tmp_path / "b")
    assert torch.equal(logits(again.model), logits(adapted.model))
    again.save(tmp_path / "c")
    assert bytes_of(tmp_path / "c") == bytes_of(tmp_path / "a")


def test_the_files(saved):
    _, folder = saved
    record = json.loads((folder / "adapter.json").read_text())
    assert (record["format"], record["version"]) == ("lorakit.adapter", 1)
    assert record["recipe"] == {"name": "lora", "kwargs": {"r": 2, "sites": ["q_proj"]}}
    assert record["sites"][0] == {
        "name": "model.layers.0.self_attn.q_proj", "kind": "linear", "d_in": 32, "d_out": 32, "layer": 0, "role": "q", "rows": None,
    }  # fmt: skip
    assert set(record["meta"]["base"]) == {"name", "checkpoint", "rows"}
    data = (folder / "adapter.safetensors").read_bytes()
    assert json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"] == {"format": "pt"}
    assert sorted(safetensors.torch.load(data)) == [f"model.layers.{i}.self_attn.q_proj.{k}" for i in (0, 1) for k in "AB"]


def test_rows_of_parts_are_pairs(tmp_path):
    shaken(tiny_model("gpt_neox"), "lora", sites="qv").save(tmp_path)
    rows = {s["name"].split("[")[1]: s["rows"] for s in json.loads((tmp_path / "adapter.json").read_text())["sites"]}
    assert rows == {"q]": [[0, 8], [24, 32], [48, 56], [72, 80]], "v]": [[16, 24], [40, 48], [64, 72], [88, 96]]}  # head by head


def test_a_predicate_for_sites_is_saved_as_the_sites_it_chose(tmp_path):
    adapted = shaken(tiny_model("llama"), "lora", sites=lambda site: site.role == "v")
    adapted.save(tmp_path)
    assert load_adapter(tmp_path).recipe.kwargs["sites"] == [f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)]
    assert torch.equal(logits(lorakit.load(tiny_model("llama"), tmp_path).model), logits(adapted.model))


def test_views_and_aliases_are_stored_whole(tmp_path):
    adapter = shaken(tiny_model("llama"), "lora", r=2, sites=["q_proj"]).state()
    shared = torch.arange(128.0).view(4, 32)
    tensors = {k: shared[:2] if k.endswith("A") else shared[2:].T for k in adapter.tensors}
    save_adapter(Adapter(adapter.recipe, adapter.sites, tensors, adapter.meta), tmp_path)
    read = load_adapter(tmp_path)
    assert all(torch.equal(read.tensors[k], v) for k, v in tensors.items())


def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    adapter = shaken(tiny_model("llama"), "lora").state()
    with pytest.raises(lorakit.CheckpointError, match="what JSON cannot"):
        save_adapter(Adapter(adapter.recipe, adapter.sites, adapter.tensors, {"tensor": torch.ones(1)}), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_failing_save_leaves_the_old_adapter(saved, monkeypatch):
    model, folder = saved
    before = bytes_of(folder)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    other = shaken(tiny_model("llama"), "lora", seed=5)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(lorakit.CheckpointError, match="the disk is full"):
            other.save(folder)
    assert bytes_of(folder) == before
    lorakit.load(model, folder)


def test_lazily_a_site_is_read_when_it_is_opened(saved, monkeypatch):
    _, folder = saved
    adapter, asked, real = load_adapter(folder, lazily=True), [], weights._filled
    monkeypatch.setattr(weights, "_filled", lambda place, file: asked.append(place.name) or real(place, file))
    site = adapter.sites[1]
    delta = adapter.opened()(site)
    assert sorted(asked) == [f"{site.name}.A", f"{site.name}.B"]
    assert torch.equal(delta.weight(), load_adapter(folder).deltas()[site.name].weight())


# ------------------------------------------------------------------------------------------------------------ what is no adapter
def test_places_without_an_adapter(saved, tmp_path):
    model, folder = saved
    (tmp_path / "empty").mkdir()
    refused(model, tmp_path / "b", lorakit.CheckpointError, "there is no folder .*b. (Did you mean|Known: 'a', 'empty'|Known: a, empty)")
    refused(
        model,
        tmp_path / "empty",
        lorakit.CheckpointError,
        r"holds no adapter: no adapter.json \(lorakit\) and no adapter_config.json \(PEFT\)",
    )
    refused(model, tmp_path, lorakit.CheckpointError, "there is one in .*a$")
    refused(model, folder / "adapter.safetensors", lorakit.CheckpointError, "is a file; give the folder that holds it")


@pytest.mark.parametrize("name", ["pytorch_lora.bin", "adapter.pt", "x.pth", "x.ckpt", "x.pkl"])
def test_pickles_are_refused_unopened(name, saved, tmp_path):
    model, _ = saved
    opened = tmp_path / "opened"

    class Trap:
        def __reduce__(self):
            return (opened.touch, ())

    (tmp_path / "p").mkdir()
    (tmp_path / "p" / name).write_bytes(pickle.dumps(Trap()))
    for place in (tmp_path / "p", tmp_path / "p" / name):
        refused(
            model, place, lorakit.CheckpointError, "is a pickle, which can run code .*convert it to safetensors with the tool that wrote it"
        )
    assert not opened.exists()


def test_a_pickle_under_a_false_name(saved):
    model, folder = saved
    (folder / "adapter.safetensors").write_bytes(pickle.dumps({"a": 1}))
    refused(model, folder, lorakit.CheckpointError, "adapter.safetensors is a pickle")
    torch.save({"a": torch.ones(1)}, folder / "adapter.safetensors")
    refused(model, folder, lorakit.CheckpointError, "adapter.safetensors is a pickle")


def test_no_safetensors_file_is_taken_for_a_pickle(saved):
    """Both begin with two free bytes: here the length of the header spells a pickle's start."""
    model, folder = saved
    tensors = safetensors.torch.load((folder / "adapter.safetensors").read_bytes())
    for start in (b"\x80\x02", b"\x80\x04"):
        size = int.from_bytes(start, "little")
        data = next(d for n in range(size) if (d := safetensors.torch.save(tensors, {"format": "pt", "pad": "x" * n})).startswith(start))
        assert int.from_bytes(data[:8], "little") == size
        (folder / "adapter.safetensors").write_bytes(data)
        lorakit.load(model, folder).detach()


def test_weights_cut_off_anywhere_or_garbage(saved):
    model, folder = saved
    path = folder / "adapter.safetensors"
    whole = path.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(model, folder, lorakit.CheckpointError, "not a whole safetensors file|damaged or cut off")
    for garbage in [b"\xff" * 200, b"{}" * 100, whole + b"x", (10).to_bytes(8, "little") + b"not json!!" + bytes(9)]:
        path.write_bytes(garbage)
        refused(model, folder, lorakit.CheckpointError, "not a whole safetensors file|damaged or cut off")


def test_a_missing_file(saved):
    model, folder = saved
    (folder / "adapter.safetensors").unlink()
    refused(model, folder, lorakit.CheckpointError, "has no adapter.safetensors: it was not copied whole")
    (folder / "adapter.bin").touch()
    refused(model, folder, lorakit.CheckpointError, "adapter.bin is a pickle")


# ---------------------------------------------------------------------------------------------------------------- hostile records
def edited(folder, change):
    record = json.loads((folder / "adapter.json").read_text())
    change(record)
    (folder / "adapter.json").write_text(json.dumps(record))


def set_in(*path, value):
    def change(record):
        for key in path[:-1]:
            record = record[key]
        record[path[-1]] = value

    return change


RECORDS = {
    "later version": (set_in("version", value=2), lorakit.CheckpointError, "format version 2; this lorakit reads up to 1: upgrade"),
    "no format": (lambda r: r.pop("format"), lorakit.CheckpointError, "format: Field required"),
    "other format": (set_in("format", value="else"), lorakit.CheckpointError, "format: Input should be 'lorakit.adapter'"),
    "more fields": (set_in("more", value=1), lorakit.CheckpointError, "more: Extra inputs"),
    "unknown method": (
        set_in("recipe", "name", value="lorra"),
        lorakit.NoSuchMethod,
        r"adapter.json: no method .*'lorra'. Did you mean 'lora'",
    ),
    "unknown parameter": (set_in("recipe", "kwargs", "rr", value=1), lorakit.BadParameter, r"adapter.json: .*'rr'"),
    "parameter of a wrong type": (set_in("recipe", "kwargs", "r", value="many"), lorakit.BadParameter, "r='many'"),
    "endless pattern": (set_in("recipe", "kwargs", "rank_pattern", value={"(a+)+$": 3}), lorakit.CheckpointError, "forever"),
    "no site": (set_in("sites", 0, "name", value="../../etc/passwd"), lorakit.AdapterMismatch, "'../../etc/passwd' that this model lacks"),
    "a path as a part": (set_in("sites", 0, "name", value="/etc/passwd[q]"), lorakit.AdapterMismatch, "that this model lacks"),
    "site of a wrong kind": (set_in("sites", 0, "kind", value="conv"), lorakit.CheckpointError, "sites.0.kind: Input should be"),
    "site of text": (set_in("sites", 0, "d_in", value="32"), lorakit.CheckpointError, "sites.0.d_in"),
    "huge site": (set_in("sites", 0, "d_in", value=2**40), lorakit.CheckpointError, "sites.0.d_in"),
    "large site": (set_in("sites", 0, "d_in", value=2**31), lorakit.AdapterMismatch, "other shapes: .* 32 × 2147483648 there"),
    "negative site": (set_in("sites", 0, "d_out", value=-1), lorakit.CheckpointError, "sites.0.d_out"),
    "rows that do not add up": (set_in("sites", 0, "rows", value=[[0, 31]]), lorakit.CheckpointError, "not .*pairs of 32 rows"),
    "rows backwards": (set_in("sites", 0, "rows", value=[[64, 32]]), lorakit.CheckpointError, "not .*pairs of 32 rows"),
    "rows of another base": (set_in("sites", 0, "rows", value=[[32, 64]]), lorakit.AdapterMismatch, "other shapes"),
    "base of text": (set_in("meta", "base", value="llama"), lorakit.CheckpointError, "adapter's record"),
    "base of more": (set_in("meta", "base", "exec", value="x"), lorakit.CheckpointError, "exec: Extra inputs"),
    "meta of a list": (set_in("meta", value=[]), lorakit.CheckpointError, "meta: Input should be an object"),
    "rank beyond the tensors": (set_in("recipe", "kwargs", "r", value=3), lorakit.AdapterMismatch, r"has shape \(2, 32\).*needs \(3, 32\)"),
    "rank beyond the matrix": (set_in("recipe", "kwargs", "r", value=10**9), lorakit.BadParameter, "exceeds the matrix"),
}


@pytest.mark.parametrize("what", RECORDS)
def test_records_that_do_not_hold(what, saved):
    model, folder = saved
    change, error, message = RECORDS[what]
    edited(folder, change)
    refused(model, folder, error, message)


@pytest.mark.parametrize(
    ("what", "message"),
    [("no site", "missing"), ("a path as a part", "missing"), ("large site", r"has shape \(2, 32\).*needs \(2, 2147483648\)")],
)
def test_records_are_checked_without_a_model_too(what, message, saved):
    """No memory of the size that a record claims is asked for."""
    _, folder = saved
    edited(folder, RECORDS[what][0])
    with pytest.raises(lorakit.AdapterMismatch, match=message):
        load_adapter(folder)


def test_records_that_are_no_json(saved):
    model, folder = saved
    for text in [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": ' + b"9" * 10_000 + b"}"]:
        (folder / "adapter.json").write_bytes(text)
        refused(model, folder, lorakit.CheckpointError, "adapter.json is not an adapter's record")
    with (folder / "adapter.json").open("wb") as file:
        file.truncate(SIZE_LIMIT + 1)
    refused(model, folder, lorakit.CheckpointError, "no adapter's record is larger than")


# ------------------------------------------------------------------------------------------------------------------- the tensors
A = "model.layers.0.self_attn.q_proj.A"
TENSORS = {
    "missing": (lambda t: t.pop(A), r"1 missing \(model.layers.0.self_attn.q_proj.A"),
    "extra": (lambda t: t.update({"x.A": torch.ones(1)}), r"1 not expected \(x.A"),
    "renamed": (lambda t: t.update({A + "1": t.pop(A)}), f"Did you mean '{A}'"),
    "misshaped": (lambda t: t.update({A: torch.ones(2, 31)}), r"has shape \(2, 31\); .* needs \(2, 32\)"),
    "NaN": (lambda t: t[A].fill_(float("nan")), f"tensor {A} holds NaN or infinite values"),
    "infinite": (lambda t: t[A].fill_(float("inf")), "holds NaN or infinite values"),
    "integers": (lambda t: t.update({A: torch.ones(2, 32, dtype=torch.int64)}), "holds torch.int64; expected floating-point"),
    "whole parameter too many": (lambda t: t.update({"unfrozen.model.norm.weight": torch.ones(32)}), "1 not expected"),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_do_not_fit_the_recipe(what, saved):
    model, folder = saved
    change, message = TENSORS[what]
    tensors = safetensors.torch.load((folder / "adapter.safetensors").read_bytes())
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "adapter.safetensors")
    refused(model, folder, lorakit.AdapterMismatch, message)


def test_what_a_rescaling_method_keeps_is_checked_when_it_is_attached(tmp_path):
    shaken(tiny_model("llama"), "dora", r=2, sites=["q_proj"]).save(tmp_path)
    tensors = safetensors.torch.load((tmp_path / "adapter.safetensors").read_bytes())
    tensors[A[:-1] + "m"] = torch.ones(31)
    safetensors.torch.save_file(tensors, tmp_path / "adapter.safetensors")
    refused(tiny_model("llama"), tmp_path, lorakit.AdapterMismatch, r"q_proj.m has shape \(31,\); .* needs \(32,\)")
    del tensors[A[:-1] + "m"]
    safetensors.torch.save_file(tensors, tmp_path / "adapter.safetensors")
    refused(tiny_model("llama"), tmp_path, lorakit.AdapterMismatch, "1 missing")


def test_another_base(saved, tmp_path):
    _, folder = saved
    refused(tiny_model("llama", seed=1), folder, lorakit.AdapterMismatch, "was trained on .* but this model is")
    refused(tiny_model("gpt2"), folder, lorakit.AdapterMismatch, "was trained on|lacks")
    lorakit.load(tiny_model("llama", seed=1), folder, force=True)


def test_a_copied_folder_needs_nothing_else(saved, tmp_path):
    model, folder = saved
    shutil.copytree(folder, tmp_path / "elsewhere" / "b")
    lorakit.load(model, tmp_path / "elsewhere" / "b")


def test_an_adapter_without_sites(tmp_path):
    """Whole modules only: nothing in the format needs a site."""
    adapted = shaken(tiny_model("llama"), "lora", sites=["q_proj"], unfreeze=("norm",))
    state = adapted.state()
    only = Adapter(Recipe("lora", dict(state.recipe.kwargs)), (), {k: v for k, v in state.tensors.items() if k.startswith("unfrozen.")}, {})
    save_adapter(only, tmp_path)
    assert load_adapter(tmp_path).unfrozen().keys() == only.unfrozen().keys()
