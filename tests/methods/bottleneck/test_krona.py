"""KronA's acceptance properties (arXiv:2212.10650). Every check below is shown able to fail by a mutant at the end."""

import copy
import math
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lokr.layer import factorization
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit import Adapter, BadParameter, Site, attach, get_method
from lorakit.core.method import Recipe
from lorakit.methods.bottleneck import krona
from tests.adapters import test_trajectory_peft as trajectory
from tests.adapters.subject import quiet
from tests.laws.subject import awaken, base, batch, far, logits, loss_of, same_bits, subject
from tests.methods.tools import fit, layer, normal, teacher

SHAPES = [(3, 2, 4, 6), (2, 6, 6, 2), (1, 4, 12, 3), (12, 1, 1, 12), (4, 12, 3, 1)]
"""(a₁, a₂, b₁, b₂) with a₁ b₁ = a₂ b₂ = 12: both orders of multiplication, and vectors."""


def kron(out: int = 2, into: int = 3, **kwargs: Any) -> Any:
    return get_method("krona", factor_out=out, factor_in=into, sites="w", **kwargs)


def of_shape(a1: int, a2: int, b1: int, b2: int, **kwargs: Any) -> Any:
    (branch,) = awaken(layer(kron(a1, a2, **kwargs), d_out=a1 * b1, d_in=a2 * b2)).branches()
    assert (branch.delta.w1.shape, branch.delta.w2.shape) == ((a1, a2), (b1, b2))
    return branch


# --- size and shape -----------------------------------------------------------------------------------------------------------


def check_count() -> None:
    site = Site("w", "linear", 768, 3072, None, "other")
    assert get_method("krona").count([site]) == 48 * 24 + 64 * 32
    assert get_method("krona", factor_out=4, factor_in=8).count([site]) == 4 * 8 + 768 * 96
    for a1, a2, b1, b2 in SHAPES:
        assert of_shape(a1, a2, b1, b2).delta.w1.numel() + of_shape(a1, a2, b1, b2).delta.w2.numel() == a1 * a2 + b1 * b2


def check_the_factors_are_pefts() -> None:
    """LoKr's factorization of every side up to 200, for every kind of decompose_factor."""
    for factor in (-1, 1, 2, 3, 4, 7, 8, 16, 30, 500):
        for d in range(1, 201):
            assert krona.divisor(d, factor) == factorization(d, factor)[0], (d, factor)


def check_rank() -> None:
    """rank(w1) · rank(w2): 3 · 5, and all that a square W has."""
    d = of_shape(4, 3, 5, 8).delta
    assert int(torch.linalg.matrix_rank(d.weight())) == d.bound() == 15
    d = of_shape(4, 4, 5, 5).delta
    assert int(torch.linalg.matrix_rank(d.weight())) == d.bound() == 20
    with torch.no_grad():
        d.w1.copy_(normal(4, 1) @ normal(1, 4))
    assert int(torch.linalg.matrix_rank(d.weight())) == 5


# --- forward ------------------------------------------------------------------------------------------------------------------


def check_the_fast_path_is_the_dense_one() -> None:
    """Outputs and gradients, of inputs of one to three dimensions, and of ids."""
    for shape in SHAPES:
        d = of_shape(*shape, scaling=1.7).delta
        W = 1.7 * torch.kron(d.w1, d.w2)
        torch.testing.assert_close(d.weight(), W)
        for x in (normal(12), normal(3, 12), normal(2, 3, 12)):
            torch.testing.assert_close(d(x, None), x @ W.T)
            fast, dense = (torch.autograd.grad(y.sin().sum(), [d.w1, d.w2], retain_graph=True) for y in (d(x, None), x @ W.T))
            assert all(far(f, g) < 1e-10 for f, g in zip(fast, dense, strict=True))
        ids = torch.arange(12).view(3, 4)
        torch.testing.assert_close(d(ids, None), W.T[ids])


class Largest(TorchDispatchMode):
    """The size of the largest tensor that an operation makes."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor)]
        self.size = max([self.size, *(t.numel() for t in found)])
        return out


def check_the_product_is_never_formed() -> None:
    """Neither forward nor backward holds anything as large as W: one token costs its input, its output, and what is between."""
    (branch,) = awaken(layer(kron(-1, -1), d_in=144, d_out=100)).branches()
    x = normal(1, 144).requires_grad_()
    with Largest() as seen:
        branch.delta(x, None).sum().backward()
    assert seen.size <= 144 < 14400


# --- the start ----------------------------------------------------------------------------------------------------------------


def check_the_start_is_the_base_and_w1_can_leave_it() -> None:
    for sites in ("all-linear", "embedding"):
        adapted = subject("krona", awake=False, sites=sites)
        assert same_bits(logits(adapted.model, batch()), logits(base(), batch()))
        loss_of(adapted.model, batch()).backward()
        for branch in adapted.branches():
            assert branch.delta.w1.grad.abs().max() > 0
            assert not branch.delta.w2.grad.any()
            assert branch.delta.w2.any()


def check_w2_starts_as_in_lokr() -> None:
    """Kaiming by its own columns."""
    d = layer(kron(2, 2), d_in=200, d_out=200).branches()[0].delta
    assert not d.w1.any()
    assert 0.95 / 10 < d.w2.abs().max() <= 1 / 10
    assert d.w2.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.05)


# --- what it learns -----------------------------------------------------------------------------------------------------------


def nearest(target: Tensor, a1: int, a2: int) -> float:
    """Least ‖T − w1 ⊗ w2‖²_F: the tail of the SVD of T with its blocks as rows (Van Loan and Pitsianis 1993)."""
    d_out, d_in = target.shape
    blocks = target.view(a1, d_out // a1, a2, d_in // a2).transpose(1, 2).reshape(a1 * a2, -1)
    return torch.linalg.svdvals(blocks)[1:].square().sum().item()


def check_a_block_repeated_is_fitted_where_lora_cannot() -> None:
    """ΔW = 1₄ ⊗ C, of full rank: 16 + 9 values, as many as LoRA's 24 at rank 1, which keeps all but one singular value."""
    target = torch.kron(torch.eye(4, dtype=torch.float64), normal(3, 3, seed=2))
    assert int(torch.linalg.matrix_rank(target)) == 12
    assert fit(layer(kron(4, 4), d_in=12, d_out=12), target) < 1e-8
    floor = torch.linalg.svdvals(target)[1:].square().sum().item()
    assert fit(layer(get_method("lora", r=1, sites="w"), d_in=12, d_out=12), target) == pytest.approx(floor, rel=1e-6)
    assert floor > 1


def check_a_low_rank_teacher_is_fitted_to_its_nearest_product() -> None:
    """Which is not zero for a vector product, unless its vectors are products themselves; LoRA of rank 1 fits it."""
    target = teacher(12, 12, [3.0])
    floor = nearest(target, 4, 4)
    assert floor > 0.1
    assert fit(layer(kron(4, 4), d_in=12, d_out=12), target) == pytest.approx(floor, rel=1e-6)
    assert fit(layer(get_method("lora", r=1, sites="w"), d_in=12, d_out=12), target) < 1e-8


# --- beside PEFT --------------------------------------------------------------------------------------------------------------


def counterparts(adapted: Any, theirs: Any) -> list[tuple[Tensor, Tensor]]:
    """(ours, theirs) of every factor."""
    named = dict(theirs.named_parameters())
    return [
        (getattr(b.delta, w), named[f"base_model.model.{b.site.name}.lokr_{w}.default"]) for b in adapted.branches() for w in ("w1", "w2")
    ]


def beside(method: Any, config: Any, model: Any) -> tuple[Any, Any]:
    """Ours and PEFT's on one model, with our start in both."""
    with quiet():
        theirs = peft.get_peft_model(copy.deepcopy(model), config)
    adapted = attach(model, method)
    with torch.no_grad():
        for ours, other in counterparts(adapted, theirs):
            assert ours.shape == other.shape
            other.copy_(ours)
    return adapted, theirs


def check_the_change_is_pefts_lokrs() -> None:
    """The same bits of ΔW, the same logits."""
    for factor, scaling in ((-1, 1.0), (4, 0.75), (5, 3.0)):
        targets = ["q_proj", "k_proj", "up_proj", "down_proj"]
        config = peft.LoKrConfig(r=512, alpha=512 * scaling, decompose_factor=factor, target_modules=targets)
        method = get_method("krona", factor_out=factor, factor_in=factor, scaling=scaling, sites=targets)
        adapted, theirs = beside(method, config, base())
        awaken(adapted)
        with torch.no_grad():
            for ours, other in counterparts(adapted, theirs):
                other.copy_(ours)
        for branch in adapted.branches():
            module = theirs.get_submodule(f"base_model.model.{branch.site.name}")
            assert same_bits(branch.weight().detach(), module.get_delta_weight("default").detach())
        assert far(logits(adapted.model, batch()), logits(theirs.eval(), batch())) < 1e-5


def check_the_trajectory_of_pefts_lokr() -> None:
    """50 steps in fp64 from the same tensors, to 1e-9. PEFT has it for linear layers only, so not for GPT-2."""
    model = trajectory.base("gpt_neox")
    config = peft.LoKrConfig(r=512, alpha=512 * 2.0, target_modules=trajectory.TARGETS["gpt_neox"])
    adapted, theirs = beside(get_method("krona", scaling=2.0), config, model.train())
    assert len(counterparts(adapted, theirs)) == sum(p.requires_grad for p in theirs.parameters())
    losses, reference = trajectory.train_ours(adapted, adapted.methods["default"]), trajectory.train_theirs(theirs.train())
    assert reference[-1] < reference[0] - 0.1
    assert max(abs(a - b) for a, b in zip(losses, reference, strict=True)) <= trajectory.TOLERANCE
    assert max((a - b).abs().max().item() for a, b in counterparts(adapted, theirs)) <= trajectory.TOLERANCE


# --- as plain LoRA ------------------------------------------------------------------------------------------------------------


def check_it_has_exact_lora_factors() -> None:
    for a1, a2, b1, b2 in SHAPES:
        d = of_shape(a1, a2, b1, b2, scaling=0.3).delta
        f = d.factors()
        assert f.A.shape == (min(a1, a2) * min(b1, b2), 12)
        torch.testing.assert_close(f.s * f.B @ f.A, 0.3 * torch.kron(d.w1, d.w2))
    adapted = subject("krona", sites=["q_proj", "embedding"])
    state, tensors, ranks = adapted.state(), {}, {}
    for name, f in state.factors().items():
        tensors |= {f"{name}.A": f.A, f"{name}.B": f.s * f.B}
        ranks[name.replace(".", r"\.")] = len(f.A)
    kwargs = {"rank_pattern": ranks, "alpha_pattern": {k: float(r) for k, r in ranks.items()}}
    fresh = attach(base(), get_method("lora"), name="x").add("y", Adapter(Recipe("lora", kwargs), state.sites, tensors))
    assert far(logits(fresh.model, batch()), logits(adapted.model, batch())) < 1e-5


# --- what is refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"factor_out": 0}, "factor_out=0 is not possible"),
        ({"factor_in": -2}, "factor_in=-2 is not possible"),
        ({"factor_out": 1, "factor_in": 1}, "w2 as large as W"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_what_cannot_be_is_refused(kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(BadParameter, match=says):
        attach(base(), get_method("krona", **kwargs))


def test_sides_of_prime_length() -> None:
    """One of them leaves a column of blocks; two leave nothing to save."""
    (branch,) = layer(kron(-1, -1), d_in=13, d_out=12).branches()
    assert (branch.delta.w1.shape, branch.delta.w2.shape) == ((3, 1), (4, 13))
    with pytest.raises(BadParameter, match="13 × 11"):
        layer(kron(-1, -1), d_in=11, d_out=13)


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("name", CHECKS)
def test_krona(name: str) -> None:
    CHECKS[name]()


# --- mutants ------------------------------------------------------------------------------------------------------------------

Change = Callable[[pytest.MonkeyPatch], None]


def by_columns(m: pytest.MonkeyPatch) -> None:
    """x is read column by column."""
    own = krona.ops.kronecker

    def forward(x: Tensor, w1: Tensor, w2: Tensor, s: float) -> Tensor:
        if x.is_floating_point():
            x = x.unflatten(-1, (w2.shape[1], w1.shape[1])).mT.flatten(-2)
        return own(x, w1, w2, s)

    m.setattr(krona.ops, "kronecker", forward)


def exchanged(m: pytest.MonkeyPatch) -> None:
    """w2 ⊗ w1."""
    m.setattr(krona.Kronecker, "weight", lambda self: torch.kron(self.w2, self.w1) * self.s)
    m.setattr(krona.ops, "kronecker", lambda x, w1, w2, s: s * x @ torch.kron(w2, w1).T)


def dense(m: pytest.MonkeyPatch) -> None:
    m.setattr(krona.Kronecker, "forward", lambda self, x, ctx: x @ self.weight().T)


def starts_at(first: float, second: float) -> Change:
    def change(m: pytest.MonkeyPatch) -> None:
        own = krona.FirstZero.__call__

        def call(self: Any, delta: Any, *rest: Any) -> None:
            own(self, delta, *rest)
            delta.w1.data.add_(first), delta.w2.data.mul_(second)

        m.setattr(krona.FirstZero, "__call__", call)

    return change


def largest_divisor(m: pytest.MonkeyPatch) -> None:
    own = krona.divisor
    m.setattr(
        krona, "divisor", lambda d, factor: max(k for k in range(1, min(factor, d) + 1) if d % k == 0) if factor > 0 else own(d, factor)
    )


def scaled(m: pytest.MonkeyPatch) -> None:
    own = krona.ops.kronecker
    m.setattr(krona.ops, "kronecker", lambda x, w1, w2, s: own(x, w1, w2, s * (1 + 1e-6)))


def without_scale(m: pytest.MonkeyPatch) -> None:
    own = krona.Kronecker.factors
    m.setattr(krona.Kronecker, "factors", lambda self: own(self)._replace(s=1.0))


MUTANTS: list[tuple[str, Change]] = [
    ("count", lambda m: m.setattr(krona.KroneckerSpec, "count", lambda self, site: sum(map(sum, self.shapes(site))))),
    ("the_factors_are_pefts", largest_divisor),
    ("rank", lambda m: m.setattr(krona.Kronecker, "bound", lambda self: min(min(self.w1.shape), min(self.w2.shape)))),
    ("the_fast_path_is_the_dense_one", by_columns),
    ("the_product_is_never_formed", dense),
    ("the_start_is_the_base_and_w1_can_leave_it", starts_at(1e-6, 1.0)),
    ("the_start_is_the_base_and_w1_can_leave_it", starts_at(0.0, 0.0)),
    ("w2_starts_as_in_lokr", starts_at(0.0, 2.0)),
    ("a_block_repeated_is_fitted_where_lora_cannot", exchanged),
    ("a_low_rank_teacher_is_fitted_to_its_nearest_product", exchanged),
    ("the_change_is_pefts_lokrs", exchanged),
    ("the_change_is_pefts_lokrs", by_columns),
    ("the_trajectory_of_pefts_lokr", scaled),
    ("it_has_exact_lora_factors", without_scale),
]


@pytest.mark.parametrize(("name", "change"), MUTANTS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(MUTANTS)])
def test_a_mutant_is_seen(name: str, change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch)
    with pytest.raises(AssertionError):
        CHECKS[name]()


def test_every_check_has_a_mutant() -> None:
    assert {name for name, _ in MUTANTS} == set(CHECKS)
