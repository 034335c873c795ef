"""VB-LoRA's acceptance properties (arXiv:2405.15179). Every check below is shown able to fail by a mutant at the end."""

import copy
import dataclasses
import itertools
import tempfile
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lorakit
from lorakit import Adapted, BadParameter, Incompatible, attach, get_method
from lorakit.adapters.compact import compact
from lorakit.adapters.io import load_adapter, save_adapter
from lorakit.methods.sharing import vb_lora
from lorakit.ops import reference
from tests.adapters import test_trajectory_peft as trajectory
from tests.adapters.subject import quiet
from tests.laws.steps import Run
from tests.laws.subject import base, batch, far, logits, loss_of, same_bits, subject
from tests.methods.tools import fit, layer, normal, teacher

D = {"d_in": 12, "d_out": 8}


def of(**kwargs: Any) -> Any:
    return get_method("vb_lora", **{"r": 2, "num_vectors": 10, "vector_length": 4, "sites": "w", **kwargs})


def one(**kwargs: Any) -> tuple[Adapted, Any, Tensor]:
    """(handle, delta, bank) of one linear layer, 12 → 8."""
    adapted = layer(of(**kwargs), **D)
    (pool,) = adapted.shared("default").values()
    return adapted, adapted.branches()[0].delta, pool.V


# --- the factors --------------------------------------------------------------------------------------------------------------


def check_count() -> None:
    """h·b + Σ r (d_in + d_out) / b · h: 6240 for 128 → 128 and 128 → 256 with r 4, h 30 and b 64."""
    model = nn.ModuleDict({"a": nn.Linear(128, 128), "b": nn.Linear(128, 256)})
    adapted = attach(model, get_method("vb_lora", r=4, num_vectors=30, vector_length=64, sites=["a", "b"]))
    want = 30 * 64 + 4 * (128 + 128 + 128 + 256) // 64 * 30
    assert adapted.params().numel() == want == 1920 + 1200
    adapted.detach()
    adapted = attach(model, get_method("vb_lora", r=4, num_vectors=60, vector_length=64, sites=["a", "b"]))
    assert adapted.params().numel() == 6240
    assert {p.role for p in adapted.params()} == {"bank", "logits"}


def check_the_factors_are_mixtures_of_the_bank() -> None:
    """Row k of A: its d_in / b sub-vectors one after the other; column k of B: its d_out / b ones. Written out in loops."""
    for k in (1, 2, 5):
        _, delta, V = one(topk=k)
        A, B = torch.zeros(2, 12, dtype=V.dtype), torch.zeros(8, 2, dtype=V.dtype)

        def mixed(sigma: Tensor, k: int = k, V: Tensor = V) -> Tensor:
            chosen = sorted(range(10), key=lambda i: -sigma[i].item())[:k]
            weights = torch.exp(sigma[chosen]) / torch.exp(sigma[chosen]).sum()
            return sum(w * V[i] for w, i in zip(weights, chosen, strict=True))

        for row, j in itertools.product(range(2), range(3)):
            A[row, 4 * j : 4 * j + 4] = mixed(delta.A_logits[row, j])
        for i, column in itertools.product(range(2), range(2)):
            B[4 * i : 4 * i + 4, column] = mixed(delta.B_logits[i, column])
        f = delta.factors()
        assert far(f.A, A) < 1e-12
        assert far(f.B, B) < 1e-12
        assert f.s == 1.0
        assert far(delta.weight(), B @ A) < 1e-12
        x = normal(2, 3, 12)
        assert far(delta(x, None), x @ (B @ A).T) < 1e-12


def check_only_chosen_vectors_and_logits_get_gradients() -> None:
    """With topk = num_vectors it is a softmax over the whole bank, and all get some."""
    _, delta, V = one(topk=2)
    delta.weight().square().sum().backward()
    for logit in (delta.A_logits, delta.B_logits):
        assert logit.grad is not None
        chosen = torch.zeros_like(logit, dtype=torch.bool).scatter(-1, logit.topk(2).indices, True)
        assert (logit.grad[chosen] != 0).all()
        assert not logit.grad[~chosen].any()
    used = torch.cat([logit.topk(2).indices.flatten() for logit in (delta.A_logits, delta.B_logits)]).unique()
    assert 0 < len(used) < 10
    assert set(V.grad.any(1).nonzero().flatten().tolist()) == set(used.tolist())
    _, delta, V = one(topk=10)
    assert far(delta.factors().A, (delta.A_logits.softmax(-1) @ V).flatten(1)) < 1e-12
    delta.weight().square().sum().backward()
    assert (V.grad != 0).all()
    assert (delta.A_logits.grad != 0).all()


def check_the_banks_gradient_sums_over_sites() -> None:
    """There is one bank: in memory, in the optimizer, in the file."""
    adapted = subject("vb_lora", dtype=torch.float64, sites=["q_proj", "up_proj"])
    (pool,) = adapted.shared("default").values()
    loss_of(adapted.model, batch()).backward()
    assert pool.V.grad is not None
    whole, parts = pool.V.grad.clone(), torch.zeros_like(pool.V)
    for branch in adapted.branches():
        adapted.model.zero_grad()
        held = copy.copy(branch.delta.banks)
        branch.delta.banks = (copy.deepcopy(pool).requires_grad_(),)
        loss_of(adapted.model, batch()).backward()
        parts += branch.delta.banks[0].V.grad
        branch.delta.banks = held
    assert far(whole, parts) < 1e-10
    optimizer = Run(adapted, total=4).optimizer
    assert sum(p is pool.V for group in optimizer.param_groups for p in group["params"]) == 1
    assert [k for k in adapted.state().tensors if k.endswith(".V")] == ["lora_shared.pool.V"]
    assert [n for n, _ in adapted.model.named_parameters() if n.endswith(".V")] == ["lora_shared.default.pool.V"]


# --- the start ----------------------------------------------------------------------------------------------------------------


def check_the_start() -> None:
    """V ~ U(±bank_bound), logits ~ N(0, logits_std²): the output moves a little, and everything has a gradient."""
    adapted = subject("vb_lora", awake=False, num_vectors=200, bank_bound=0.5, logits_std=0.3)
    (pool,) = adapted.shared("default").values()
    assert 0.45 < pool.V.abs().max() <= 0.5
    assert abs(pool.V.mean()) < 0.03
    drawn = torch.cat([p.tensor.detach().flatten() for p in adapted.params().by_role("logits")])
    assert drawn.std().item() == pytest.approx(0.3, rel=0.02)
    assert not get_method("vb_lora").identity
    default = subject("vb_lora", awake=False)
    moved = far(logits(default.model, batch()), logits(base(), batch()))
    assert 0 < moved < 0.01
    loss_of(default.model, batch()).backward()
    assert all(p.tensor.grad.abs().max() > 0 for p in default.params())


def check_three_learning_rates() -> None:
    """The run's for the bank, logits_ratio times for logits, head_ratio times for what is trained whole."""
    adapted = subject("vb_lora", unfreeze=("lm_head",), logits_ratio=7.0, head_ratio=3.0)
    optimizer = Run(adapted, total=4, lr=1e-3).optimizer
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {p.role: rate[id(p.tensor)] for p in adapted.params()}
    assert found == pytest.approx({"bank": 1e-3, "logits": 7e-3, "full": 3e-3})
    assert get_method("vb_lora").optim.ratios == (("logits", 10.0), ("full", 4.0))


# --- files --------------------------------------------------------------------------------------------------------------------


def check_the_compact_form() -> None:
    """h·b floats, and for every sub-vector k indices and k − 1 floats; the same logits; a larger bank's indices are wider."""
    for vectors, kind in ((12, torch.uint8), (300, torch.int16)):
        adapted = subject("vb_lora", dtype=torch.float64, num_vectors=vectors, topk=3)
        want = logits(adapted.model, batch())
        small = compact(adapted.state())
        cut = sum(4 * (b.site.d_in + b.site.d_out) // 8 for b in adapted.branches())
        by_end = {end: [t for k, t in small.tensors.items() if k.endswith(end)] for end in ("_indices", "_weights", ".V")}
        assert sum(map(len, by_end.values())) == len(small.tensors)
        assert [sum(t.numel() for t in ts) for ts in by_end.values()] == [3 * cut, 2 * cut, 8 * vectors]
        assert {t.dtype for t in by_end["_indices"]} == {kind}
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(small, folder)
            again = lorakit.load(base(dtype=torch.float64), folder)
            assert load_adapter(folder).recipe.kwargs["compact"] is True
        assert far(logits(again.model, batch()), want) < 1e-12
        assert far(logits(again.merge(), batch()), want) < 1e-12


def check_the_compact_form_cannot_be_trained() -> None:
    """Nor started afresh."""
    again = attach(base(), get_method("lora", r=2)).add("small", compact(subject("vb_lora").state()))
    assert again.params().numel() == 0
    assert not any(p.requires_grad for p in again.model.parameters())
    with pytest.raises(Incompatible, match="nothing to train"):
        Run(again, total=4)
    with pytest.raises(BadParameter, match="compact=True is the form of a finished adapter"):
        attach(base(), get_method("vb_lora", vector_length=8, compact=True))


def test_no_file_can_ask_for_a_vector_that_is_not_there() -> None:
    state = compact(subject("vb_lora", sites="q_proj").state())
    tensors = {k: torch.full_like(t, 255) if k.endswith("_indices") else t for k, t in state.tensors.items()}
    ill = attach(base(), get_method("lora", r=2)).add("ill", dataclasses.replace(state, tensors=tensors))
    assert logits(ill.model, batch()).isfinite().all()
    tensors = {k: t.float() if k.endswith("_indices") else t for k, t in state.tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(dataclasses.replace(state, tensors=tensors), folder)
        with pytest.raises(lorakit.AdapterMismatch, match=r"_indices holds torch.float32; expected torch.uint8"):
            load_adapter(folder)


# --- what it learns -----------------------------------------------------------------------------------------------------------


def check_repeated_vectors_are_found_from_fewer_values_than_lora_has() -> None:
    """A target of rank 2 whose factors repeat two vectors of length 4: the bank holds them; logits alone choose. LoRA of rank 1 has more
    values than the bank (20 against 8) and keeps the second singular value."""
    u, v = normal(4, seed=1), normal(4, seed=2)
    A = torch.stack([torch.cat([u, v, u]), torch.cat([v, v, u])])
    B = torch.stack([torch.cat([u, v]), torch.cat([v, u])], dim=1)
    target = B @ A
    adapted, delta, V = one(num_vectors=2, topk=1)
    with torch.no_grad():
        V.copy_(torch.stack([u, v]) + 0.1 * normal(2, 4, seed=3))
        for logit, picks in ((delta.A_logits, [[0, 1, 0], [1, 1, 0]]), (delta.B_logits, [[0, 1], [1, 0]])):
            logit.copy_(torch.nn.functional.one_hot(torch.tensor(picks), 2))
    assert fit(adapted, target) < 1e-8
    floor = torch.linalg.svdvals(target)[1:].square().sum().item()
    assert floor > 0.1
    assert fit(layer(get_method("lora", r=1, sites="w"), **D), target) == pytest.approx(floor, rel=1e-6)


def check_a_bank_too_small_loses_to_lora() -> None:
    """One vector for all: ΔW is a grid of equal blocks, whatever is trained; LoRA of rank 1 fits a spike."""
    target = teacher(8, 12, [3.0])
    adapted, _, _ = one(num_vectors=1, topk=1)
    blocks = target.unflatten(0, (2, 4)).unflatten(2, (3, 4)).mean((0, 2))
    floor = (target - blocks.repeat(2, 3)).square().sum().item()
    left = fit(adapted, target)
    assert left >= floor * (1 - 1e-9)
    assert floor > 0.5 * 9
    assert fit(layer(get_method("lora", r=1, sites="w"), **D), target) < 1e-8


# --- beside PEFT --------------------------------------------------------------------------------------------------------------


def counterparts(adapted: Any, theirs: Any) -> list[tuple[Tensor, Tensor]]:
    bank = theirs.base_model.vblora_vector_bank["default"]
    pairs = [(row.tensor, bank) for row in adapted.params().by_role("bank")]
    for branch in adapted.branches():
        module = theirs.get_submodule(f"base_model.model.{branch.site.name}")
        pairs += [(branch.delta.A_logits, module.vblora_logits_A["default"]), (branch.delta.B_logits, module.vblora_logits_B["default"])]
    assert len(pairs) == len(adapted.params()) == sum(p.requires_grad for p in theirs.parameters())
    return pairs


def check_the_trajectory_of_pefts(arch: str = "gpt_neox") -> None:
    """50 steps in fp64 from the same tensors, to 1e-9; choices change on the way."""
    model, targets = trajectory.base(arch), trajectory.TARGETS[arch]
    sizes = {"r": 2, "num_vectors": 9, "vector_length": 8, "topk": 2}
    with quiet():
        theirs = peft.get_peft_model(copy.deepcopy(model), peft.VBLoRAConfig(**sizes, target_modules=targets)).double().train()
    adapted = attach(model.train(), get_method("vb_lora", **sizes, sites=targets, bank_bound=0.3))
    pairs = counterparts(adapted, theirs)
    with torch.no_grad():
        for ours, other in pairs:
            assert ours.dtype == other.dtype == torch.float64
            other.copy_(ours)
    before = [b.delta.A_logits.topk(2).indices for b in adapted.branches()]
    losses, wanted = trajectory.train_ours(adapted, adapted.methods["default"]), trajectory.train_theirs(theirs)
    assert wanted[-1] < wanted[0] - 0.1
    assert any(not torch.equal(b.delta.A_logits.topk(2).indices, was) for b, was in zip(adapted.branches(), before, strict=True))
    assert max(abs(a - b) for a, b in zip(losses, wanted, strict=True)) <= trajectory.TOLERANCE
    assert max((a - b).abs().max().item() for a, b in pairs) <= trajectory.TOLERANCE


# --- the rest -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"r": 0}, "r=0"),
        ({"topk": 0}, "topk=0"),
        ({"topk": 11}, "no more vectors are chosen than there are"),
        ({"vector_length": 5}, r"vector_length=5 does not divide the sides of all 1 sites; use 4 or a divisor"),
        ({"vector_length": 8}, r"use 4 or a divisor"),
        ({"logits_ratio": 0.0}, "multiply the learning rate"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_what_cannot_be_is_refused(kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(BadParameter, match=says):
        layer(of(**kwargs), **D)


def test_the_bank_is_the_same_whichever_sites_there_are() -> None:
    first, second = (subject("vb_lora", awake=False, sites=sites).state().tensors["lora_shared.pool.V"] for sites in ("q_proj", "mlp"))
    assert same_bits(first, second)


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("name", CHECKS)
def test_vb_lora(name: str) -> None:
    CHECKS[name]()


def test_the_trajectory_on_conv1d() -> None:
    check_the_trajectory_of_pefts("gpt2")


# --- mutants ------------------------------------------------------------------------------------------------------------------

Change = Callable[[pytest.MonkeyPatch], None]


def chosen(change: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> Change:
    return lambda m: m.setattr(reference, "choose", change)


def over_all(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The weights are the softmax over all logits, cut to k: they no longer sum to one."""
    top = logits.softmax(-1).topk(k, dim=-1)
    return top.values, top.indices


def untransposed(self: Any) -> tuple[Tensor, Tensor]:
    A, B = (reference.compose(*self._choice(name), self.banks[0].V) for name in "AB")
    return A.flatten(1), B.reshape(-1, self.r)


def banks_of_their_own(m: pytest.MonkeyPatch) -> None:
    own = vb_lora.BankSpec.build

    def build(self: Any, site: Any, *, pool: Any, dtype: Any, device: Any) -> Any:
        delta = own(self, site, pool=pool, dtype=dtype, device=device)
        delta.banks = (copy.deepcopy(pool),)
        return delta

    m.setattr(vb_lora.BankSpec, "build", build)


def still_trained(m: pytest.MonkeyPatch) -> None:
    """The bank of a compact adapter can be trained."""
    own = vb_lora.Bank.__init__

    def init(self: Any, spec: Any, **kwargs: Any) -> None:
        own(self, dataclasses.replace(spec, compact=False), **kwargs)

    m.setattr(vb_lora.Bank, "__init__", init)


def half_a_weight(m: pytest.MonkeyPatch) -> None:
    """What is left for the last vector is multiplied."""
    own = vb_lora.Composed._choice

    def choice(self: Any, name: str) -> tuple[Tensor, Tensor]:
        weights, indices = own(self, name)
        return torch.cat([weights[..., :-1], 1.01 * weights[..., -1:]], -1) if self.compact else weights, indices

    m.setattr(vb_lora.Composed, "_choice", choice)


def at_zero(m: pytest.MonkeyPatch) -> None:
    m.setattr(vb_lora.BankSpec, "pool", lambda self, sites, *, every, rng, **like: vb_lora.Bank(self, **like))


def top(logits: Tensor, k: int, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    found = logits.topk(k, dim=-1)
    return change(found.values), found.indices


def uniform(like: Tensor, std: float, rng: torch.Generator) -> Tensor:
    return torch.empty(like.shape).uniform_(-std, std, generator=rng)


MUTANTS: list[tuple[str, Change]] = [
    ("count", lambda m: m.setattr(vb_lora.BankSpec, "cut", lambda self, site: {"A": (self.r, site.d_in // self.length), "B": (1, self.r)})),
    ("the_factors_are_mixtures_of_the_bank", chosen(over_all)),
    ("the_factors_are_mixtures_of_the_bank", lambda m: m.setattr(vb_lora.Composed, "matrices", untransposed)),
    ("only_chosen_vectors_and_logits_get_gradients", chosen(over_all)),
    ("only_chosen_vectors_and_logits_get_gradients", chosen(lambda logits, k: top(logits, k, lambda v: v.softmax(-1).detach()))),
    ("the_banks_gradient_sums_over_sites", banks_of_their_own),
    ("the_start", lambda m: m.setattr(vb_lora, "normal", uniform)),
    ("the_start", at_zero),
    ("three_learning_rates", lambda m: m.setattr(vb_lora.Bank, "roles", lambda self: {"V": "logits"})),
    ("the_compact_form", half_a_weight),
    ("the_compact_form", lambda m: m.setattr(vb_lora, "INDICES", {2**31: torch.int32})),
    ("the_compact_form_cannot_be_trained", still_trained),
    ("the_compact_form_cannot_be_trained", lambda m: m.setattr(vb_lora.BankSpec, "check", lambda self, sites: None)),
    ("repeated_vectors_are_found_from_fewer_values_than_lora_has", lambda m: m.setattr(vb_lora.Composed, "matrices", untransposed)),
    ("a_bank_too_small_loses_to_lora", chosen(lambda logits, k: top(logits, k, lambda v: v))),
    ("the_trajectory_of_pefts", chosen(over_all)),
    ("the_trajectory_of_pefts", chosen(lambda logits, k: top(logits, k, lambda v: v.mul(1 + 1e-6).softmax(-1)))),
]


@pytest.mark.parametrize(("name", "change"), MUTANTS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(MUTANTS)])
def test_a_mutant_is_seen(name: str, change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception, lorakit.LorakitError, RuntimeError, AttributeError)):
        CHECKS[name]()


def test_every_check_has_a_mutant() -> None:
    assert {name for name, _ in MUTANTS} == set(CHECKS)
