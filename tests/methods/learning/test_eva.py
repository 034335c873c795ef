"""EVA's acceptance properties (arXiv:2410.07170)."""

import importlib
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor, nn

import lorakit
from lorakit import Adapted, BadParameter, Incompatible, attach, get_method
from lorakit.adapters.peft import to_peft
from lorakit.core.calibrate import Calibration, Seen
from lorakit.core.site import select
from lorakit.methods.learning import eva
from lorakit.methods.learning.eva import FromInputs, allocate, directions
from tests.laws import subject as laws
from tests.laws.steps import Run
from tests.laws.subject import attached, awaken, base, batch, far, logits, same_bits
from tests.methods.tools import gen, normal, teacher


def texts(n: int = 4) -> list[dict[str, Tensor]]:
    return [{"input_ids": batch(i), "labels": batch(i)} for i in range(n)]


def spread(**kwargs: Any) -> Adapted:
    """On a model whose sites differ enough for some to lose all their rank."""
    return attached(base(), get_method("eva", r=1, rho=8.0, **kwargs))


# --- directions -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("niter", [0, 8])
def test_directions_are_the_batch_svds(niter: int) -> None:
    """Up to sign, the top right singular vectors of X, and its squared singular values."""
    X = teacher(50, 40, [9.0, 7.0, 5.0, 4.0, 3.0]) + 0.02 * normal(50, 40, seed=3)
    V, variances = directions(X.T @ X, 5, niter, gen(0))
    _, S, Vh = torch.linalg.svd(X)
    torch.testing.assert_close((V @ Vh[:5].T).abs(), torch.eye(5, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(variances, S[:5].square(), rtol=1e-9, atol=0)


def test_directions_of_ids_are_the_commonest_ones() -> None:
    """One-hot inputs: the moment is diagonal, and its counts are all that is kept of it."""
    counts = torch.bincount(torch.tensor([3, 3, 3, 1, 1, 4, 3, 0]), minlength=6).double()
    V, variances = directions(counts, 2, 0, gen(0))
    want, same = directions(torch.diag(counts), 2, 0, gen(0))
    assert torch.equal(V, want)
    assert torch.equal(variances, same)
    assert variances.tolist() == [4, 2]


def test_a_starts_at_the_inputs_directions() -> None:
    """Through attach: A Aᵀ = I, and A's rows are the top right singular vectors of what the site is called with."""
    check_start()


def check_start() -> None:
    model, labels = base(dtype=torch.float64), batch(0)
    labels[0, 4:] = -100
    shown = [{"input_ids": batch(0), "labels": labels}, *texts()[1:2]]
    adapted = attach(model, get_method("eva", r=3, rho=1.0, niter=0), calibration=shown)
    assert not any(b.weight().any() for b in adapted.branches())
    for branch in adapted.branches():
        kept: list[Tensor] = []
        handle = branch.host.module.register_forward_hook(lambda m, args, out, kept=kept: kept.append(args[0]))
        for b in shown:
            model(input_ids=b["input_ids"])
        handle.remove()
        X = torch.cat([x[b["labels"] != -100] for x, b in zip(kept, shown, strict=True)])
        V = torch.linalg.svd(X.detach()).Vh[:3]
        torch.testing.assert_close(branch.delta.A @ branch.delta.A.T, torch.eye(3, dtype=torch.float64), atol=1e-9, rtol=0)
        torch.testing.assert_close((branch.delta.A @ V.T).abs(), torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0)
        assert not branch.delta.B.any()


def test_sites_with_one_input_share_its_directions() -> None:
    a = attached(base(), get_method("eva", r=3, rho=1.0)).tensors("default")
    q, k, v = (a[f"model.layers.0.self_attn.{name}.A"] for name in ("q_proj", "k_proj", "v_proj"))
    assert same_bits(q, k)
    assert same_bits(q, v)


def test_whitening_and_centering() -> None:
    X = normal(30, 8) * torch.arange(8, 0, -1) + 5
    site = select(nn.ModuleDict({"w": nn.Linear(8, 6)}), "w")
    seen = {"w": Seen(X.T @ X, 30, None, X.sum(0))}
    rank = lorakit.core.scale.Rank.of(4, 4.0)
    centered = X - X.mean(0)
    for center, rows in ((False, X), (True, centered)):
        S, Vh = torch.linalg.svd(rows)[1:]
        plain = FromInputs(rank, 1.0, center=center, niter=0).fit(seen, site).rows["w"]
        white = FromInputs(rank, 1.0, center=center, niter=0, whiten=True).fit(seen, site).rows["w"]
        torch.testing.assert_close((plain @ Vh[:4].T).abs(), torch.eye(4, dtype=torch.float64), atol=1e-9, rtol=0)
        torch.testing.assert_close(white, plain / S[:4, None].sqrt())


# --- ranks ----------------------------------------------------------------------------------------------------------------------


def test_ranks_go_where_the_variance_is() -> None:
    check_allocation()


def check_allocation() -> None:
    shares = {
        "a": torch.tensor([0.5, 0.3, 0.1, 0.05]),
        "b": torch.tensor([0.2, 0.2, 0.2, 0.2]),
        "c": torch.tensor([0.04, 0.03, 0.02, 0.01]),
    }
    assert allocate(shares, 6) == {"a": 2, "b": 4, "c": 0}
    assert allocate(shares, 7) == {"a": 3, "b": 4, "c": 0}
    assert all(sum(allocate(shares, n).values()) == n for n in range(13))
    best = max(
        shares["a"][:i].sum() + shares["b"][:j].sum() + shares["c"][: 5 - i - j].sum()
        for i in range(5)
        for j in range(5)
        if 1 <= i + j <= 5
    )
    kept = allocate(shares, 5)
    assert sum(shares[k][:n].sum() for k, n in kept.items()) == pytest.approx(best.item())


def test_ties_go_to_the_earlier_site() -> None:
    same = torch.tensor([0.5, 0.25, 0.25])
    assert allocate({"q": same, "k": same, "v": same}, 4) == {"q": 2, "k": 1, "v": 1}
    assert allocate({"q": same, "k": same, "v": same}, 5) == {"q": 3, "k": 1, "v": 1}


def test_the_sum_of_ranks_is_kept_and_so_is_the_scale() -> None:
    check_ranks()


def check_ranks() -> None:
    adapted = spread(alpha=6.0, rank_pattern={"down_proj": 3}, alpha_pattern={"q_proj": 2.0})
    sites = select(base(), "all-linear")
    ranks = {b.site.name: len(b.delta.A) for b in adapted.branches()}
    assert sum(ranks.values()) == len(sites) - 2 + 2 * 3
    assert len(ranks) < len(sites), "no site lost its rank: the test shows nothing"
    assert max(ranks.values()) > 1
    for branch in adapted.branches():
        d = branch.delta
        assert d.A.shape[0] == d.B.shape[1] == d.r > 0
        assert d.s == {"q_proj": 2.0, "down_proj": 2.0}.get(branch.site.name.rsplit(".", 1)[-1], 6.0)


def test_rho_1_keeps_ranks_uniform() -> None:
    adapted = attached(base(), get_method("eva", r=3, rho=1.0, rank_pattern={"up_proj": 2}))
    assert {len(b.delta.A) for b in adapted.branches() if b.site.role != "up"} == {3}
    assert {len(b.delta.A) for b in adapted.branches() if b.site.role == "up"} == {2}


def test_a_site_without_rank_is_left_out() -> None:
    adapted = spread()
    left = {b.site.name for b in adapted.branches()}
    for site in select(base(), "all-linear"):
        module = adapted.model.get_submodule(site.module)
        assert hasattr(module, "lora") == (site.name in left)
        assert (type(module) is nn.Linear) == (site.name not in left)
    assert {s.name for s in adapted.state().sites} == left
    want = adapted.detach()
    assert all(type(want.get_submodule(s.module)) is nn.Linear for s in select(base(), "all-linear"))


def test_it_is_saved_loaded_merged_and_exported_with_its_ranks() -> None:
    adapted = awaken(spread())
    want, tensors = logits(adapted.model, batch()), adapted.tensors("default")
    with tempfile.TemporaryDirectory() as folder:
        adapted.save(f"{folder}/own")
        again = lorakit.load(base(), f"{folder}/own")
        to_peft(adapted.state(), f"{folder}/peft", model=base())
        with warnings.catch_warnings(action="ignore"):
            theirs = peft.PeftModel.from_pretrained(base(), f"{folder}/peft").eval()
    assert all(same_bits(v, tensors[k]) for k, v in again.tensors("default").items())
    assert same_bits(logits(again.model, batch()), want)
    assert [b.delta.s for b in again.branches()] == [b.delta.s for b in adapted.branches()]
    assert far(logits(theirs, batch()), want) < 1e-5
    assert far(logits(adapted.merge(), batch()), want) < 1e-5
    adapted.unmerge()
    assert same_bits(logits(adapted.model, batch()), want)


def test_a_run_is_resumed_with_its_ranks() -> None:
    """The resumed run calibrates anew, on other data even, and takes the saved shapes."""
    whole, half = Run(spread(), total=6).steps(4), Run(spread(), total=6).steps(2)
    resumed = Run(spread(), total=6).restore(half.state()).steps(2)
    want, got = whole.adapted.tensors("default"), resumed.adapted.tensors("default")
    assert all(same_bits(got[k], want[k]) for k in want)


LAWS = {
    "test_l0_detach": ["check_L0"],
    "test_l1_start": ["check_L1", "check_L1_half"],
    "test_l2_l3_weight": ["check_L2", "check_L3"],
    "test_l4_merge": ["check_L4"],
    "test_l5_files": ["check_L5", "check_L5_peft"],
    "test_l6_l7_l8_trained": ["check_L7"],
    "test_l9_oracle": ["check_L9"],
    "test_l12_l13_replay": ["check_L13"],
    "test_l14_checkpointing": ["check_L14"],
    "test_l18_l19_l20_isolation": ["check_L18", "check_L20"],
}


@pytest.mark.parametrize(("file", "check"), [(file, check) for file, checks in LAWS.items() for check in checks])
def test_the_laws_hold_with_ranks_that_follow_from_data(file: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tests/laws rho is 1, since L6 counts parameters and L12 compares sites without seeing data."""
    monkeypatch.setitem(laws.SMALL, "rho", 2.0)
    getattr(importlib.import_module(f"tests.laws.{file}"), check)("eva")


# --- what it is good for, and what not ------------------------------------------------------------------------------------------


def rows_of(X: Tensor, r: int) -> Tensor:
    return directions(X.T @ X, r, 0, gen(0))[0]


def test_it_catches_more_of_the_inputs_than_any_other_start() -> None:
    """Σ ‖A x‖², and with it the expected gradient of B under residuals without structure, is the largest of all orthonormal A."""
    X = normal(100, 16) * torch.linspace(3, 0.1, 16)
    A = rows_of(X, 4)
    others = [torch.linalg.qr(normal(16, 4, seed=i)).Q.T for i in range(30)]
    caught = [(X @ other.T).square().sum() for other in others]
    assert (X @ A.T).square().sum() > 1.2 * max(caught)


def regression(name: str, X: Tensor, target: Tensor, *, steps: int = 200, lr: float = 0.05, **kwargs: Any) -> float:
    """The loss left after descent from W = 0, relative to the start's."""
    host = nn.Linear(X.shape[1], target.shape[0], bias=False).double()
    nn.init.zeros_(host.weight)

    def loss(model: nn.Module) -> Tensor:
        return (model.w(X) - X @ target.T).square().sum() / len(X)

    data = Calibration([{"x": X}], lambda model, shown: (loss(model), 1))
    adapted = attach(nn.ModuleDict({"w": host}), get_method(name, sites="w", **kwargs), calibration=data)
    optimizer, first = torch.optim.SGD([p.tensor for p in adapted.params()], lr=lr), loss(adapted.model).item()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(adapted.model).backward()
        optimizer.step()
    return loss(adapted.model).item() / first


def test_it_wins_where_the_inputs_lie_in_a_subspace() -> None:
    """Two of 32 dimensions carry the inputs: EVA starts in them, LoRA's random A hardly sees them."""
    X = normal(50, 2) @ torch.linalg.qr(normal(32, 2, seed=1)).Q.T
    target = normal(8, 32, seed=2)
    left = {name: regression(name, X, target, r=2, alpha=2.0, steps=60) for name in ("eva", "lora")}
    assert left["eva"] < 1e-3 * left["lora"]


def test_it_loses_where_the_signal_has_little_variance() -> None:
    """All of the loss is in a direction that A does not see, exactly: B's gradient is zero, A's as B is, and nothing is ever learned."""
    X = torch.linalg.qr(normal(60, 8)).Q * torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0])
    target = torch.zeros(5, 8, dtype=torch.float64)
    target[:, 7] = 1.0
    kwargs = {"r": 2, "alpha": 2.0, "steps": 400, "lr": 0.2}
    assert regression("eva", X, target, **kwargs) == pytest.approx(1.0, abs=1e-6)
    assert regression("lora", X, target, **kwargs) < 0.5


# --- against PEFT ---------------------------------------------------------------------------------------------------------------


def test_centered_it_is_pefts() -> None:
    """PEFT's incremental PCA of one batch, by a randomized SVD: the same subspaces and the same ranks."""
    model = base()
    shown = {"input_ids": batch(rows=8, length=16), "labels": batch(rows=8, length=16)}
    config = peft.LoraConfig(
        r=3, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0)
    )
    with warnings.catch_warnings(action="ignore"):
        theirs = get_eva_state_dict(model, [shown], config, show_progress_bar=False)
    adapted = attach(model, get_method("eva", r=3, sites=["q_proj", "o_proj", "down_proj"], center=True), calibration=[shown])
    ours = {b.site.name: b.delta.A.detach() for b in adapted.branches()}
    assert {k: len(v) for k, v in theirs.items() if len(v)} == {k: len(v) for k, v in ours.items()}
    for name, A in ours.items():
        assert torch.linalg.svdvals(A @ theirs[name].to(A.dtype).T).min() > 0.99, name


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(Incompatible, match="more calibration batches"):
        attach(base(), get_method("eva", r=16, sites="q_proj"), calibration=texts(1))
    for wrong in ({"rho": 0.5}, {"niter": -1}, {"batches": -1}):
        with pytest.raises(BadParameter, match="rho"):
            get_method("eva", **wrong)


def _takes_the_least(m: pytest.MonkeyPatch) -> None:
    real = eva.directions
    m.setattr(eva, "directions", lambda M, k, niter, rng: tuple(t.flip(0) for t in real(M, len(M), niter, rng)))


def _keeps_the_uniform_ranks(m: pytest.MonkeyPatch) -> None:
    m.setattr(eva, "allocate", lambda shares, budget: {name: budget // len(shares) for name in shares})


def _counts_all_tokens(m: pytest.MonkeyPatch) -> None:
    m.setattr(eva, "TARGET_INPUTS", "inputs")
    m.setattr(eva.FromInputs, "__init__", lambda self, *args, real=eva.FromInputs.__init__: real(self, *args, needs=frozenset({"inputs"})))


def _scales_by_the_new_rank(m: pytest.MonkeyPatch) -> None:
    real = lorakit.core.lowrank.LowRank.resize

    def resize(self: Any, r: int, optimizer: Any = None) -> None:
        self.s *= self.r / max(1, r)
        real(self, r, optimizer)

    m.setattr(lorakit.core.lowrank.LowRank, "resize", resize)


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (_takes_the_least, check_start),
        (_counts_all_tokens, check_start),
        (_keeps_the_uniform_ranks, check_ranks),
        (_scales_by_the_new_rank, check_ranks),
    ],
)
def test_mutants_are_seen(change: Callable[[pytest.MonkeyPatch], None], check: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch)
    with pytest.raises(AssertionError):
        check()
