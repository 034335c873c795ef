"""LoRA-XS's acceptance properties (arXiv:2405.17604). Every check below is shown able to fail by a mutant at the end."""

import dataclasses
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lorakit
from lorakit import Adapter, BadParameter, attach, get_method
from lorakit.core import attach as attach_module
from lorakit.core.method import Recipe
from lorakit.methods.reduction import lora_xs
from tests.laws.steps import Run
from tests.laws.subject import base, batch, far, logits, loss_of, same_bits, subject
from tests.methods.tools import fit, layer, normal, whole

SIDES = ("A", "B", "split")


def xs(r: int = 4, **kwargs: Any) -> Any:
    return get_method("lora_xs", **{"r": r, "alpha": float(r), "sites": "w", **kwargs})


def svd(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(W, full_matrices=True)


# --- size and frames ----------------------------------------------------------------------------------------------------------


def check_count() -> None:
    """r² a site whatever its shape; r_out · r where the core is not square."""
    for more, each in (({}, 16), ({"r_out": 7}, 28), ({"r": 2, "r_out": 1}, 2)):
        adapted = subject("lora_xs", awake=False, sites=["all-linear", "embedding"], **more)
        assert len({(b.site.d_out, b.site.d_in) for b in adapted.branches()}) == 5
        assert adapted.params().numel() == each * len(adapted.branches())


def check_the_frames_are_ws_largest_triplets() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for arch, sites in (("llama", ["all-linear", "embedding"]), ("gpt2", ["c_attn[q]", "mlp"])):
            for side in SIDES:
                for branch in subject("lora_xs", arch, dtype=dtype, awake=False, sites=sites, sigma=side, r_out=6).branches():
                    d, W = branch.delta, branch.base.dense(torch.float32)
                    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
                    torch.testing.assert_close(d.B[:, :4] @ d.A, U[:, :4] * S[:4] @ Vh[:4])
                    left, right = {"A": (1 + 0 * S, S), "B": (S, 1 + 0 * S), "split": (S.sqrt(), S.sqrt())}[side]
                    torch.testing.assert_close(d.B.norm(dim=0), left[:6])
                    torch.testing.assert_close(d.A.norm(dim=1), right[:4])
                    assert d.A.dtype == d.B.dtype == d.R.dtype == torch.float32


def check_the_full_core_is_w_itself() -> None:
    """r = min(d_in, d_out) and R = t·1 give ΔW = s·t·W."""
    for side in SIDES:
        for shape in ({"d_in": 8, "d_out": 5}, {"d_in": 5, "d_out": 8}):
            (branch,) = layer(xs(5, sigma=side, alpha=15.0), **shape).branches()
            with torch.no_grad():
                branch.delta.R.copy_(0.7 * torch.eye(5, dtype=torch.float64))
            assert far(branch.weight(), 3.0 * 0.7 * branch.base.dense()) < 1e-12


def check_randomized_frames() -> None:
    """Subspace iteration finds the same frames where the spectrum falls off; its draws follow the seed."""
    exact, quick, again = (
        attach(base("llama", hidden_size=64), xs(4, sites="q_proj", niter=n), seed=3).branches()[0].delta for n in (0, 30, 30)
    )
    assert far(quick.B @ quick.A, exact.B @ exact.A) < 1e-2
    assert not torch.equal(quick.A, exact.A)
    assert torch.equal(quick.A, again.A)


# --- what is trained ----------------------------------------------------------------------------------------------------------


def check_the_start_is_almost_the_base() -> None:
    delta = layer(xs(8, std=1e-5), d_in=64, d_out=64).branches()[0].delta
    assert delta.R.std().item() == pytest.approx(1e-5, rel=0.3)
    method = get_method("lora_xs", r=4)
    assert method.init.std == 1e-5
    assert not method.identity
    want = logits(base(), batch())
    got = logits(subject("lora_xs", awake=False).model, batch())
    assert not same_bits(got, want)
    assert far(got, want) < 1e-3


def check_a_core_of_zeros_is_the_base_and_learns() -> None:
    adapted = subject("lora_xs", awake=False, std=0.0)
    assert adapted.methods["default"].identity
    assert same_bits(logits(adapted.model, batch()), logits(base(), batch()))
    loss_of(adapted.model, batch()).backward()
    assert all(p.tensor.grad.abs().max() > 0 for p in adapted.params())


def check_only_the_core_learns() -> None:
    adapted = subject("lora_xs", awake=False, dropout=0.2)
    assert {p.role for p in adapted.params()} == {"R"}
    before = {k: v.clone() for k, v in adapted.tensors("default").items()}
    Run(adapted, total=8).steps(4)
    for key, value in adapted.tensors("default").items():
        assert same_bits(value, before[key]) == (not key.endswith(".R"))
    assert all(not b.delta.A.requires_grad and not b.delta.B.requires_grad for b in adapted.branches())


def check_the_gradient_of_the_core() -> None:
    """∂L/∂R = s · Bᵀ G Aᵀ with G that by the whole weight; sigma scales its columns, its rows, or both."""
    found = {}
    for side in SIDES:
        adapted = layer(xs(4, r_out=3, alpha=6.0, std=0.0, sigma=side))
        (branch,) = adapted.branches()
        W = whole(adapted)
        loss = (W - normal(10, 12, seed=7)).square().sum()
        (g_R,) = torch.autograd.grad(loss, branch.delta.R, retain_graph=True)
        (G,) = torch.autograd.grad(loss, W)
        assert far(g_R, 1.5 * branch.delta.B.T @ G @ branch.delta.A.T) < 1e-12
        found[side], S = g_R, torch.linalg.svdvals(branch.base.dense())
    assert far(found["A"] / S[:4], found["B"] / S[:3, None]) < 1e-10
    assert far(found["A"] / S[:4], found["split"] / (S[:3, None] * S[:4]).sqrt()) < 1e-10


def check_the_update_keeps_to_its_singular_directions() -> None:
    """U⊥ᵀ ΔW = 0 and ΔW V⊥ = 0 after training, by an SVD of our own."""
    for r_out in (None, 6, 2):
        adapted = subject("lora_xs", dtype=torch.float64, awake=False, sites=["q_proj", "down_proj"], r_out=r_out)
        Run(adapted, total=8, lr=1e-1).steps(5)
        for branch in adapted.branches():
            U, _, Vh = svd(branch.base.dense())
            change = branch.weight().detach()
            assert change.norm() > 1e-3
            assert (U[:, r_out or 4 :].T @ change).norm() < 1e-12 * change.norm()
            assert (change @ Vh[4:].T).norm() < 1e-12 * change.norm()


# --- what it learns -----------------------------------------------------------------------------------------------------------


def planted(rows: slice, cols: slice, seed: int = 5) -> Tensor:
    """A target between these left and right singular vectors of the layer's W."""
    U, _, Vh = svd(layer(xs()).branches()[0].base.dense())
    left, right = U[:, rows], Vh[cols]
    return left @ normal(left.shape[1], right.shape[0], seed=seed) @ right


def check_a_change_among_the_largest_directions_is_fitted() -> None:
    """With 16 values, fewer than LoRA's 22 at rank 1, which keeps Eckart and Young's error."""
    target = planted(slice(0, 4), slice(0, 4))
    assert fit(layer(xs(4)), target) < 1e-8
    floor = torch.linalg.svdvals(target)[1:].square().sum().item()
    assert floor > 1
    assert fit(layer(get_method("lora", r=1, sites="w")), target) == pytest.approx(floor, rel=1e-6)


def check_a_change_outside_them_is_never_learned() -> None:
    target = planted(slice(4, 10), slice(4, 12))
    assert fit(layer(xs(4)), target) == pytest.approx(target.square().sum().item(), rel=1e-8)
    one = planted(slice(9, 10), slice(11, 12))
    assert fit(layer(xs(4)), one) == pytest.approx(one.square().sum().item(), rel=1e-8)
    assert fit(layer(get_method("lora", r=1, sites="w")), one) < 1e-8, "which LoRA of rank 1 learns"


def check_a_rectangular_core_reaches_its_projection() -> None:
    target = normal(10, 12, seed=8)
    U, _, Vh = svd(layer(xs()).branches()[0].base.dense())
    for r_out in (1, 3, 10):
        floor = (target.square().sum() - (U[:, :r_out].T @ target @ Vh[:4].T).square().sum()).item()
        assert fit(layer(xs(4, r_out=r_out)), target) == pytest.approx(floor, rel=1e-8)


# --- files --------------------------------------------------------------------------------------------------------------------


def check_other_signs_elsewhere_change_nothing() -> None:
    """A machine whose SVD chooses other signs, or turns equal directions, loads the adapter as it was saved."""
    adapted = subject("lora_xs")
    want = logits(adapted.model, batch())
    own = lora_xs.principal
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as m:
        adapted.save(folder)
        m.setattr(lora_xs, "signed", lambda U, S, Vh: (U, S, Vh))
        m.setattr(lora_xs, "principal", lambda *a: (lambda U, S, Vh: (-U.flip(1), S, -Vh.flip(0)))(*own(*a)))
        again = lorakit.load(base(), folder)
        assert same_bits(logits(again.model, batch()), want)
        fresh = subject("lora_xs")
        assert any(not torch.equal(a.delta.A, b.delta.A) for a, b in zip(fresh.branches(), again.branches(), strict=True))


def check_signs_do_not_depend_on_the_build() -> None:
    """What the SVD leaves open is fixed, so a fresh start is the same with the same seed."""
    plain = subject("lora_xs", awake=False).tensors("default")
    own = lora_xs.principal
    with pytest.MonkeyPatch.context() as m:
        m.setattr(lora_xs, "principal", lambda *a: (lambda U, S, Vh: (-U, S, -Vh))(*own(*a)))
        turned = subject("lora_xs", awake=False).tensors("default")
    assert all(same_bits(plain[k], turned[k]) for k in plain)


def check_it_is_plain_lora() -> None:
    """B' = B R, A' = A: rank r, the same logits."""
    adapted = subject("lora_xs", sites=["all-linear", "embedding"], alpha=12.0)
    state, tensors = adapted.state(), {}
    for site in state.sites:
        t = state.of(site)
        tensors |= {f"{site.name}.A": t["A"], f"{site.name}.B": t["B"] @ t["R"]}
    lora = Adapter(Recipe("lora", {"r": 4, "alpha": 12.0}), state.sites, tensors)
    fresh = attach(base(), get_method("lora"), name="x").add("y", lora)
    assert far(logits(fresh.model, batch()), logits(adapted.model, batch())) < 1e-5
    assert far(logits(adapted.model, batch()), logits(base(), batch())) > 1e-3


# --- what is refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"r_out": 33}, "r_out=33 is not possible at site .* use 1 to 32"),
        ({"r_out": 0}, "r_out=0"),
        ({"r": 33, "sites": "q_proj"}, "r=33 exceeds"),
        ({"std": -1.0}, "std=-1.0"),
        ({"niter": -1}, "niter=-1"),
        ({"sigma": "C"}, "sigma='C'"),
    ],
)
def test_what_cannot_be_is_refused(kwargs: dict[str, Any], says: str) -> None:
    model = base()
    with pytest.raises(BadParameter, match=says):
        attach(model, get_method("lora_xs", **{"sites": "q_proj", **kwargs}))
    assert not any("lora" in name for name, _ in model.named_modules())


def test_a_rank_pattern_makes_cores_of_other_sizes() -> None:
    adapted = subject("lora_xs", rank_pattern={"q_proj": 2, "down_proj": 6}, alpha_pattern={"down_proj": 3.0}, alpha=4.0)
    sizes = {b.site.name.rsplit(".", 1)[-1]: (tuple(b.delta.R.shape), b.delta.s) for b in adapted.branches()}
    assert sizes["q_proj"] == ((2, 2), 2.0)
    assert sizes["down_proj"] == ((6, 6), 0.5)
    assert sizes["k_proj"] == ((4, 4), 1.0)


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("name", CHECKS)
def test_lora_xs(name: str) -> None:
    CHECKS[name]()


# --- mutants ------------------------------------------------------------------------------------------------------------------

Change = Callable[[pytest.MonkeyPatch], None]


def elsewhere(m: pytest.MonkeyPatch) -> None:
    """The triplets of a matrix near W."""
    own = lora_xs.principal
    m.setattr(lora_xs, "principal", lambda W, *rest: own(W + 0.1 * normal(*W.shape, seed=4).to(W.dtype) * W.std(), *rest))


def smallest(m: pytest.MonkeyPatch) -> None:
    """The smallest triplets."""
    m.setattr(
        lora_xs,
        "principal",
        lambda W, r, niter, rng: (lambda U, S, Vh: (U[:, -r:], S[-r:], Vh[-r:]))(*torch.linalg.svd(W, full_matrices=False)),
    )


def sides(**powers: tuple[float, float]) -> Change:
    return lambda m: m.setattr(lora_xs, "POWERS", {**lora_xs.POWERS, **powers})


def init_with(**parts: Any) -> Change:
    def change(m: pytest.MonkeyPatch) -> None:
        own = lora_xs.SingularFrames.__call__
        m.setattr(lora_xs.SingularFrames, "__call__", lambda self, *rest: own(dataclasses.replace(self, **parts), *rest))

    return change


def train_too(m: pytest.MonkeyPatch) -> None:
    """A learns as well."""
    own = lora_xs.Cored.product

    def product(self: Any, ctx: Any) -> Any:
        self.A += 1e-3
        return own(self, ctx)

    m.setattr(lora_xs.Cored, "product", product)


def forgets_the_scale(m: pytest.MonkeyPatch) -> None:
    own = lora_xs.Cored.product
    m.setattr(lora_xs.Cored, "product", lambda self, ctx: own(self, ctx)._replace(s=1.0))


def loses_its_frames(m: pytest.MonkeyPatch) -> None:
    """A and B are found again by the SVD of whoever loads."""

    def take(tensors: Any, values: Any) -> Any:
        fresh = {k: v for k, v in subject("lora_xs").tensors("default").items() if not k.endswith(".R")}
        return own(tensors, {**values, **fresh})

    own = attach_module.take_
    m.setattr(attach_module, "take_", take)


def turned_core(m: pytest.MonkeyPatch) -> None:
    """Forward multiplies by Rᵀ."""
    own = lora_xs.Cored.product
    m.setattr(lora_xs.Cored, "product", lambda self, ctx: own(self, ctx)._replace(B=self.B @ self.R.T))


MUTANTS: list[tuple[str, Change]] = [
    ("count", lambda m: m.setattr(lora_xs.CoredSpec, "core", lambda self, site: (self.rank.r, self.rank.r))),
    ("the_frames_are_ws_largest_triplets", elsewhere),
    ("the_frames_are_ws_largest_triplets", sides(A=(1.0, 0.0))),
    ("the_full_core_is_w_itself", sides(split=(1.0, 1.0))),
    ("randomized_frames", init_with(niter=0)),
    ("randomized_frames", smallest),
    ("the_start_is_almost_the_base", init_with(std=0.0)),
    ("the_start_is_almost_the_base", init_with(std=1e-2)),
    ("a_core_of_zeros_is_the_base_and_learns", init_with(std=1e-5)),
    ("only_the_core_learns", train_too),
    ("the_gradient_of_the_core", forgets_the_scale),
    ("the_gradient_of_the_core", sides(split=(0.0, 1.0))),
    ("the_update_keeps_to_its_singular_directions", elsewhere),
    ("a_change_among_the_largest_directions_is_fitted", smallest),
    ("a_change_outside_them_is_never_learned", elsewhere),
    ("a_rectangular_core_reaches_its_projection", lambda m: m.setattr(lora_xs.CoredSpec, "core", lambda self, site: (4, 4))),
    ("other_signs_elsewhere_change_nothing", loses_its_frames),
    ("signs_do_not_depend_on_the_build", lambda m: m.setattr(lora_xs, "signed", lambda *triplets: triplets)),
    ("it_is_plain_lora", turned_core),
]


@pytest.mark.parametrize(("name", "change"), MUTANTS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(MUTANTS)])
def test_a_mutant_is_seen(name: str, change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch)
    with pytest.raises(AssertionError):
        CHECKS[name]()


def test_every_check_has_a_mutant() -> None:
    assert {name for name, _ in MUTANTS} == set(CHECKS)
