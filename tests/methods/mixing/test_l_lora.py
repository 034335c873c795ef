"""L-LoRA's acceptance properties (arXiv:2310.04742). Every check below is shown able to fail by a mutant at the end."""

import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lorakit
from lorakit import Adapted, Adapter, BadParameter, Incompatible, Method, attach, get_method
from lorakit.adapters.mix import mix
from lorakit.adapters.peft import from_peft, to_peft
from lorakit.core.layer import Branch
from lorakit.core.lowrank import LowRank, LowRankSpec
from lorakit.core.scale import Rank
from lorakit.methods.mixing import l_lora
from lorakit.methods.mixing.l_lora import STARTS, Linearized, LinearizedSpec
from tests.laws import subject as laws
from tests.laws import test_l15_memory
from tests.laws.steps import Run
from tests.laws.subject import attached, awaken, base, batch, far, logits, same_bits, small, subject
from tests.laws.test_compositions import CHECKS as LAWS
from tests.laws.test_l10_bases import check_L10
from tests.laws.test_l11_compile import check_L11
from tests.methods.tools import fit, layer, normal, whole

TWO_SIDED = ("random", "principal")
TRAINED = ("B", "dA", "dB")


def one(start: str = "zero", **kwargs: Any) -> Adapted:
    """One linear layer of 10 × 12, fp64."""
    return layer(get_method("l_lora", **{"r": 4, "alpha": 6.0, "sites": "w", "dropout": 0.0, "start": start, **kwargs}))


def start_of(branch: Branch) -> tuple[Tensor, Tensor]:
    """A₀ and B₀."""
    d = branch.delta
    return (d.A0, d.B0) if isinstance(d, Linearized) else (d.A.detach(), torch.zeros_like(d.B))


def learned(branch: Branch) -> tuple[Tensor, Tensor]:
    """dA and dB; where there is no dA, any will do."""
    d = branch.delta
    return (d.dA, d.dB) if isinstance(d, Linearized) else (normal(*d.A.shape, seed=9).requires_grad_(), d.B)


def without_start(adapted: Adapted) -> Adapted:
    """B₀ = 0 in the general form."""
    for branch in adapted.branches():
        branch.delta.B0.zero_()
    return adapted


# --- the expansion ------------------------------------------------------------------------------------------------------------


def expansion(branch: Branch, x: Tensor, dropped: Tensor, dA: Tensor, dB: Tensor) -> Tensor:
    """f(φ₀) + jvp(f, φ₀, (dA, dB)) of the layer's own function f, in forward mode."""
    (A0, B0), host = start_of(branch), branch.host.module

    def f(A: Tensor, B: Tensor) -> Tensor:
        return x @ host.weight.T + branch.delta.s * dropped @ (B @ A - B0 @ A0).T + host.bias

    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # torch's own, of torch.jit, at the first jvp
        y, dy = torch.func.jvp(f, (A0, B0), (dA, dB))
    return y + dy


def check_it_is_the_forward_mode_derivative() -> None:
    """Outputs and gradients are the expansion's, with one mask for both terms."""
    for start in STARTS:
        for dropout in (0.0, 0.4):
            adapted, x = awaken(one(start, dropout=dropout), size=1.0), normal(5, 12, seed=3)
            (branch,) = adapted.branches()
            adapted.model.train()
            with adapted.given(step=1):
                got, dropped = adapted.model.w(x), branch.delta.drop(x, adapted.context)
            assert same_bits(dropped, x) == (dropout == 0)
            dA, dB = learned(branch)
            want = expansion(branch, x, dropped, dA, dB)
            assert far(got, want) < 1e-12, (start, dropout)
            by_A, by_B = torch.autograd.grad(want.square().sum(), (dA, dB))
            assert by_A.any() == (start != "zero"), "with B₀ = 0 there is no gradient for A"
            wanted = {"B": by_B} if start == "zero" else {"dA": by_A, "dB": by_B}
            got.square().sum().backward()
            assert {p.attribute for p in adapted.params()} == set(wanted)
            assert all(p.tensor.grad is not None and far(p.tensor.grad, wanted[p.attribute]) < 1e-12 for p in adapted.params())


def check_with_b0_zero_it_is_lora_fa() -> None:
    """Bit for bit, for any B; and in the general form for any dA, whose gradient is zero."""
    for arch, sites in (("llama", "qv"), ("llama", "embedding"), ("bert", "all-linear")):
        ours = subject("l_lora", arch, sites=sites, alpha=6.0, dropout=0.0)
        theirs = subject("lora_fa", arch, sites=sites, alpha=6.0, awake=False)
        theirs.load_tensors("default", ours.tensors("default"))
        assert [p.name for p in ours.params()] == [p.name for p in theirs.params()]
        assert same_bits(logits(ours.model, batch()), logits(theirs.model, batch()))
    general = without_start(awaken(one("random"), size=1.0))
    (branch,) = general.branches()
    frozen = layer(get_method("lora_fa", r=4, alpha=6.0, sites="w"))
    frozen.load_tensors("default", {"w.A": branch.delta.A0, "w.B": branch.delta.dB.detach()})
    assert far(whole(general), whole(frozen)) < 1e-12
    assert branch.delta.dA.abs().max() > 1
    whole(general).square().sum().backward()
    assert not branch.delta.dA.grad.any()
    assert branch.delta.dB.grad.any()


def outputs(adapted: Adapted, values: Iterable[Tensor]) -> Tensor:
    """W' of the only layer with these trained tensors."""
    with torch.no_grad():
        for p, value in zip(adapted.params(), values, strict=True):
            p.tensor.copy_(value)
        return whole(adapted)


def affine(adapted: Adapted) -> float:
    """How far f(φ₁ + φ₂ − φ₀) is from f(φ₁) + f(φ₂) − f(φ₀)."""
    at = [p.tensor.detach().clone() for p in adapted.params()]
    a, b = ([normal(*t.shape, seed=i + 20 * j) for i, t in enumerate(at)] for j in (1, 2))

    def f(*changes: list[Tensor]) -> Tensor:
        return outputs(adapted, [sum(c, t) for t, *c in zip(at, *changes, strict=True)])

    return far(f(a, b), f(a) + f(b) - f())


def check_the_function_is_affine_in_what_is_trained() -> None:
    assert all(affine(one(start)) < 1e-12 for start in STARTS)
    assert affine(layer(get_method("lora", r=4, alpha=6.0, sites="w"))) > 1e-1


def plain_at(branch: Branch, dA: Tensor, dB: Tensor) -> Adapted:
    """LoRA that is not linearized, at φ₀ + (dA, dB), with the same anchor."""
    adapted = layer(Method(LowRankSpec(Rank.of(4, 6.0), anchor=True), sites="w"))
    A0, B0 = start_of(branch)
    adapted.load_tensors("default", {"w.A": A0 + dA, "w.B": B0 + dB, "w.A0": A0, "w.B0": B0})
    return adapted


def check_at_the_start_it_is_the_module() -> None:
    """Value and gradient there; away from it s·dB·dA is what is left out."""
    for start in STARTS:
        adapted, target = one(start), normal(10, 12, seed=7)
        (branch,) = adapted.branches()
        A0, B0 = start_of(branch)
        zeros = torch.zeros_like(A0), torch.zeros_like(B0)
        plain = plain_at(branch, *zeros)
        for each in (adapted, plain):
            assert far(whole(each), branch.base.dense()) < 1e-13
            (whole(each) - target).square().sum().backward()
        (theirs,) = plain.branches()
        wanted = {"B": theirs.delta.B.grad, "dB": theirs.delta.B.grad, "dA": theirs.delta.A.grad}
        assert all(far(p.tensor.grad, wanted[p.attribute]) < 1e-12 for p in adapted.params())
        if start == "zero":
            assert not theirs.delta.A.grad.any()
        awaken(adapted)
        dA, dB = learned(branch)
        left = whole(plain_at(branch, dA.detach(), dB.detach())) - whole(adapted)
        assert far(left, branch.delta.s * dB @ dA) < 1e-10


def check_the_output_is_the_bases_bit_for_bit() -> None:
    for start in STARTS:
        for dtype in (torch.float32, torch.bfloat16):
            for arch, sites in (("llama", ["all-linear", "embedding"]), ("gpt2", ["c_attn[q]", "mlp"])):
                adapted = subject("l_lora", arch, dtype=dtype, awake=False, sites=sites, start=start, dropout=0.25)
                assert adapted.methods["default"].identity
                for mode in (False, True):
                    with adapted.given(step=0):
                        assert same_bits(logits(adapted.model.train(mode), batch()), logits(base(arch, dtype), batch()))


# --- the start ----------------------------------------------------------------------------------------------------------------


def frozen(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in tensors.items() if k.rpartition(".")[2] not in TRAINED}


def fresh(start: str, *, seed: int = 0, **kwargs: Any) -> dict[str, Tensor]:
    return frozen(attached(base(), small("l_lora", start=start, **kwargs), seed=seed).tensors("default"))


def check_the_start_follows_from_the_recipe_alone() -> None:
    """Not from the run's seed, nor from which other sites there are; the recipe of a saved adapter makes it again."""
    for start in STARTS:
        first = fresh(start)
        assert all(same_bits(v, first[k]) for k, v in fresh(start, seed=5).items())
        assert all(same_bits(v, first[k]) for k, v in fresh(start, sites="q_proj").items())
        other = fresh(start, start_seed=1)
        assert all(torch.equal(v, first[k]) == (start == "principal") for k, v in other.items())
        state = subject("l_lora", start=start).state()
        again = attached(base(), state.method(), seed=9).tensors("default")
        assert all(same_bits(again[k], v) for k, v in frozen(state.tensors).items())
        assert len({v.flatten()[0].item() for v in first.values()}) == len(first), "each site has its own"
    zero = fresh("zero")
    assert all(same_bits(v, zero[k[:-1]]) for k, v in fresh("random").items() if k.endswith(".A0"))


def check_the_starts_are_what_they_are_called() -> None:
    """U(±1/√d_in) and U(±1/√r); the singular triplets of W, shared out evenly at any scale."""
    (branch,) = one("random", r=9).branches()
    A0, B0 = start_of(branch)
    for tensor, n in ((A0, 12), (B0, 9)):
        assert 0.8 < tensor.abs().max() * n**0.5 <= 1
        assert abs(tensor.mean()) * n**0.5 < 0.3
    for alpha in (1.0, 10.0):
        (branch,) = one("principal", alpha=alpha).branches()
        A0, B0 = start_of(branch)
        U, S, Vh = torch.linalg.svd(branch.base.dense(), full_matrices=False)
        assert far(branch.delta.s * B0 @ A0, U[:, :4] * S[:4] @ Vh[:4]) < 1e-12
        assert far(A0 @ A0.T, B0.T @ B0) < 1e-12
    for start in ("zero", "random"):
        (branch,) = subject("l_lora", awake=False, sites="embedding", start=start).branches()
        assert start_of(branch)[0].std().item() == pytest.approx(1.0, rel=0.2)


# --- tasks that are added -----------------------------------------------------------------------------------------------------

WEIGHTS = (0.7, -0.3, 1.1)


def task(method: Method, i: int) -> Adapter:
    """What another run, with another seed, has learned."""
    return awaken(attached(base(), method, seed=i), seed=10 + i).state()


def added(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """By arithmetic on the trained tensors; the others are the first one's."""
    tensors = dict(adapters[0].tensors)
    for key in tensors.keys() - frozen(tensors).keys():
        tensors[key] = sum(w * a.tensors[key] for a, w in zip(adapters, weights, strict=True))  # type: ignore[assignment]
    return replace(adapters[0], tensors=tensors)


def updates(adapter: Adapter) -> dict[str, Tensor]:
    return {name: (f.s * f.B.double() @ f.A.double()) for name, f in adapter.factors().items()}


def check_adding_parameters_adds_updates() -> None:
    """With weights that sum to anything, of no larger rank; and in the factors that PEFT would see, with weights that sum to 1."""
    for start, bound in (("zero", 4), ("random", 8), ("principal", 8)):
        tasks = [task(small("l_lora", start=start, sites="all-linear"), i) for i in range(3)]
        assert all(same_bits(v, t.tensors[k]) for t in tasks for k, v in frozen(tasks[0].tensors).items()), "one start"
        got, each = updates(added(tasks, WEIGHTS)), [updates(t) for t in tasks]
        entries, mean = [t.factors() for t in tasks], (0.5, 0.8, -0.3)
        for name, change in got.items():
            want = sum(w * u[name] for u, w in zip(each, WEIGHTS, strict=True))
            assert far(change, want) < 1e-5, (start, name)
            assert torch.linalg.matrix_rank(want, rtol=1e-6) == bound
            A, B = (sum(w * getattr(f[name], side) for f, w in zip(entries, mean, strict=True)) for side in "AB")
            average = sum(w * u[name] for u, w in zip(each, mean, strict=True))
            assert far(entries[0][name].s * B @ A, average.float()) < 1e-5, (start, name)


def check_mixing_at_the_tasks_own_rank_loses_nothing() -> None:
    for start, rank in (("zero", 4), ("random", 8)):
        tasks = [task(small("l_lora", start=start), i) for i in range(3)]
        mixed, want = mix(tasks, "linear", weights=WEIGHTS, space=f"delta+svd:{rank}"), updates(added(tasks, WEIGHTS))
        assert mixed.meta["mix"]["lost"]["total"] < 1e-6
        assert all(far(v, want[k]) < 1e-5 for k, v in updates(mixed).items())


def check_the_sum_says_what_all_tasks_say_at_once() -> None:
    for start in STARTS:
        tasks = [task(small("l_lora", start=start), i) for i in range(3)]
        together = attach(base(), get_method("lora", r=2), name="none")
        for i, t in enumerate(tasks):
            together.add(f"t{i}", t)
        together.switch("t0", "t1", "t2")
        for i, w in enumerate(WEIGHTS):
            together.scale(f"t{i}", w)
        alone = attach(base(), get_method("lora", r=2), name="none").add("sum", added(tasks, WEIGHTS))
        want = logits(together.model, batch())
        assert far(logits(alone.model, batch()), want) < 1e-5
        assert far(logits(base(), batch()), want) > 1e-2


def test_plain_lora_of_one_start_cannot_be_added_so() -> None:
    adapted = [attached(base(), small("lora"), seed=0) for _ in range(3)]
    tasks = [awaken(a, seed=10 + i).state() for i, a in enumerate(adapted)]
    start = attached(base(), small("lora"), seed=0).state()
    about = {k: v + sum(w * (t.tensors[k] - v) for t, w in zip(tasks, WEIGHTS, strict=True)) for k, v in start.tensors.items()}
    got, each = updates(replace(start, tensors=about)), [updates(t) for t in tasks]
    assert all(far(v, sum(w * u[k] for u, w in zip(each, WEIGHTS, strict=True))) > 0.1 for k, v in got.items())


# --- training -----------------------------------------------------------------------------------------------------------------


def check_weight_decay_shrinks_the_update_and_moves_nothing_else() -> None:
    for start in STARTS:
        adapted = awaken(one(start))
        (branch,) = adapted.branches()
        before, still = branch.weight().detach().clone(), {k: v.clone() for k, v in frozen(adapted.tensors("default")).items()}
        optimizer = torch.optim.AdamW((p for p in branch.parameters() if p.requires_grad), lr=0.1, weight_decay=0.5)
        for p in adapted.params():
            p.tensor.grad = torch.zeros_like(p.tensor)
        optimizer.step()
        assert far(branch.weight().detach(), 0.95 * before) < 1e-12
        assert all(same_bits(adapted.tensors("default")[k], v) for k, v in still.items())


def check_what_it_can_learn() -> None:
    """The best of all s (dB A₀ + B₀ dA) leaves (1 − P_B) T (1 − P_A) of a target T, with P on B₀'s columns and A₀'s rows."""
    target = normal(10, 12, seed=8)
    for start in STARTS:
        adapted = one(start)
        A0, B0 = start_of(adapted.branches()[0])
        P_A, P_B = A0.T @ torch.linalg.solve(A0 @ A0.T, A0), torch.zeros(10, 10, dtype=torch.float64)
        if start != "zero":
            P_B = B0 @ torch.linalg.solve(B0.T @ B0, B0.T)
        floor = ((torch.eye(10) - P_B) @ target @ (torch.eye(12) - P_A)).square().sum().item()
        assert floor > 1
        assert fit(adapted, target) == pytest.approx(floor, rel=1e-6)


def check_counts_and_defaults() -> None:
    branches = subject("l_lora", awake=False).branches()
    assert {b.site.role for b in branches} == {"q", "v"}
    sites = [b.site for b in branches]
    method = get_method("l_lora")
    assert method.count(sites) == sum(16 * s.d_out for s in sites)
    assert get_method("l_lora", start="random").count(sites) == sum(16 * (s.d_in + s.d_out) for s in sites)
    for start in STARTS:
        (delta,) = (b.delta for b in layer(get_method("l_lora", sites="w", start=start), d_in=32, d_out=32).branches())
        assert (delta.s, delta.p, len(start_of_delta(delta))) == (2.0, 0.1, 16)


def start_of_delta(delta: Any) -> Tensor:
    """A₀."""
    return delta.A0 if isinstance(delta, Linearized) else delta.A  # type: ignore[no-any-return]


def check_roles() -> None:
    """LoRA+ raises dB's rate; dA and dB are no pair of which one preconditions the other."""
    adapted = attached(base(), get_method("l_lora+loraplus", r=4, start="random", ratio=8.0, sites="q_proj", dropout=0.0))
    rates = {p.attribute: adapted.methods["default"].optim.rate(p, 1.0) for p in adapted.params()}
    assert rates == {"dA": 1.0, "dB": 8.0}
    assert not adapted.params().pairs()


# --- files --------------------------------------------------------------------------------------------------------------------


def check_what_is_exported_holds_the_start_itself() -> None:
    """A₀, as the recipe makes it, after training; read back it is the same adapter at `zero`, and plain LoRA of rank 2r elsewhere."""
    for start in STARTS:
        adapted = subject("l_lora", awake=False, start=start, sites="all-linear", dropout=0.1)
        Run(adapted, total=8).steps(3)
        state, A0 = adapted.state(), fresh(start, sites="all-linear")
        with tempfile.TemporaryDirectory() as folder:
            assert to_peft(state, folder, model=base()).errors == {}
            files = load_file(Path(folder) / "adapter_model.safetensors")
            again = from_peft(folder, model=base())
        for site in state.sites:
            written = files[f"base_model.model.{site.name}.lora_A.weight"]
            assert same_bits(written[:4], A0[f"{site.name}.A" if start == "zero" else f"{site.name}.A0"])
            assert len(written) == (4 if start == "zero" else 8)
        assert again.recipe.name == ("l_lora" if start == "zero" else "lora")
        assert again.recipe == state.recipe or start != "zero"
        assert all(far(v, updates(state)[k]) < 1e-12 for k, v in updates(again).items())


def test_an_adapter_loads_with_the_start_it_was_saved_with() -> None:
    """Though its recipe would make the start again: another base has other singular vectors."""
    for start in STARTS:
        adapted = subject("l_lora", start=start)
        want = updates(adapted.state())
        with tempfile.TemporaryDirectory() as folder:
            adapted.save(folder)
            found = lorakit.load(base(seed=1), folder, force=True).state()
        assert all(torch.equal(v, want[k]) for k, v in updates(found).items())


# --- what is refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"start": "pissa"}, "start='pissa'"),
        ({"start": "principal", "alpha": 0.0}, "alpha > 0"),
        ({"start": "principal", "alpha_pattern": {"q_proj": -1.0}}, "alpha > 0"),
        ({"start": "random", "r": 33}, "r=33 exceeds"),
        ({"r": 0}, "r=0"),
        ({"start": "random", "dropout": 1.0}, "dropout=1.0"),
        ({"start": "random", "rank_pattern": {"q_porj": 2}}, "q_porj"),
    ],
)
def test_what_cannot_be_is_refused(kwargs: dict[str, Any], says: str) -> None:
    model = base()
    with pytest.raises(BadParameter, match=says):
        attach(model, get_method("l_lora", **{"r": 4, "sites": "q_proj", **kwargs}))
    assert not any("lora" in name for name, _ in model.named_modules())


def test_two_sided_starts_refuse_what_would_bend_them() -> None:
    for start in TWO_SIDED:
        for name in ("l_lora+dora", "l_lora+eva", "dora+l_lora", "pissa+l_lora"):
            with pytest.raises(Incompatible):
                get_method(name, start=start)
    mixture = base("mixtral")
    with pytest.raises(Incompatible, match="linear-modules"):
        attach(mixture, get_method("l_lora", r=4, sites="all-linear", start="random"))
    assert attach(mixture, get_method("l_lora", r=4, sites="all-linear")).branches(), "zero knows stacks of experts, as LoRA-FA does"


def test_patterns_give_other_ranks_and_scales() -> None:
    for start in STARTS:
        adapted = subject("l_lora", start=start, alpha=8.0, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3.0})
        found = {b.site.role: (len(start_of_delta(b.delta)), b.delta.s) for b in adapted.branches()}
        assert found == {"q": (2, 4.0), "v": (4, 0.75)}


# --- the laws for the other starts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
def test_the_laws_hold_for_a_random_start(law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(laws.SMALL, "start", "random")
    LAWS[law]("l_lora")


@pytest.mark.parametrize("law", ["L1", "L5", "L5 peft", "L7", "L8", "L9", "L13"])
def test_the_laws_hold_for_a_principal_start(law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(laws.SMALL, "start", "principal")
    LAWS[law]("l_lora")


@pytest.mark.parametrize("start", TWO_SIDED)
def test_the_other_starts_on_other_bases_compiled_and_in_memory(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(laws.SMALL, "start", start)
    monkeypatch.setitem(laws.SMALL, "alpha", 4.0)  # bf16 rounds what is merged, and B₀ is no small matrix
    for label in ("linear bf16", "interleaved rows", "embedding"):
        check_L10("l_lora", label)
    check_L11("l_lora")
    monkeypatch.setitem(test_l15_memory.DECLARED, "l_lora", lambda branch, dropout: branch.site.d_in * (1 + dropout) + branch.delta.bound())
    test_l15_memory.check_L15("l_lora")


def test_they_train_on_a_quantized_base() -> None:
    for start in STARTS:
        adapted = attached(base(), get_method("l_lora+qlora", r=4, start=start, sites="q_proj", dropout=0.0))
        want = logits(adapted.model, batch())
        run = Run(adapted, total=8, data=lambda i: batch())
        first, *_, last = [run.step().item() for _ in range(6)]
        assert last < first
        assert not same_bits(logits(adapted.model.eval(), batch()), want)


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_") and "_L" not in name}


@pytest.mark.parametrize("name", CHECKS)
def test_l_lora(name: str) -> None:
    CHECKS[name]()


# --- mutants ------------------------------------------------------------------------------------------------------------------

Change = Callable[[pytest.MonkeyPatch], None]


def factors(change: Callable[[Linearized, Any], Any]) -> Change:
    """Forward and files multiply by something else."""

    def apply(m: pytest.MonkeyPatch) -> None:
        own = Linearized.factors
        m.setattr(Linearized, "factors", lambda self: change(self, own(self)))

    return apply


cross = factors(lambda d, f: f._replace(B=torch.cat([d.dB, d.B0 + d.dB], 1)))
"""s·dB·dA besides: not linearized."""
whole_A = factors(lambda d, f: f._replace(A=torch.cat([d.A0, d.A0 + d.dA])))
"""A for A − A₀: the start is not subtracted."""
unscaled = factors(lambda d, f: f._replace(s=1.0))


def draws_with(rng: Callable[[Any, Any, torch.Generator], torch.Generator]) -> Change:
    """The start is drawn from another generator."""

    def apply(m: pytest.MonkeyPatch) -> None:
        m.setattr(l_lora.Pinned, "__call__", lambda self, delta, base, site, run: self.start(delta, base, site, rng(self, site, run)))

    return apply


of_the_run = draws_with(lambda self, site, run: run)
always_one = draws_with(lambda self, site, run: l_lora.random.generator(0, site.name))
same_everywhere = draws_with(lambda self, site, run: l_lora.random.generator(self.seed, ""))


def learns_A_too(m: pytest.MonkeyPatch) -> None:
    """Ordinary LoRA at `zero`."""
    m.setattr(l_lora, "LowRankSpec", lambda rank, dropout, train: LowRankSpec(rank, dropout))


def drifted(m: pytest.MonkeyPatch) -> None:
    """What is exported is not A₀ itself."""
    own = LowRank.factors
    m.setattr(LowRank, "factors", lambda self: (lambda f: f._replace(A=f.A + 1e-6, B=f.B))(own(self)))


def one_sided(m: pytest.MonkeyPatch) -> None:
    """dA does not learn."""
    own = Linearized.factors
    m.setattr(Linearized, "factors", lambda self: own(self)._replace(A=torch.cat([self.A0, self.dA.detach()])))


def other_signs(m: pytest.MonkeyPatch) -> None:
    """U and V of W's triplets no longer belong together."""
    own = l_lora.signed
    m.setattr(l_lora, "signed", lambda *t: (lambda U, S, Vh: (U, S, Vh.flip(0)))(*own(*t)))


def dropped_twice(m: pytest.MonkeyPatch) -> None:
    """B₀ dA has a mask of its own."""

    def forward(self: Linearized, x: Tensor, ctx: Any) -> Tensor:
        return self.s * (x @ self.A0.T @ self.dB.T + self.drop(x, ctx) @ self.dA.T @ self.B0.T)

    m.setattr(Linearized, "product", lambda self, ctx: None)
    m.setattr(Linearized, "forward", forward)


MUTANTS: list[tuple[str, Change]] = [
    ("it_is_the_forward_mode_derivative", cross),
    ("it_is_the_forward_mode_derivative", whole_A),
    ("it_is_the_forward_mode_derivative", unscaled),
    ("it_is_the_forward_mode_derivative", one_sided),
    ("it_is_the_forward_mode_derivative", dropped_twice),
    ("it_is_the_forward_mode_derivative", learns_A_too),
    ("with_b0_zero_it_is_lora_fa", learns_A_too),
    ("with_b0_zero_it_is_lora_fa", cross),
    ("the_function_is_affine_in_what_is_trained", cross),
    ("the_function_is_affine_in_what_is_trained", learns_A_too),
    ("at_the_start_it_is_the_module", whole_A),
    ("at_the_start_it_is_the_module", cross),
    ("the_output_is_the_bases_bit_for_bit", whole_A),
    ("the_start_follows_from_the_recipe_alone", of_the_run),
    ("the_start_follows_from_the_recipe_alone", always_one),
    ("the_start_follows_from_the_recipe_alone", same_everywhere),
    ("the_starts_are_what_they_are_called", other_signs),
    ("the_starts_are_what_they_are_called", lambda m: m.setattr(l_lora, "uniform", lambda like, rng: torch.rand(like.shape))),
    ("adding_parameters_adds_updates", of_the_run),
    ("adding_parameters_adds_updates", cross),
    ("adding_parameters_adds_updates", learns_A_too),
    ("mixing_at_the_tasks_own_rank_loses_nothing", of_the_run),
    ("the_sum_says_what_all_tasks_say_at_once", of_the_run),
    ("the_sum_says_what_all_tasks_say_at_once", cross),
    ("weight_decay_shrinks_the_update_and_moves_nothing_else", learns_A_too),
    ("what_it_can_learn", one_sided),
    ("what_it_can_learn", learns_A_too),
    ("counts_and_defaults", lambda m: m.setattr(LinearizedSpec, "count", lambda self, site: self.rank.r * site.d_out)),
    ("roles", lambda m: m.setattr(Linearized, "roles", lambda self: {"dA": "A", "dB": "B"})),
    ("what_is_exported_holds_the_start_itself", drifted),
    ("what_is_exported_holds_the_start_itself", learns_A_too),
]


@pytest.mark.parametrize(("name", "change"), MUTANTS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(MUTANTS)])
def test_a_mutant_is_seen(name: str, change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch)
    with pytest.raises(AssertionError):
        CHECKS[name]()


def test_every_check_has_a_mutant() -> None:
    assert {name for name, _ in MUTANTS} == set(CHECKS)
