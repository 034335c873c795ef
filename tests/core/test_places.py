"""Many adapters on one model: what is done with one costs the same beside two others and beside twenty. Work is counted, never timed."""

import copy
import gc
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lorakit.adapters.io
from lorakit import Adapted, AdapterMismatch, BadParameter, attach, get_method, load
from lorakit.core import fresh
from lorakit.core.adapter import POOL
from lorakit.core.layer import Slot
from lorakit.parts.inits.random import Kaiming
from tests.laws.subject import awaken, base, batch, everything, logits, same_bits, subject

FEW, MANY = 3, 20
LORA = get_method("lora", r=2)


def calls(work: Callable[[], object]) -> int:
    """Python functions entered by one call of `work`."""
    count = 0

    def seen(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event == "call"

    running = gc.isenabled()
    gc.disable()  # others' garbage has callbacks of its own
    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(None)
        (gc.enable if running else gc.disable)()
    return count


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return attach(base("llama"), LORA).save(tmp_path / "one")


# ------------------------------------------------------------------------------------------------------------------ counted work
OPERATIONS: dict[str, Callable[[Adapted, str, Path], object]] = {
    "add": lambda adapted, new, folder: adapted.add(new, LORA),
    "add a finished one": lambda adapted, new, folder: adapted.add(new, adapted.state("a1")),
    "load": lambda adapted, new, folder: adapted.load(folder, new),
    "switch": lambda adapted, new, folder: adapted.switch("a1"),
    "switch to two": lambda adapted, new, folder: adapted.switch("a0", "a1"),
    "scale": lambda adapted, new, folder: adapted.scale("a1", 0.5),
    "state": lambda adapted, new, folder: adapted.state("a1"),
    "save": lambda adapted, new, folder: adapted.save(folder.parent / "other", "a1"),
    "params": lambda adapted, new, folder: adapted.params(),
    "disabled": lambda adapted, new, folder: adapted.disabled().__enter__(),
    "merge and unmerge": lambda adapted, new, folder: (adapted.merge(), adapted.unmerge()),
}


@pytest.mark.parametrize("what", OPERATIONS)
def test_work_does_not_grow_with_the_number_of_adapters(what: str, folder: Path) -> None:
    found = []
    for n in (FEW, MANY):
        adapted = Adapted(base("llama"))
        for i in range(n):
            adapted.add(f"a{i}", LORA)
        OPERATIONS[what](copy.deepcopy(adapted), "warm", folder)
        found.append(calls(lambda adapted=adapted: OPERATIONS[what](adapted, "new", folder)))
    assert found[1] <= found[0] + 5, found


def test_work_grows_with_the_number_of_sites_at_most() -> None:
    """Twice the sites, twice the work of a load."""
    found = []
    for sites in (["q_proj", "k_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]):
        adapted = attach(base("llama"), get_method("lora", r=2, sites=sites), name="first")
        state = adapted.state()
        adapted.add("warm", state)
        found.append(calls(lambda adapted=adapted, state=state: adapted.add("new", state)))
    assert found[1] <= 2 * found[0]


# ------------------------------------------------------------------------------------------------------- loading makes nothing twice
class Copies(TorchDispatchMode):
    """Bytes that tensor copies write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten.clone, torch.ops.aten._to_copy):
            self.bytes += out.nbytes
        return out


def test_loading_runs_no_init_and_draws_nothing_for_a_site(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: object) -> None:
        raise AssertionError("weights that are about to be overwritten were initialized")

    drawn: list[str] = []
    draw = fresh.random.generator
    monkeypatch.setattr(Kaiming, "__call__", run)
    monkeypatch.setattr(fresh.random, "generator", lambda seed, name: drawn.append(name) or draw(seed, name))
    load(base("llama"), folder)
    assert set(drawn) <= {POOL}


def test_a_loaded_adapters_tensors_are_the_very_ones_that_were_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, int] = {}
    read = lorakit.adapters.io.read

    def watched(path: Path) -> dict[str, Tensor]:
        found = read(path)
        seen.update({key: tensor.data_ptr() for key, tensor in found.items()})
        return found

    monkeypatch.setattr(lorakit.adapters.io, "read", watched)
    adapted = Adapted(base("llama"))
    with Copies() as copies:
        adapted.load(folder)
    assert copies.bytes == 0
    assert seen == {key: tensor.data_ptr() for key, tensor in adapted.tensors("default").items()}


def test_a_finished_adapter_is_copied_once(folder: Path) -> None:
    adapted, adapter = Adapted(base("llama")), lorakit.adapters.io.load_adapter(folder)
    with Copies() as copies:
        adapted.add("a", adapter)
    assert copies.bytes == sum(tensor.nbytes for tensor in adapter.tensors.values())


def storages(*tensors: Tensor) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}


def test_no_two_adapters_share_memory(folder: Path) -> None:
    adapter = lorakit.adapters.io.load_adapter(folder)
    adapted = Adapted(base("llama")).add("a", adapter).add("b", adapter).load(folder, "c").load(folder, "d")
    owners = [storages(*adapter.tensors.values()), *(storages(*adapted.tensors(name).values()) for name in "abcd")]
    assert sum(map(len, owners)) == len(set().union(*owners))


@pytest.mark.parametrize("how", ["saved over", "cut", "deleted"])
def test_a_loaded_adapter_does_not_need_its_files(how: str, folder: Path) -> None:
    adapted = load(base("llama"), folder)
    want = {key: tensor.clone() for key, tensor in adapted.tensors("default").items()}
    if how == "saved over":
        adapted.add("other", get_method("lora", r=2), seed=5).save(folder)
    for path in folder.iterdir() if how != "saved over" else ():
        if how == "cut":
            path.write_bytes(b"")
        else:
            path.unlink()
    assert all(torch.equal(tensor, want[key]) for key, tensor in adapted.tensors("default").items())


def test_an_adapter_loaded_from_a_folder_is_saved_over_it(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    load(base("llama"), folder).save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["lora", "adalora", "vera", "dora", "relora"])
def test_what_is_loaded_trains_as_what_was_attached(name: str, tmp_path: Path) -> None:
    """The same parameters, and values that can be changed in place."""
    one = awaken(subject(name))
    two = load(base("llama"), one.save(tmp_path / "x"), force=True)
    assert [row.name for row in two.params()] == [row.name for row in one.params()]
    assert {n for n, p in two.model.named_parameters() if p.requires_grad} == {
        n for n, p in one.model.named_parameters() if p.requires_grad
    }
    with torch.no_grad():
        for row in two.params():
            row.tensor.add_(0.1)
    assert not torch.equal(logits(two.model, batch()), logits(one.model, batch()))


def test_shapes_of_no_size_ask_for_no_memory(tmp_path: Path) -> None:
    """A rank that a file announces with a tensor of no values."""
    folder = attach(base("llama"), get_method("increlora", sites=["q_proj"])).save(tmp_path / "x")
    data = (folder / "adapter.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    entries = {"model.layers.0.self_attn.q_proj.A": {"dtype": "F32", "shape": [2**39, 0], "data_offsets": [0, 0]}}
    assert entries.keys() <= header.keys()
    text = json.dumps(entries).encode()
    (folder / "adapter.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(AdapterMismatch, match="has shape|missing"):
        load(base("llama"), folder)


# --------------------------------------------------------------------------------------------------------------------- the model
def test_the_index_and_the_modules_agree_through_everything(folder: Path) -> None:
    model = base("llama")
    before = everything(model)
    adapted = attach(model, LORA, name="a").add("b", get_method("lora", r=2, sites=["q_proj"])).load(folder, "c")
    for change in (lambda: adapted.switch("a", "b"), adapted.merge, adapted.unmerge, lambda: adapted.switch("c"), adapted.switch):
        change()
        slots = {m.path: m for m in model.modules() if isinstance(m, Slot)}
        assert {slot.path: slot for slot in adapted._all_slots()} == slots
        assert {id(b) for n in "abc" for b in adapted.branches(n)} == {id(b) for slot in slots.values() for b in slot.branches.values()}
    twin = copy.deepcopy(adapted).switch("a")
    assert {id(m) for m in twin.model.modules()} >= {id(b) for b in twin.branches("a")}
    twin.detach()
    adapted.detach()
    for one in (model, twin.model):
        assert not any(isinstance(m, Slot) for m in one.modules())
        assert all(same_bits(v, before[k]) for k, v in everything(one).items())


def test_a_vocabulary_may_be_resized_between_two_adapters() -> None:
    adapted = attach(base("llama"), get_method("lora", r=2, sites=["q_proj"]), name="a")
    adapted.model.resize_token_embeddings(adapted.model.config.vocab_size + 3)
    adapted.add("b", get_method("lora", r=2, sites=["lm_head"]))
    (branch,) = adapted.branches("b")
    assert branch.site.d_out == len(branch.delta.B) == adapted.model.config.vocab_size
    adapted.merge()


@pytest.fixture
def collector() -> Iterator[None]:
    running = gc.isenabled()
    yield
    (gc.enable if running else gc.disable)()


@pytest.mark.usefixtures("collector")
@pytest.mark.parametrize("running", [True, False])
def test_the_garbage_collector_is_left_as_it_was(running: bool) -> None:
    (gc.enable if running else gc.disable)()
    adapted = attach(base("llama"), LORA)
    assert gc.isenabled() == running
    with pytest.raises(BadParameter, match="exceeds the matrix"):
        adapted.add("b", get_method("lora", r=1000))
    assert gc.isenabled() == running


def test_modules_without_a_branch_are_left_as_they_are() -> None:
    adapted = attach(base("llama"), get_method("lora", r=2, sites=["q_proj"]))
    other: list[nn.Module] = [m for n, m in adapted.model.named_modules() if n.endswith(("k_proj", "v_proj", "down_proj"))]
    assert other
    assert all(type(m) is nn.Linear for m in other)
