"""Experts' stacked weights: every implementation of Transformers, every form of storage, against an oracle that forms W + ΔW."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.integrations.moe import use_experts_implementation

from lorakit import Adapted, AdapterMismatch, Incompatible, NoSuchSite, NotExportable, attach, get_method, load, select
from lorakit.adapters.inspect import inspect_adapter
from lorakit.core import experts as mixture
from lorakit.core.lowrank import LowRank
from lorakit.core.site import Site
from lorakit.methods.reduction.lora_fa import corrected
from lorakit.train.memory import saved_bytes
from lorakit.train.metrics import forward_loss
from tests.laws.steps import Run
from tests.laws.subject import awaken, base, batch, everything, far, logits, loss_of, same_bits, small

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
MODELS = ("mixtral", "qwen3_moe", "gpt_oss")


# ------------------------------------------------------------------------------------------------------------------------ sites
def test_the_sites_of_a_mixture() -> None:
    model = base("qwen3_moe")
    up, gate, _, down = [s for s in select(model, lambda s: s.kind == "experts") if s.layer == 1]
    assert up == Site("model.layers.1.mlp.experts.gate_up_proj", "experts", 32, 48, 1, "gate_up", experts=4)
    assert (up.module, up.attribute, up.whole) == ("model.layers.1.mlp.experts", "gate_up_proj", up.name)
    assert (gate.name, gate.whole, gate.module, gate.rows) == (up.name + "[gate]", up.name, up.module, (range(24),))
    assert (down.d_in, down.d_out, down.role) == (24, 32, "down")
    stored = base("gpt_oss").model.layers[0].mlp.experts  # E × d_in × d_out, gate and up by turns
    assert mixture.stack_shape(stored, "gate_up_proj") == (4, 48, 32)
    (odd,) = select(base("gpt_oss"), "layers.0.mlp.experts.gate_up_proj[up]")
    assert [r.start for r in odd.rows] == list(range(1, 48, 2))


def test_presets_leave_no_expert_behind_unless_they_say_so() -> None:
    model = base("mixtral")
    presets = ("all-linear", "linear-modules", "mlp", "experts")
    chosen = {preset: {s.name.rsplit(".", 1)[1] for s in select(model, preset)} for preset in presets}
    attention, stacks = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_up_proj", "down_proj"}
    assert chosen == {"all-linear": attention | stacks, "linear-modules": attention, "mlp": stacks, "experts": stacks}
    assert [s.name for s in select(model, "router")] == ["model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"]
    with pytest.raises(NoSuchSite, match="'experts'"):
        select(base("llama"), "experts")


def test_what_is_stored_in_another_form_is_no_site_and_a_preset_says_so() -> None:
    model = base("mixtral")
    module = model.model.layers[0].mlp.experts
    module.gate_up_proj = nn.Parameter(module.gate_up_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert {s.layer for s in select(model, "experts")} == {1}
    (note,) = attach(model, small("lora")).notes
    assert note.startswith("2 weights of experts have a form that cannot be adapted and stay frozen: model.layers.0.mlp.experts.gate")
    assert attach(base("mixtral"), small("lora")).notes == []


# --------------------------------------------------------------------------------------------------------- forward against the oracle
def oracle(adapted: Adapted, fresh: nn.Module, **inputs: Any) -> Any:
    """An untouched model's output with the weights W + Σ ΔW of the active branches, as a function of the adapter's tensors."""
    weights: dict[str, Tensor] = {}
    for branch in adapted.branches():
        module, change = fresh.get_submodule(branch.site.module), branch.weight()
        key = f"{branch.site.module}.{branch.site.attribute}"
        stored = change.mT if branch.site.experts and module.is_transposed else change
        weights[key] = weights.get(key, fresh.get_parameter(key).detach()) + stored
    return torch.func.functional_call(fresh, weights, (), inputs)


def check_oracle(name: str, arch: str, implementation: str = "eager", sites: Any = "all-linear") -> None:
    """Loss and gradients; in fp64, which Transformers' grouped_mm does not know."""
    dtype, close, near = (torch.float32, 1e-5, 1e-3) if implementation == "grouped_mm" else (torch.float64, 1e-10, 1e-8)
    model, fresh = base(arch, dtype), base(arch, dtype)
    for m in (model, fresh):
        m.config._experts_implementation = implementation
    adapted = awaken(attach(model, small(name, sites=sites)))
    adapted.scale("default", 0.7)
    ids, tensors = batch(rows=3), [p.tensor for p in adapted.params()]
    loss, want = model(input_ids=ids, labels=ids).loss, oracle(adapted, fresh, input_ids=ids, labels=ids).loss
    assert abs(loss.item() - want.item()) < close
    for p, got, exact in zip(adapted.params(), torch.autograd.grad(loss, tensors), torch.autograd.grad(want, tensors), strict=True):
        assert exact.abs().max() > 1e-12
        assert far(got, exact) < near, (p.name, far(got, exact))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("arch", MODELS)
def test_outputs_and_gradients_are_those_of_the_changed_weights(arch: str, implementation: str) -> None:
    check_oracle("lora", arch, implementation)


@pytest.mark.parametrize("name", ["rslora", "loraplus", "lora_fa", "init_ab"])
def test_other_methods_that_know_stacks(name: str) -> None:
    check_oracle(name, "mixtral")


@pytest.mark.parametrize("arch", MODELS)
def test_parts_of_the_fused_weight(arch: str) -> None:
    check_oracle("lora", arch, sites=["gate_up_proj[gate]", "gate_up_proj[up]", "down_proj"])
    check_oracle("lora", arch, sites="gate_up_proj[up]")


@pytest.mark.parametrize("arch", MODELS)
def test_a_router_reads_the_changed_weight(arch: str) -> None:
    check_oracle("lora", arch, sites="router")
    check_oracle("rslora", arch, sites=["router", "experts"])


def unsorted(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    order, expert, ends = _sorting(index, experts)
    return torch.arange(len(order)), expert, ends


def one_expert_late(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    order, expert, ends = _sorting(index, experts)
    return order, expert, torch.cat([ends[:1] * 0, ends[:-2], ends[-1:]])


_sorting = mixture.sorting
_forward = LowRank.forward
MUTANTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "rows unsorted": (mixture, "sorting", unsorted),
    "an expert late": (mixture, "sorting", one_expert_late),
    "scale forgotten": (LowRank, "forward", lambda self, x, ctx: _forward(self, x, ctx) / self.s),
    "scale in the wrong sixth digit": (LowRank, "forward", lambda self, x, ctx: _forward(self, x, ctx) * (1 + 1e-6)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_of_the_forward_are_seen(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[mutant])
    with pytest.raises(AssertionError):
        check_oracle("lora", "mixtral")


# ------------------------------------------------------------------------------------------- any module that the decorator describes
def host(*, gate: bool = True, bias: bool = False, transposed: bool = False, norm: bool = False, d: int = 6, wide: int = 5) -> nn.Module:
    """Experts of one form, with a forward of Transformers' own."""

    @use_experts_implementation(has_gate=gate, has_bias=bias, is_transposed=transposed, has_post_expert_norm=norm)
    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, self.act_fn = 4, nn.functional.silu
            up = "gate_up_proj" if gate else "up_proj"
            for name, rows, cols in ((up, (2 if gate else 1) * wide, d), ("down_proj", d, wide)):
                shape = (4, cols, rows) if transposed else (4, rows, cols)
                self.register_parameter(name, nn.Parameter(torch.randn(shape, dtype=torch.float64)))
                if bias:
                    self.register_parameter(name + "_bias", nn.Parameter(torch.randn(4, rows, dtype=torch.float64)))
            if norm:
                self.post_expert_norm = nn.RMSNorm(d).double()

        def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            raise AssertionError("the interface chooses another")

    torch.manual_seed(0)
    config = transformers.PreTrainedConfig()
    config._experts_implementation = "batched_mm"
    return nn.ModuleDict({"experts": Experts(config)})


ROUTES = {
    "one expert gets all": [[2], [2], [2]],
    "two of four, one of them a single row": [[0, 3], [0, 1], [0, 1], [3, 0]],
    "a single token": [[1, 2]],
    "all experts, all tokens": [[3, 1, 0, 2]] * 5,
    "no token": [],
}
FORMS: list[dict[str, bool]] = [
    {},
    {"gate": False},
    {"bias": True},
    {"transposed": True, "bias": True},
    {"norm": True},
    {"gate": False, "transposed": True},
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "+".join(form) or "plain")
@pytest.mark.parametrize("route", ROUTES)
def test_every_form_and_every_routing(form: dict[str, bool], route: str) -> None:
    model, fresh = host(**form), host(**form)
    adapted = awaken(attach(model, get_method("lora", r=2, sites="experts")), size=0.5)
    index = torch.tensor(ROUTES[route], dtype=torch.int64).reshape(len(ROUTES[route]), -1 if ROUTES[route] else 2)
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(len(index), 6, dtype=torch.float64, generator=gen).requires_grad_()
    weights = torch.rand(index.shape, dtype=torch.float64, generator=gen).requires_grad_()
    wrap = Through(fresh)
    found, want = model["experts"](x, index, weights), oracle_of(adapted, wrap, x, index, weights)
    assert found.shape == want.shape == x.shape
    if not len(index):
        return
    torch.testing.assert_close(found, want)
    tensors = [x, weights, *(p.tensor for p in adapted.params())]
    dy = torch.randn(x.shape, dtype=torch.float64, generator=gen)
    for got, exact in zip(torch.autograd.grad(found, tensors, dy), torch.autograd.grad(want, tensors, dy), strict=True):
        torch.testing.assert_close(got, exact)


class Through(nn.Module):
    """A forward for functional_call."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.inner["experts"](x, index, weights)


def oracle_of(adapted: Adapted, wrap: Through, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    changed = {}
    for branch in adapted.branches():
        stored = branch.weight().mT if wrap.inner["experts"].is_transposed else branch.weight()
        key = f"inner.{branch.site.name}"
        changed[key] = wrap.get_parameter(key).detach() + stored
    return torch.func.functional_call(wrap, changed, (x, index, weights))


def test_experts_without_a_token_get_no_gradient_and_no_change() -> None:
    model = host()
    adapted = awaken(attach(model, get_method("lora", r=2, sites="experts")))
    index, x = torch.tensor([[0], [2]]), torch.randn(2, 6, dtype=torch.float64)
    model["experts"](x, index, torch.ones(2, 1, dtype=torch.float64)).square().sum().backward()
    for p in adapted.params():
        assert (p.tensor.grad.flatten(1).abs().amax(1) > 0).tolist() == [True, False, True, False], p.name


# --------------------------------------------------------------------------------------------------- the start, the delta, the values
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("arch", MODELS)
def test_a_fresh_adapter_changes_nothing(arch: str, implementation: str) -> None:
    model = base(arch)
    model.config._experts_implementation = implementation
    start = logits(model, batch())
    adapted = attach(model, small("lora"))
    assert far(logits(model, batch()), start) < 1e-6
    awaken(adapted)
    with adapted.disabled():
        assert same_bits(logits(model, batch()), start)
    adapted.scale("default", 0.0)
    assert far(logits(model, batch()), start) < 1e-6


def test_grouped_and_fresh_is_the_very_same_arithmetic() -> None:
    """The implementation that Transformers chooses by itself: not one bit differs."""
    for dtype in (torch.float32, torch.bfloat16):
        model = base("qwen3_moe", dtype)
        model.config._experts_implementation = "grouped_mm"
        start = logits(model, batch())
        attach(model, small("lora"))
        assert same_bits(logits(model, batch()), start)


def test_one_pair_for_each_expert() -> None:
    adapted = attach(base("mixtral"), get_method("lora", r=4, sites="experts", rank_pattern={"0.mlp.experts.down_proj": 2}))
    assert [tuple(p.tensor.shape) for p in adapted.params()][:4] == [(4, 4, 32), (4, 128, 4), (4, 2, 64), (4, 32, 2)]
    for branch in adapted.branches():
        delta, bound = branch.delta, branch.site.d_in**-0.5
        assert delta.bound() == delta.r
        assert 0.9 * bound < delta.A.abs().max() <= bound  # fan-in of one expert's matrix, not of the stack
        assert len({tuple(a.flatten().tolist()) for a in delta.A}) == 4
    sites = [b.site for b in adapted.branches()]
    assert adapted.params().numel() == small("lora", sites="experts").but(delta=adapted.methods["default"].delta).count(sites)
    awaken(adapted)
    with torch.no_grad():
        for branch in adapted.branches():
            f, W = branch.factors(), branch.weight()
            assert W.shape == (4, branch.site.d_out, branch.site.d_in)
            assert all(far(f.s * b @ a, w) < 1e-5 for a, b, w in zip(f.A, f.B, W, strict=True))
            assert torch.linalg.matrix_rank(W).max() <= branch.delta.bound()
            x = torch.randn(4, 3, branch.site.d_in)  # rows for each expert, without any router
            y = branch.host.matmul(x)
            assert far(y, torch.stack([a @ w.T for a, w in zip(x, branch.host.dense(), strict=True)])) < 1e-5
            assert far(branch(x, y, adapted.context), torch.stack([a @ w.T for a, w in zip(x, W, strict=True)])) < 1e-5
            assert far(branch.host.matmul_t(y), torch.stack([a @ w for a, w in zip(y, branch.host.dense(), strict=True)])) < 1e-5


def test_lora_fa_corrects_each_expert_by_its_own_A() -> None:
    gen = torch.Generator().manual_seed(0)
    grad, A = torch.randn(4, 7, 3, generator=gen), torch.randn(4, 3, 9, generator=gen)
    torch.testing.assert_close(corrected(grad, A, 2.0), torch.stack([corrected(g, a, 2.0) for g, a in zip(grad, A, strict=True)]))
    adapted = awaken(attach(base("mixtral"), small("lora_fa", sites="experts", correct=True)))
    before = [p.tensor.detach().clone() for p in adapted.params()]
    Run(adapted, total=2).step()
    assert all(not torch.equal(p.tensor, old) for p, old in zip(adapted.params(), before, strict=True))


# ---------------------------------------------------------------------------------------------- merging, several adapters, taking away
@pytest.mark.parametrize("arch", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_exact_and_undone_to_the_bit(arch: str, dtype: torch.dtype) -> None:
    model = base(arch, dtype)
    before, modules = everything(model), {id(p) for p in model.parameters()}
    adapted = awaken(attach(model, small("lora")))
    live = logits(model, batch())
    changes = {b.site.name: (b.host, b.host.dense(torch.float32) + b.weight().detach()) for b in adapted.branches()}
    merged = logits(adapted.merge(), batch())
    assert all(torch.equal(host.dense(), want.to(dtype)) for host, want in changes.values())
    assert dtype != torch.float32 or far(merged, live) < 1e-5  # in bf16 a rounded weight may send a token to another expert
    adapted.unmerge()
    assert same_bits(logits(model, batch()), live)
    adapted.detach()
    assert {id(p) for p in model.parameters()} == modules
    assert all(same_bits(p, before[n]) for n, p in everything(model).items())


def test_a_router_is_merged_disabled_and_given_back() -> None:
    model = base("qwen3_moe")
    router, start = model.model.layers[0].mlp.gate, logits(model, batch())
    kind, weight, bits = type(router), router.weight, router.weight.detach().clone()
    adapted = attach(model, get_method("lora", r=3, sites="router", dropout=0.5))
    assert (adapted.branches()[0].site.d_out, adapted.branches()[0].site.d_in) == (4, 32)
    assert same_bits(logits(model, batch()), start)
    awaken(adapted, size=0.3)
    live = logits(model, batch())
    assert far(live, start) > 1e-3
    with adapted.disabled():
        assert same_bits(logits(model, batch()), start)
    with adapted.given(step=1):
        assert same_bits(logits(model.train(), batch()), live)  # no dropout here
    assert far(logits(adapted.merge(), batch()), live) < 1e-5
    adapted.detach()
    assert type(router) is kind and router.weight is weight and same_bits(weight.detach(), bits)


def test_merge_and_unload_leaves_the_plain_model() -> None:
    model = base("gpt_oss")
    kind = type(model.model.layers[0].mlp.experts)
    adapted = awaken(attach(model, small("lora")))
    live = logits(model, batch())
    plain = adapted.merge_and_unload()
    assert type(plain.model.layers[0].mlp.experts) is kind
    assert not [n for n, _ in plain.named_parameters() if "lora" in n]
    assert far(logits(plain, batch()), live) < 1e-5


def test_adapters_on_different_weights_of_one_module() -> None:
    model = base("mixtral")
    start = logits(model, batch())
    adapted = awaken(attach(model, small("lora", sites="down_proj")))
    one = logits(model, batch())
    awaken(adapted.add("other", small("lora", sites=["gate_up_proj[gate]", "q_proj"])), seed=3)
    adapted.switch("other")
    two = logits(model, batch())
    adapted.switch("default", "other")
    both = logits(model, batch())
    assert min(far(a, b) for a, b in ((one, start), (two, start), (both, one), (both, two))) > 1e-3
    assert far(logits(adapted.merge(), batch()), both) < 1e-5
    adapted.unmerge().requires_grad_(False)
    adapted.switch("default")
    assert same_bits(logits(model, batch()), one)
    adapted.detach()
    assert same_bits(logits(model, batch()), start)


# ------------------------------------------------------------------------------------------------------ masks, checkpointing, compiling
def test_dropout_replays_and_is_off_in_eval() -> None:
    adapted = awaken(attach(base("mixtral"), get_method("lora", r=4, sites="experts", dropout=0.5)))
    plain = logits(adapted.model, batch())
    model = adapted.model.train()

    def at(step: int) -> Tensor:
        with adapted.given(step=step):
            return logits(model, batch())

    assert same_bits(at(0), at(0))
    assert far(at(0), at(1)) > 1e-3
    assert same_bits(logits(model.eval(), batch()), plain)


def test_checkpointing_recomputes_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        model = base("qwen3_moe", torch.float64)
        adapted = awaken(attach(model, small("lora", dropout=0.3)))
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        losses = []
        for step in (0, 1):  # two forwards before one backward
            with adapted.given(step=step):
                losses.append(loss_of(model, batch(step)))
        sum(losses).backward()
        found.append([p.tensor.grad for p in adapted.params()])
    assert all(far(a, b) < 1e-12 for a, b in zip(*found, strict=True))


def test_an_adapted_module_compiles_whole_and_once() -> None:
    model = base("mixtral")
    adapted = awaken(attach(model, small("lora", sites="experts", dropout=0.25)))
    module = model.train().model.layers[0].mlp.experts
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    tensors = [p for p in module.parameters() if p.requires_grad]
    for i in range(4):
        gen = torch.Generator().manual_seed(i)
        x, index = torch.randn(6, 32, generator=gen, requires_grad=True), torch.randint(i, 4, (6, 2), generator=gen)  # ever fewer experts
        weights = torch.rand(6, 2, generator=gen)
        with adapted.given(step=i):
            found, want = compiled(x, index, weights), module(x, index, weights)
        torch.testing.assert_close(found, want)
        grads = (torch.autograd.grad(y.square().sum(), [x, *tensors]) for y in (found, want))
        for got, exact in zip(*grads, strict=True):
            torch.testing.assert_close(got, exact)
    assert counter.frame_count == 1


@pytest.mark.parametrize("method", ["lora", "lora_fa"])
def test_the_memory_estimate_knows_it(method: str) -> None:
    """Saved bytes of the trace against real hooks; frozen weights keep no input."""
    model, inputs = base("mixtral"), {"input_ids": batch(), "labels": batch()}
    attach(model, small(method, sites="experts"))
    there = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *inputs.values())}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        graph = forward_loss(model.train(), inputs)
    real = sum(size for key, size in seen.items() if key not in there)
    assert saved_bytes(model, inputs) == real
    del graph


def test_biases_trained_whole_beside_adapted_weights() -> None:
    model = base("gpt_oss", torch.bfloat16)
    adapted = attach(model, small("lora", sites="experts", unfreeze=("experts.down_proj_bias",)))
    loss_of(model, batch()).backward()
    found = {p.name: p.tensor for p in adapted.params() if p.role == "full"}
    assert len(found) == 2
    assert all(p.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in found.values())


def test_under_autocast_it_is_transformers_own_result() -> None:
    model = base("mixtral")
    model.config._experts_implementation = "grouped_mm"
    with torch.autocast("cpu", torch.bfloat16):
        start = logits(model, batch())
        adapted = attach(model, small("lora"))
        assert far(logits(model, batch()), start) < 1e-6
        awaken(adapted)
        assert far(logits(model, batch()), start) > 1e-3


# ----------------------------------------------------------------------------------------------------------------- copies and files
def test_copies_and_pickles_go_on_working() -> None:
    model = base("mixtral")
    adapted = awaken(attach(model, small("lora")))
    want = logits(adapted.model, batch())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(logits(twin, batch()), want)
        assert isinstance(twin.model.layers[0].mlp.experts, type(model.model.layers[0].mlp.experts))
        assert twin.model.layers[0].mlp.experts.lora["down_proj"].base.module is twin.model.layers[0].mlp.experts


@pytest.mark.parametrize("arch", MODELS)
def test_saved_and_loaded_is_the_same(arch: str, tmp_path: Any) -> None:
    adapted = awaken(attach(base(arch), small("lora", sites=["attention", "down_proj", "gate_up_proj[up]", "router"])))
    want = logits(adapted.model, batch())
    adapted.save(tmp_path / "adapter")
    again = load(base(arch), tmp_path / "adapter")
    assert same_bits(logits(again.model, batch()), want)
    assert again.state().sites == adapted.state().sites
    with pytest.raises(AdapterMismatch, match="lacks"):
        load(base("llama"), tmp_path / "adapter", force=True)
    with pytest.raises(AdapterMismatch):
        load(base(arch, num_local_experts=2), tmp_path / "adapter", force=True)


def test_a_plain_load_of_an_adapted_models_folder_is_the_base(tmp_path: Any) -> None:
    model = base("mixtral")
    start = everything(model)
    awaken(attach(model, small("lora"))).model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(same_bits(p, start[n]) for n, p in everything(again).items())


def test_factors_at_rest_only_for_those_who_know_stacks() -> None:
    adapter = awaken(attach(base("mixtral"), small("lora"))).state()
    with pytest.raises(NotExportable, match="4 sites are stacks of experts"):
        adapter.factors()
    f = adapter.factors(stacks=True)["model.layers.0.mlp.experts.down_proj"]
    assert (f.A.shape, f.B.shape) == ((4, 4, 64), (4, 32, 4))


def test_a_report_of_a_stack() -> None:
    adapter = awaken(attach(base("mixtral"), small("lora", sites="experts"))).state()
    report = inspect_adapter(adapter).sites[1]
    W = adapter.deltas()[report.name].weight().detach().double()
    assert (report.shape, report.rank, len(report.singular_values)) == ("4×32×64", 4, 16)
    assert report.norm == pytest.approx(W.norm().item())
    assert report.singular_values[0] == pytest.approx(torch.linalg.svdvals(W).max().item())


# ------------------------------------------------------------------------------------------------------------------------- refusals
def test_a_part_of_the_experts_is_refused() -> None:
    model = base("mixtral")
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    kind = type(model.model.layers[0].mlp.experts)
    with pytest.raises(Incompatible, match="expert parallelism"):
        attach(model, small("lora"))
    assert type(model.model.layers[0].mlp.experts) is kind


def test_who_cannot_adapt_stacks_says_so_before_anything_changes() -> None:
    model = base("mixtral")
    kind = type(model.model.layers[0].self_attn.q_proj)
    with pytest.raises(Incompatible, match=r"DecomposedSpec .* cannot adapt 4 weights of a mixture .*gate_up_proj.*linear-modules"):
        attach(model, small("dora"))
    assert type(model.model.layers[0].self_attn.q_proj) is kind
    attach(model, small("dora", sites="linear-modules"))


def test_training_learns_with_experts() -> None:
    adapted = attach(base("mixtral"), small("lora", sites="experts"))
    run = Run(adapted, total=30, data=lambda i: batch(0))
    first = run.step()
    assert run.steps(29).step() < 0.7 * first
