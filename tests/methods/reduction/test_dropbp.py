"""DropBP's acceptance properties (arXiv:2402.17812): the forward keeps its bits, dropped sublayers have no backward."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lorakit import BadParameter, Incompatible, attach, get_method
from lorakit.core import random
from lorakit.core.attach import Adapted
from lorakit.core.context import Cell
from lorakit.methods.reduction import dropbp
from lorakit.methods.reduction.dropbp import DropSpec, allocated, drawn
from lorakit.parts.patches import stopped
from lorakit.parts.patches.stopped import Stopped, StoppedSpec, sublayers
from lorakit.train.train import train
from tests.laws.steps import Run
from tests.laws.subject import awaken, base, batch, far, is_encoder_decoder, logits, loss_of, not_fused, same_bits, small, subject
from tests.train.runs import config

BLOCKS = {
    "llama": ("model.layers.{}.self_attn", "model.layers.{}.mlp"),
    "gpt2": ("transformer.h.{}.attn", "transformer.h.{}.mlp"),
    "gpt_neox": ("gpt_neox.layers.{}.attention", "gpt_neox.layers.{}.mlp"),
    "bert": ("bert.encoder.layer.{}.attention.output.dense", "bert.encoder.layer.{}.output.dense"),
    "mixtral": ("model.layers.{}.self_attn", "model.layers.{}.mlp"),
}
"""Where a sublayer's output can be cut off from the graph by hand: attention, MLP."""


def patch_of(adapted: Adapted) -> Stopped:
    (patch,) = adapted.shared("default").values()
    return patch


def gradients(adapted: Adapted, ids: Tensor | None = None) -> dict[str, Tensor | None]:
    """Of one training step's loss, by name."""
    for p in adapted.params():
        p.tensor.grad = None
    with adapted.given(step=0):
        loss = loss_of(adapted.model.train(), batch() if ids is None else ids)
    if loss.requires_grad:
        loss.backward()
    return {p.name: p.tensor.grad for p in adapted.params()}


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "bert", "mixtral", "t5", "qwen3"])
def test_the_forward_keeps_its_bits_whatever_is_stopped(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    not_fused(monkeypatch)  # which is for layers with a graph, and rounds in another order
    adapted = subject("dropbp", arch, dropout=0.2)
    patch, n = patch_of(adapted), len(patch_of(adapted).sublayers)
    assert n == (10 if arch == "t5" else 4)
    model, more = adapted.model.train(), {"decoder_input_ids": batch()} if is_encoder_decoder(adapted.model) else {}
    outs = []
    for which in ([False] * n, [True] * n, [True, False] * (n // 2)):
        patch.stop(which)
        with adapted.given(step=3):
            outs.append(model(input_ids=batch(), **more).logits)
    assert all(same_bits(out.detach(), outs[0].detach()) for out in outs)
    assert outs[0].requires_grad
    assert not outs[1].requires_grad


@contextmanager
def detached(model: nn.Module, path: str) -> Iterator[None]:
    """The oracle: the sublayer runs with a graph, and what it puts out is cut off."""

    def cut(module: nn.Module, args: Any, out: Any) -> Any:
        return (out[0].detach(), *out[1:]) if isinstance(out, tuple) else out.detach()

    handle = model.get_submodule(path).register_forward_hook(cut)
    try:
        yield
    finally:
        handle.remove()


def check_gradients(arch: str) -> None:
    """Those of a stopped sublayer are none; all others, and the input's, are the residual path's."""
    adapted = subject("dropbp", arch)
    patch, before = patch_of(adapted), gradients(adapted)
    table = adapted.model.get_input_embeddings()
    for i, kind in enumerate(p for layer in range(2) for p in (x.format(layer) for x in BLOCKS[arch])):
        patch.stop([j == i for j in range(4)])
        got, x = gradients(adapted), _at_input(adapted, table)
        patch.stop([False] * 4)
        with detached(adapted.model, kind):
            want, y = gradients(adapted), _at_input(adapted, table)
        assert far(x, y) < 1e-5
        inside = {s.name for s in patch.sublayers[i].sites}
        assert inside
        for name, g in got.items():
            own = any(name.startswith(site + ".") for site in inside)
            assert (g is None) == own, (name, kind)
            if own:
                assert want[name] is None or not want[name].any()
                assert before[name] is not None
            else:
                assert far(g, want[name]) < 1e-5
        if i == 3:  # what lies before it feels the loss
            assert any(far(got[name], before[name]) > 1e-3 for name in got if got[name] is not None)


def _at_input(adapted: Adapted, table: nn.Module) -> Tensor:
    x = table(batch()).detach().requires_grad_()
    with adapted.given(step=0):
        out = adapted.model.train()(inputs_embeds=x).logits
    return torch.autograd.grad(out.square().mean(), x)[0]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "bert", "mixtral"])
def test_a_stopped_sublayer_has_no_gradient_and_the_rest_has_the_residuals(arch: str) -> None:
    check_gradients(arch)


def test_a_mutant_that_rescales_or_stops_another_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stopped, "now", lambda self, i: self.which[i - 1])
    with pytest.raises(AssertionError):
        check_gradients("llama")
    monkeypatch.undo()
    monkeypatch.setattr(stopped, "OUTPUT", {"gate"})
    with pytest.raises((AssertionError, Incompatible)):
        check_gradients("gpt2")


def saved(adapted: Adapted, which: Sequence[bool]) -> int:
    """Numbers that one training forward keeps for backward, parameters aside."""
    patch_of(adapted).stop(which)
    own = {t.untyped_storage().data_ptr() for t in [*adapted.model.parameters(), *adapted.model.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    x = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), adapted.given(step=0):
        adapted.model.train()(inputs_embeds=x)
    return sum(t.untyped_storage().nbytes() // t.element_size() for t in kept.values())


def test_a_stopped_sublayer_keeps_nothing_for_backward() -> None:
    adapted = subject("dropbp")
    whole, none = saved(adapted, [False] * 4), saved(adapted, [True] * 4)
    assert none < 0.3 * whole
    parts = [whole - saved(adapted, [i == j for j in range(4)]) for i in range(4)]
    assert all(part > 0.1 * whole for part in parts)
    assert sum(parts) == pytest.approx(whole - none, rel=0.1)
    with detached(adapted.model, "model.layers.0.mlp"):  # cutting afterwards keeps it all alive while it runs
        assert torch.cuda.is_available() or whole - saved(adapted, [False] * 4) <= parts[1]


def test_no_drop_is_lora_bit_for_bit_and_a_full_drop_changes_nothing_after_the_first_step() -> None:
    runs = [Run(subject(name, awake=False, p_target=0.0), total=6) for name in ("dropbp", "lora")]
    losses = [[run.step() for _ in range(3)] for run in runs]
    assert losses[0] == losses[1]
    a, b = (run.adapted.tensors("default") for run in runs)
    assert all(same_bits(a[k], b[k]) for k in b)
    run = Run(subject("dropbp", awake=False, p_target=1.0), total=6).steps(1)
    after_first = {k: v.clone() for k, v in run.adapted.tensors("default").items()}
    assert any(v.any() for k, v in after_first.items() if k.endswith(".B")), "the first step drops nothing"
    run.steps(3)
    assert all(same_bits(v, after_first[k]) for k, v in run.adapted.tensors("default").items())


FLOPS = [[1.0, 2.0, 1.0, 2.0, 1.0, 2.0], [1.0] * 6]
WORTH = [[5.0, 1.0, 4.0, 2.0, 3.0, 0.5], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 3.0, 1.0, 2.0, 9.0]]


def check_allocation() -> None:
    """Enough is dropped on average, never a tenth too much, and what is worth more is dropped less."""
    for flops in FLOPS:
        for worth in WORTH:
            for target in (0.0, 0.1, 0.5, 0.75, 0.9, 0.95, 1.0):
                p = allocated(worth, flops, target)
                left = sum(f * (1 - q) for f, q in zip(flops, p, strict=True))
                assert left <= (1 - target) * sum(flops) + 1e-9
                assert left > (1 - target) * sum(flops) - max(flops) / 10 - 1e-9
                assert all(0 <= q <= (1.0 if target > 0.9 else 0.9) and abs(10 * q - round(10 * q)) < 1e-9 for q in p)
                for i in range(6):
                    for j in range(6):
                        if flops[i] == flops[j] and worth[i] > worth[j]:
                            assert p[i] <= p[j] + 1e-9, (worth, p)


def test_rates_are_allocated_by_sensitivity() -> None:
    check_allocation()
    assert allocated([1.0, 100.0], [1.0, 1.0], 0.4) == [0.8, 0.0]


def test_mutants_of_the_allocation_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    original = dropbp.heapq.heappop
    monkeypatch.setattr(dropbp.heapq, "heappop", lambda queue: (queue.sort(reverse=True), queue.pop(0))[1])  # the dearest first
    with pytest.raises(AssertionError):
        check_allocation()
    monkeypatch.setattr(dropbp.heapq, "heappop", original)
    monkeypatch.setattr(dropbp, "HIGHEST", 12)
    with pytest.raises(AssertionError):
        check_allocation()


def test_a_standard_blocks_flops_are_the_papers() -> None:
    d, text = 32, 100
    found = [s.flops(text, 1) for s in sublayers(base("gpt2"))]  # one fused qkv, an MLP of 4 d
    assert found == [8 * d**2 + 4 * d * text, 16 * d**2] * 2
    mixed = [s.flops(text, 2) for s in sublayers(base("mixtral"))]
    assert mixed[1] == 2 * 2 * (32 * 128 + 64 * 32), "two experts a token"


def check_draws(rates: Tensor, p_target: float) -> Tensor:
    """The share of steps in which each sublayer is stopped; every step drops enough, and the same again for the same (seed, step)."""
    flops = torch.tensor([3.0, 4.0, 3.0, 4.0, 3.0, 4.0], dtype=torch.float64)
    sets = []
    for step in range(400):
        one, two = (drawn(rates, flops, p_target, random.generator(7, f"dropbp {step}")) for _ in range(2))
        assert torch.equal(one, two)
        assert float(flops[one].sum()) >= p_target * float(flops.sum()) - 1e-9
        sets.append(one)
    return torch.stack(sets).double().mean(0)


def test_sets_follow_from_seed_and_step_and_drop_enough() -> None:
    share = check_draws(torch.full((6,), 0.5, dtype=torch.float64), 0.5)
    assert all(0.5 <= s < 0.75 for s in share)
    assert share.max() - share.min() < 0.15, "among equals the topping up favors none"
    rates = torch.tensor([0.1, 0.9, 0.3, 0.5, 0.7, 0.5], dtype=torch.float64)
    share = check_draws(rates, 0.5)
    assert all(s >= p - 0.07 for s, p in zip(share, rates, strict=True))
    assert share[1] > 0.9, "the highest rate tops up first"
    assert not check_draws(torch.zeros(6, dtype=torch.float64), 0.0).any()
    assert check_draws(torch.ones(6, dtype=torch.float64), 1.0).all()


def test_a_mutant_without_topping_up_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "drawn", lambda rates, flops, p, rng: torch.rand(6, dtype=torch.float64, generator=rng) < rates)
    with pytest.raises(AssertionError):
        check_draws(torch.full((6,), 0.5, dtype=torch.float64), 0.5)


def test_all_micro_batches_of_a_step_share_its_set_and_steps_differ() -> None:
    adapted = subject("dropbp", awake=False, p_target=0.5)
    run, sets = Run(adapted, total=20), list[tuple[bool, ...]]()
    forward = run._loss
    run._loss = lambda b, info: (sets.append(patch_of(adapted).which), forward(b, info), forward(b, info))[1]
    run.steps(8)
    assert not any(sets[0])
    assert len(set(sets[1:])) > 2
    again = Run(subject("dropbp", awake=False, p_target=0.5), total=20)
    later = [(again.step(), patch_of(again.adapted).which)[1] for _ in range(8)]
    assert later == sets
    assert not any(patch_of(run.finish()).which), "a finished run stops nothing"


def planted(total: int = 20, **kwargs: Any) -> Run:
    """Adapters everywhere; layer 1's MLP writes nothing to the residual, so that its backward is worth nothing."""
    model = base()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    adapted = awaken(attach(model, get_method("dropbp", r=4, **kwargs)))
    with torch.no_grad():
        for p in adapted.params():
            if "layers.1.mlp.down_proj" in p.name:
                p.tensor.zero_()
    return Run(adapted, total=total)


def test_sensitivity_is_measured_once_at_a_tenth_of_the_run_and_finds_what_is_worth_nothing() -> None:
    run = planted(p_target=0.2)
    (controller,) = run.controllers
    run.steps(2)
    assert controller.rates.tolist() == [0.2] * 4
    run.step()
    found = controller.rates.tolist()
    assert found[3] == max(found) == 0.9 or found[3] > 0.5
    assert sum(f * (1 - p) for f, p in zip(controller.flops.tolist(), found, strict=True)) <= 0.8 * controller.flops.sum() + 1e-9
    run.steps(4)
    assert controller.rates.tolist() == found
    uniform = planted(p_target=0.2, sensitivity=False).steps(6)
    assert uniform.controllers[0].rates.tolist() == [0.2] * 4
    assert len(uniform.streams) == 1


def test_the_measure_is_of_gradient_norms_and_leaves_no_gradient() -> None:
    run = planted(p_target=0.3)
    (controller,) = run.controllers
    info = dropbp.Step(2, 20)
    run.adapted.model.train()
    data = [{"input_ids": batch(5)}]
    worth = controller._worth(data, info)
    assert all(p.tensor.grad is None for p in run.adapted.params())

    def norms(which: Sequence[bool]) -> Tensor:
        patch_of(run.adapted).stop(which)
        run.adapted.model.train()
        for p in run.adapted.params():
            p.tensor.grad = None
        run.gradients(data, info)
        return torch.tensor([0.0 if p.tensor.grad is None else p.tensor.grad.norm().item() for p in run.adapted.params()])

    whole = norms([False] * 4)
    want = [(whole - norms([i == j for j in range(4)])).square().sum().item() for i in range(4)]
    assert worth == pytest.approx(want, rel=1e-4, abs=1e-10)
    assert worth[3] < 1e-9 < min(worth[:3])


@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_run_resumes_exactly_before_and_after_the_measure(at: int) -> None:
    whole = planted(p_target=0.4).steps(8)
    half = planted(p_target=0.4).steps(at)
    resumed = planted(p_target=0.4).restore(half.state()).steps(8 - at)
    a, b = (run.adapted.tensors("default") for run in (whole, resumed))
    assert all(same_bits(a[k], b[k]) for k in a)
    assert torch.equal(whole.controllers[0].rates, resumed.controllers[0].rates)


def test_recomputation_stops_what_its_own_forward_stopped() -> None:
    """Two forwards with different sets, then one backward, with and without activation checkpointing."""
    found = []
    for checkpointing in (False, True):
        adapted = subject("dropbp", dropout=0.2)
        model = adapted.model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        losses = []
        for i, which in enumerate(([True, False, False, False], [False, False, True, True])):
            patch_of(adapted).stop(which)
            with adapted.given(step=i):
                losses.append(loss_of(model, batch(i)))
        patch_of(adapted).stop([True] * 4)
        sum(losses).backward()
        found.append([p.tensor.grad for p in adapted.params()])
    assert all((a is None) == (b is None) and (a is None or same_bits(a, b)) for a, b in zip(*found, strict=True))


def test_a_mutant_that_recomputes_under_the_present_set_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stopped, "now", lambda self, i: self.which[i])
    with pytest.raises((AssertionError, RuntimeError)):
        test_recomputation_stops_what_its_own_forward_stopped()


@pytest.mark.parametrize("name", ["dora", "adalora", "pissa", "vera"])
def test_it_goes_with_any_method(name: str) -> None:
    method = small(name)
    both = method.but(patches=(StoppedSpec(),), controllers=(*method.controllers, DropSpec(0.5, sensitivity=False)))
    adapted = attach(base(), both)
    run = Run(adapted, total=10).steps(5)
    assert all(torch.isfinite(p.tensor).all() for p in adapted.params())
    assert torch.isfinite(logits(run.adapted.model.eval(), batch())).all()
    assert same_bits(logits(adapted.detach(), batch()), logits(base(), batch()))


def test_the_trainer_takes_steps_without_any_gradient(tmp_path: Any) -> None:
    """With everything dropped after the first step nothing fails, and the check for adapters that never ran does not misfire."""
    result = train(config(tmp_path, method="dropbp", p_target=1.0, max_steps=3, logging_steps=1, save_steps=0), quiet=True)
    assert result.steps == 3
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["grad_norm"] > 0 for row in rows if "grad_norm" in row] == [True, False, False]


def test_what_is_dropped_is_learned_more_slowly() -> None:
    """Where it must lose: at equal steps, most of the backward pass left out."""
    ends = []
    for p_target in (0.0, 0.9):
        run = Run(subject("dropbp", awake=False, p_target=p_target), total=30, data=lambda i: batch(i % 2))
        ends.append(sum(float(run.step()) for _ in range(30)))
    assert ends[0] < ends[1]


def test_two_at_once_stop_what_either_stops_and_come_off_in_any_order() -> None:
    adapted = subject("dropbp")
    adapted.add("other", small("dropbp"), seed=2)
    adapted.switch("default", "other")
    for name, which in (("default", [True, False, False, False]), ("other", [False, False, False, True])):
        adapted.shared(name)["stopped"].stop(which)
    silent = {name.split(".lora.")[0] for name, g in gradients(adapted).items() if g is None}
    assert {("layers.0.self_attn" in n, "layers.1.mlp" in n) for n in silent} == {(True, False), (False, True)}
    adapted.switch("other").switch("default").detach()
    assert type(adapted.model.model.layers[0].mlp.up_proj) is nn.Linear
    assert "stopped_as" not in adapted.model.model.layers[0].mlp.up_proj.__dict__


def test_what_cannot_be_is_refused() -> None:
    for bad in ({"p_target": 1.5}, {"p_target": -0.1}, {"length": 0}):
        with pytest.raises(BadParameter):
            get_method("dropbp", **bad)
    with pytest.raises(Incompatible, match="no attention or MLP"):
        Stopped(nn.ModuleDict({"w": nn.Linear(3, 3)}), Cell())


def flops(work: Callable[[], object]) -> int:
    """Floating-point operations of a forward and its backward."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_a_step_does_less_work() -> None:
    """Every MLP's backward is a half of the stopped layers' work: counted, not timed."""
    adapted = attach(base(), get_method("dropbp", r=4))
    ids = batch(rows=4, length=16)
    layers = len(adapted.model.model.layers)
    patch_of(adapted).stop([False] * 2 * layers)
    full = flops(lambda: gradients(adapted, ids))
    patch_of(adapted).stop([False, True] * layers)
    assert flops(lambda: gradients(adapted, ids)) < 0.9 * full
