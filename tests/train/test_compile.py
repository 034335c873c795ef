"""Compiling layer by layer: layers share their graphs, nothing is compiled later in a run, results are eager's, and the choice replays."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend

from lorakit import Adapted, Incompatible
from lorakit.data.tiny import tiny_model
from lorakit.train import compile as compile_module
from lorakit.train import compile_choice
from lorakit.train.checkpoint import checkpoints
from lorakit.train.compile import CompiledLayers, compile_layers, layers_of
from lorakit.train.compile_choice import FIGURES, Estimate, Figures, choose, flops_of, graphs_of
from lorakit.train.distributed import World
from lorakit.train.metrics import forward_loss
from lorakit.train.run import Run
from lorakit.train.state import read_state
from lorakit.train.train import build, train
from tests.laws.subject import batch, far, same_bits, subject
from tests.train.runs import config
from tests.train.test_resume import adapter_bytes

EAGERLY = lookup_backend("aot_eager")
"""Traces and partitions as inductor's does, and runs the graphs as they are."""
ALONE = World(0, 1, torch.device("cpu"), False)


def adapted_model(name: str = "lora", arch: str = "llama", *, layers: int = 3, **keys: Any) -> Adapted:
    adapted = subject(name, arch, dropout=0.25, model={"num_hidden_layers": layers}, **keys)
    adapted.model.train()
    return adapted


def step(adapted: Adapted, seed: int, *, length: int = 7) -> list[Tensor]:
    """A training step's loss and gradients."""
    ids = batch(seed, length=length)
    with adapted.given(step=seed):
        loss = forward_loss(adapted.model, {"input_ids": ids, "labels": ids})[0]
    return [loss.detach(), *torch.autograd.grad(loss, [p.tensor for p in adapted.params()])]


def evaluated(adapted: Adapted) -> Tensor:
    adapted.model.eval()
    with torch.no_grad():
        logits = adapted.model(input_ids=batch(9, length=11)).logits
    adapted.model.train()
    return logits


# --- the layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_many_layers_share_two_graphs_and_train_as_eager(name: str) -> None:
    """The first layer's input needs no gradient; all others are one graph, whatever their names, numbers and masks."""
    adapted = adapted_model(name, layers=4)
    eager, before = [step(adapted, i) for i in range(3)], evaluated(adapted)
    layers = compile_layers(adapted.model, backend=EAGERLY)
    assert len(layers.layers) == 4
    for i in range(3):
        assert all(far(c, e) < 1e-4 for c, e in zip(step(adapted, i), eager[i], strict=True))
        assert same_bits(evaluated(adapted), before), "an evaluation is eager"
    assert layers.graphs == 2


def test_activation_checkpointing_stays_outside_of_the_one_graph() -> None:
    """Two forwards before one backward: each is recomputed with its own masks."""
    adapted = adapted_model()
    adapted.model.activation_checkpointing_enable({"use_reentrant": False})  # which makes the first layer's input need a gradient

    def two() -> list[Tensor]:
        losses = []
        for i in range(2):
            with adapted.given(step=i):
                losses.append(forward_loss(adapted.model, {"input_ids": batch(i), "labels": batch(i)})[0])
        return list(torch.autograd.grad(losses[0] + 2 * losses[1], [p.tensor for p in adapted.params()]))

    eager = two()
    layers = compile_layers(adapted.model, backend=EAGERLY)
    assert all(far(c, e) < 1e-4 for c, e in zip(two(), eager, strict=True))
    assert layers.graphs == 1
    assert all(layer.gradient_checkpointing for layer in layers.layers)


@pytest.mark.parametrize(("arch", "n"), [("gpt2", 2), ("bert", 2), ("t5", 4), ("mixtral", 2)])
def test_the_layers_are_those_that_repeat(arch: str, n: int) -> None:
    found = layers_of(tiny_model(arch))
    assert len(found) == n
    assert len({type(layer) for layer in found}) == 1


def test_a_model_without_repeated_layers_is_refused() -> None:
    with pytest.raises(Incompatible, match="Sequential has no repeated layers"):
        compile_layers(nn.Sequential(nn.Linear(2, 2)))


def test_undo_leaves_the_model_as_it_was() -> None:
    adapted = adapted_model()
    before = [dict(layer.__dict__) for layer in layers_of(adapted.model)]
    layers = compile_layers(adapted.model, backend=EAGERLY)
    step(adapted, 0)
    copies = [copy.deepcopy(adapted.model), pickle.loads(pickle.dumps(adapted.model))]
    assert not any("_compiled_call_impl" in layer.__dict__ for other in copies for layer in layers_of(other))
    layers.undo()
    assert [layer.__dict__.keys() for layer in layers_of(adapted.model)] == [d.keys() for d in before]
    step(adapted, 0)
    assert layers.graphs == 2


def broken(model: nn.Module) -> None:
    """A layer that no graph can hold."""
    layers_of(model)[0].get_submodule("mlp").register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())


def test_a_graph_break_is_an_error_where_compiling_was_asked_for() -> None:
    adapted = adapted_model()
    broken(adapted.model)
    compile_layers(adapted.model, backend=EAGERLY)
    with pytest.raises(Incompatible, match=r"torch_compile=true cannot compile LlamaDecoderLayer: .*; use torch_compile=false"):
        step(adapted, 0)


def test_where_it_was_not_all_layers_run_eagerly_and_a_note_says_why() -> None:
    adapted = adapted_model()
    eager = step(adapted, 0)
    broken(adapted.model)
    layers = compile_layers(adapted.model, required=False, backend=EAGERLY)
    assert all(map(torch.equal, step(adapted, 0), eager))
    assert (layers.graphs, len(layers.notes)) == (0, 1)
    assert "ran eagerly" in layers.notes[0]


def test_one_graph_serves_all_lengths_where_they_vary() -> None:
    adapted = adapted_model()
    layers = compile_layers(adapted.model, dynamic=True, backend=EAGERLY)
    for length in (7, 12, 5):
        step(adapted, 0, length=length)
        layers.stepped()
    assert (layers.graphs, layers.notes) == (2, [])


def test_what_is_compiled_late_is_noted() -> None:
    adapted = adapted_model()
    layers = compile_layers(adapted.model, dynamic=False, backend=EAGERLY)
    for length in (7, 7, 7, 7, 9):
        step(adapted, 0, length=length)
        layers.stepped()
    assert layers.notes == ["torch_compile: 2 of 4 graphs were compiled after the first 3 steps: batches vary in form"]


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # inductor's own
def test_backward_computes_again_what_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what a layer makes only products and attention are kept: no norm, no rotary embedding, no activation."""
    import torch._inductor.compile_fx as compile_fx

    def kept(through: Any) -> int:
        adapted = adapted_model()
        layers, found = compile_layers(adapted.model, backend=through), dict[int, int]()
        own = {t.untyped_storage().data_ptr() for t in (*adapted.model.parameters(), *adapted.model.buffers())}
        alive = []

        def pack(t: Tensor) -> Tensor:
            if t.untyped_storage().data_ptr() not in own:
                found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
                alive.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            step(adapted, 0, length=64)
        layers.undo()
        return sum(found.values())

    monkeypatch.setattr(compile_fx, "compile_fx", EAGERLY)
    assert kept(compile_module.inductor) < 0.85 * kept(EAGERLY)


# --- the choice -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flops", "threads", "graphs", "pays"),
    [(1e12, 1, 2, False), (1e13, 1, 2, False), (1.3e14, 1, 2, True), (1.3e14, 2, 2, False), (1.3e14, 1, 32, False), (1e16, 8, 2, True)],
)
def test_the_estimate_weighs_what_is_saved_against_what_it_costs(flops: float, threads: int, graphs: int, pays: bool) -> None:
    figures = Figures(rate=1e11, share=0.1, start=5.0, graph=20.0)
    estimate = Estimate.of(figures, flops=flops, threads=threads, graphs=graphs)
    assert estimate.saved == pytest.approx(0.1 * flops / (1e11 * threads))
    assert estimate.cost == 5 + 20 * graphs
    assert estimate.pays is pays


@pytest.fixture
def slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One on which compiling always pays, and takes no time."""
    monkeypatch.setattr(compile_choice, "FIGURES", {("cpu", "float32"): Figures(1.0, 0.5, 0.0, 0.0)})
    monkeypatch.setattr(compile_module, "inductor", EAGERLY)


def chosen(tmp: Path, world: World = ALONE, **keys: Any) -> compile_choice.Choice:
    settings = config(tmp, **keys)
    parts = build(settings.model_copy(update={"torch_compile": False}), ALONE)
    return choose(settings, parts.adapted, parts.data, world)


def test_a_short_run_stays_eager(tmp_path: Path) -> None:
    choice = chosen(tmp_path, dtype="bfloat16")
    assert not choice.on
    assert choice.why.startswith("no, about 0 s of eager steps, of which it saves 0 s for ")


@pytest.mark.usefixtures("slow_machine")
def test_what_auto_looks_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(tmp_path).on
    assert chosen(tmp_path, packing=False).why == "no, since batches are padded to varying lengths"
    assert chosen(tmp_path, World(0, 2, torch.device("cpu"), True)).why == "no, since the base is sharded"
    assert chosen(tmp_path, World(0, 1, torch.device("xpu"), False)).why == "no, since nothing was measured in float32 on xpu"
    assert not chosen(tmp_path, torch_compile=False).on
    with pytest.raises(Incompatible, match="not supported over a sharded base"):
        chosen(tmp_path, World(0, 2, torch.device("cpu"), True), torch_compile=True)
    monkeypatch.setattr(compile_choice, "no_compiler", lambda device: "a C++ compiler")
    assert chosen(tmp_path).why.startswith("no, since it needs a C++ compiler: ")
    with pytest.raises(Incompatible, match="torch_compile needs a C\\+\\+ compiler on this machine"):
        chosen(tmp_path, torch_compile=True)


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # inductor's own
def test_a_missing_compiler_is_found_out() -> None:
    from torch._inductor import config as inductor_config
    from torch._inductor import cpp_builder

    here = torch.device("cpu")
    assert compile_choice.no_compiler(here) is None
    with inductor_config.patch({"cpp.cxx": ("no-such-compiler",)}):
        cpp_builder.cpp_compiler_search.cache_clear()
        assert compile_choice.no_compiler(here) == "a C++ compiler (g++ or clang++)"
    cpp_builder.cpp_compiler_search.cache_clear()


def test_operations_and_graphs_are_counted(tmp_path: Path) -> None:
    settings = config(tmp_path, max_steps=6, per_device_train_batch_size=2, max_length=64)
    parts = build(settings, ALONE)
    weights = sum(p.numel() for n, p in parts.adapted.model.model.layers.named_parameters() if p.ndim == 2 and ".lora." not in n)
    assert flops_of(settings, parts.adapted, parts.data, ALONE) == 2 * 2 * weights * 6 * 2 * 64
    more = settings.model_copy(update={"gradient_checkpointing": True, "gradient_accumulation_steps": 4})
    assert flops_of(more, parts.adapted, parts.data, ALONE) == 2 * 3 * weights * 6 * 8 * 64
    assert graphs_of(parts.adapted) == 2
    assert graphs_of(adapted_model(layers=5)) == 2
    assert graphs_of(adapted_model("prefix", layers=5)) == 5


# --- a run ----------------------------------------------------------------------------------------------------------------

RUN: dict[str, Any] = {"max_steps": 9, "save_steps": 3, "eval_steps": 2, "dropout": 0.1, "packing": True}


@pytest.mark.usefixtures("slow_machine")
def test_a_run_compiles_in_its_first_steps_and_trains_as_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[CompiledLayers] = []
    real = compile_layers
    monkeypatch.setattr("lorakit.train.train.compile_layers", lambda *args, **keys: (seen.append(real(*args, **keys)), seen[-1])[1])
    keys = RUN | {"dropout": 0.0}  # masks follow the place in the batch, and a compiled run's batches are as long as the window
    compiled = train(config(tmp_path, **keys), quiet=True)
    eager = train(config(tmp_path, output_dir=str(tmp_path / "eager"), torch_compile=False, **keys), quiet=True)
    assert (len(seen), seen[0].notes) == (1, [])
    assert seen[0].graphs in (2, 4), "the first layer and the others; with a mask, and without where each window is one document"
    assert not any("_compiled_call_impl" in layer.__dict__ for layer in seen[0].layers), "a finished run undoes it"
    assert compiled.final["loss"] == pytest.approx(eager.final["loss"], rel=1e-4)


@pytest.mark.parametrize("first", [True, False])
def test_a_resumed_run_goes_on_as_it_began(tmp_path: Path, first: bool, monkeypatch: pytest.MonkeyPatch, slow_machine: None) -> None:
    """Whatever an estimate would say now."""
    slow = compile_choice.FIGURES
    monkeypatch.setattr(compile_choice, "FIGURES", slow if first else FIGURES)
    train(config(tmp_path, output_dir=str(tmp_path / "whole"), **RUN), quiet=True)
    real = Run._step

    def dies(self: Run, progress: Any) -> dict[str, Any]:
        if self.at.step == 7:
            raise KeyboardInterrupt
        return real(self, progress)

    cut = tmp_path / "cut"
    monkeypatch.setattr(Run, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path, output_dir=str(cut), **RUN), quiet=True)
    monkeypatch.setattr(Run, "_step", real)
    assert read_state(checkpoints(cut)[-1])["compiled"] is first
    monkeypatch.setattr(compile_choice, "FIGURES", FIGURES if first else slow)
    train(config(tmp_path, output_dir=str(cut), resume="auto", **RUN), quiet=True)
    assert read_state(checkpoints(cut)[-1])["compiled"] is first
    assert adapter_bytes(tmp_path / "whole") == adapter_bytes(cut)


@pytest.mark.usefixtures("slow_machine")
def test_the_choice_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(tmp_path, max_steps=1))
    assert "torch_compile: yes, about " in capsys.readouterr().err


@pytest.mark.usefixtures("slow_machine")
def test_training_batches_of_a_compiled_run_have_one_length(tmp_path: Path) -> None:
    parts = build(config(tmp_path), ALONE)
    widths = {b["input_ids"].shape[1] for side in (parts.data.train, parts.data.valid) for b in side.batches(1)}
    train_widths = {b["input_ids"].shape[1] for b in parts.data.train.batches(1)}
    assert train_widths == {64}
    assert len(widths) > 1, "held-out windows are as long as they are"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("checkpointing", [False, True])
def test_inductor_trains_as_eager(tmp_path: Path, checkpointing: bool) -> None:
    keys = RUN | {"dropout": 0.0, "gradient_checkpointing": checkpointing}
    eager = train(config(tmp_path, output_dir=str(tmp_path / "a"), torch_compile=False, **keys), quiet=True)
    compiled = train(config(tmp_path, output_dir=str(tmp_path / "b"), torch_compile=True, **keys), quiet=True)
    assert compiled.final["loss"] == pytest.approx(eager.final["loss"], rel=1e-3)
    assert compiled.notes == eager.notes
