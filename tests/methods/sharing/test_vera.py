"""VeRA's acceptance properties (arXiv:2310.11454). Every check below is shown able to fail by a mutant at the end."""

import copy
import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lorakit
from lorakit import BadParameter, attach, get_method
from lorakit.adapters.drop import without_first
from lorakit.adapters.io import load_adapter, save_adapter
from lorakit.methods.sharing import vera
from lorakit.ops import reference
from tests.adapters import test_trajectory_peft as trajectory
from tests.adapters.subject import quiet
from tests.laws.steps import Run
from tests.laws.subject import awaken, base, batch, far, logits, loss_of, not_fused, same_bits, subject
from tests.methods.tools import fit, layer, normal, teacher


def of(r: int = 6, **kwargs: Any) -> Any:
    return get_method("vera", **{"r": r, "sites": "w", **kwargs})


# --- one pair -----------------------------------------------------------------------------------------------------------------


def check_count() -> None:
    """Σ (d_out + r): 416 for 128 → 128 and 128 → 256 at r = 16; the pair is no parameter."""
    model = nn.ModuleDict({"a": nn.Linear(128, 128), "b": nn.Linear(128, 256)})
    adapted = attach(model, get_method("vera", r=16, sites=["a", "b"]))
    assert adapted.params().numel() == 416
    assert {p.name.rpartition(".")[2] for p in adapted.params()} == {"d", "b"}
    assert not any(p.shape in {(16, 128), (256, 16)} for p in model.parameters())


def check_one_pair_is_held_once() -> None:
    """In memory, in the optimizer and in the file, and no step moves it."""
    adapted = subject("vera", awake=False, r=8)
    (pool,) = adapted.shared("default").values()
    before = pool.A.clone(), pool.B.clone()
    run = Run(adapted, total=8).steps(3)
    assert torch.equal(pool.A, before[0])
    assert torch.equal(pool.B, before[1])
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert not {id(pool.A), id(pool.B)} & held
    wide = [name for name, t in [*adapted.model.named_parameters(), *adapted.model.named_buffers()] if t.shape in {(8, 64), (64, 8)}]
    assert sorted(wide) == ["lora_shared.default.pool.A", "lora_shared.default.pool.B"]
    tensors = adapted.state().tensors
    assert sorted(k for k in tensors if "pool" in k) == ["lora_shared.pool.A", "lora_shared.pool.B"]
    assert tensors["lora_shared.pool.A"].shape == (8, 64), "the largest d_in of all sites"


def check_equal_vectors_give_equal_changes() -> None:
    """At sites of one shape; at a smaller site the same change's corner."""
    adapted = subject("vera", sites=["q_proj", "up_proj", "down_proj"], r=8)
    by_name = {b.site.name: b.delta for b in adapted.branches()}
    d, b = normal(8, dtype=torch.float32), normal(64, seed=1, dtype=torch.float32)
    with torch.no_grad():
        for delta in by_name.values():
            delta.d.copy_(d)
            delta.b.copy_(b[: len(delta.b)])
    first, second = (by_name[f"model.layers.{i}.self_attn.q_proj"].weight() for i in (0, 1))
    assert same_bits(first, second)
    up, down = (by_name[f"model.layers.0.mlp.{name}_proj"].weight() for name in ("up", "down"))
    assert far(up[:32], first) < 1e-6
    assert far(down[:, :32], first) < 1e-6


def check_the_pair_is_pefts() -> None:
    """Bit for bit for the same key, r and sizes; for another key another one."""
    for key, r in ((0, 4), (7, 4), (7, 5)):
        model = base()
        config = peft.VeraConfig(r=r, projection_prng_key=key, target_modules=["q_proj", "up_proj", "down_proj"])
        with quiet():
            theirs = peft.get_peft_model(base(), config)
        adapted = attach(model, get_method("vera", r=r, projection_prng_key=key, sites=["q_proj", "up_proj", "down_proj"]))
        (pool,) = adapted.shared("default").values()
        assert same_bits(pool.A, theirs.base_model.vera_A["default"])
        assert same_bits(pool.B, theirs.base_model.vera_B["default"])
        assert pool.A.abs().max() <= (6 / 64) ** 0.5 < 1.1 * pool.A.abs().max()  # fan_in is that of the whole shared matrix
        assert pool.B.abs().max() <= (6 / r) ** 0.5 < 1.1 * pool.B.abs().max()


# --- the update ---------------------------------------------------------------------------------------------------------------


def check_the_start_is_the_base_and_learns() -> None:
    """b = 0 is the base's output bit for bit; d's gradient comes with b's first step."""
    for arch, sites in (("llama", "all-linear"), ("llama", "embedding"), ("gpt2", ["c_attn[q]", "c_fc"])):
        adapted = subject("vera", arch, awake=False, sites=sites, d_initial=0.3)
        assert same_bits(logits(adapted.model, batch()), logits(base(arch), batch()))
        assert all((b.delta.d == 0.3).all() and not b.delta.b.any() for b in adapted.branches())
        loss_of(adapted.model, batch()).backward()
        assert all(p.tensor.grad.abs().max() > 0 for p in adapted.params() if p.role == "b")
        assert not any(p.tensor.grad.any() for p in adapted.params() if p.role == "d")
        Run(adapted, total=8).steps(2)
        assert all(((b.delta.d - 0.3).abs() > 0).all() for b in adapted.branches())


def check_the_change_and_its_factors() -> None:
    """ΔW = diag(b) B diag(d) A, of rank at most r; as plain LoRA A' is the shared one."""
    adapted = awaken(layer(of(3)))
    (branch,) = adapted.branches()
    (pool,) = adapted.shared("default").values()
    want = torch.diag(branch.delta.b) @ pool.B @ torch.diag(branch.delta.d) @ pool.A
    assert far(branch.delta.weight(), want) < 1e-12
    assert int(torch.linalg.matrix_rank(want)) == 3 == branch.delta.bound()
    f = branch.delta.factors()
    assert f.A.data_ptr() == pool.A.data_ptr()
    assert far(f.s * f.B @ f.A, want) < 1e-12
    assert layer(of(256)).branches()[0].delta.bound() == 10, "whatever r is"
    x = normal(2, 4, 12)
    assert far(branch.delta(x, None), x @ want.T) < 1e-12


# --- files --------------------------------------------------------------------------------------------------------------------


def check_the_pair_need_not_be_saved() -> None:
    """The same logits from the key; the file holds vectors, and an empty tensor that says the sizes."""
    adapted = subject("vera", r=8, save_projection=False, projection_prng_key=5)
    want = logits(adapted.model, batch())
    with tempfile.TemporaryDirectory() as folder:
        adapted.save(folder)
        state = load_adapter(folder)
        assert {k for k in state.tensors if "pool" in k} == {"lora_shared.pool.drawn"}
        assert state.tensors["lora_shared.pool.drawn"].shape == (0, 64, 64)
        assert sum(t.numel() for t in state.tensors.values()) == adapted.params().numel()
        again = lorakit.load(base(), folder)
    assert same_bits(logits(again.model, batch()), want)


def check_a_part_of_the_sites_keeps_the_pair_of_all() -> None:
    """Dropped layers may have been the largest ones."""
    for save in (True, False):
        model = base("llama", intermediate_size=48)
        adapted = awaken(attach(model, get_method("vera", r=4, save_projection=save, sites=["0.mlp.up_proj", "1.self_attn.q_proj"])))
        want = next(b.delta.weight() for b in adapted.branches() if b.site.layer == 1)
        state = without_first(adapted.state(), 1)
        assert len(state.sites) == 1
        assert same_bits(state.deltas()[state.sites[0].name].weight(), want)
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(state, folder)
            again = lorakit.load(base("llama", intermediate_size=48), folder)
        assert same_bits(again.branches()[0].delta.weight(), want)


@pytest.mark.slow
def test_a_fresh_process_draws_the_same_pair(tmp_path: Path) -> None:
    adapted = subject("vera", r=8, save_projection=False, projection_prng_key=5)
    adapted.save(tmp_path / "a")
    script = (
        "import sys, torch, lorakit; from lorakit.data.tiny import tiny_model\n"
        "m = lorakit.load(tiny_model('llama'), sys.argv[1]).model\n"
        "ids = torch.load(sys.argv[2])\n"
        "with torch.no_grad(): torch.save(m(input_ids=ids).logits, sys.argv[3])\n"
    )
    torch.save(batch(), tmp_path / "ids")
    subprocess.run([sys.executable, "-c", script, *(str(tmp_path / n) for n in ("a", "ids", "out"))], check=True, timeout=120)
    assert same_bits(torch.load(tmp_path / "out"), logits(adapted.model, batch()))


@pytest.mark.parametrize("shape", [(0, 64), (0, 64, 2**40), (0, 8, 64), (1, 64, 64)])
def test_an_empty_tensor_cannot_ask_for_what_the_sites_do_not_have(shape: tuple[int, ...]) -> None:
    state = subject("vera", r=4, save_projection=False).state()
    tensors = {**state.tensors, "lora_shared.pool.drawn": torch.empty(shape, device="meta" if 1 in shape else "cpu")}
    with pytest.raises(lorakit.AdapterMismatch, match="drawn has shape"):
        attach(base(), get_method("lora", r=2)).add("ill", dataclasses.replace(state, tensors=tensors))


# --- what it learns -----------------------------------------------------------------------------------------------------------


def check_a_scaling_of_the_pair_is_found_where_lora_of_its_size_fails() -> None:
    """A change of rank 6 from 16 values; LoRA of rank 1 has 22 and keeps the tail of the spectrum."""
    adapted = layer(of())
    (branch,) = adapted.branches()
    (pool,) = adapted.shared("default").values()
    target = ((normal(10, seed=3) + 2)[:, None] * pool.B) @ ((normal(6, seed=4) + 2)[:, None] * pool.A)
    with torch.no_grad():
        branch.delta.b.fill_(1.0)
    assert fit(adapted, target) < 1e-8
    floor = torch.linalg.svdvals(target)[1:].square().sum().item()
    assert fit(layer(get_method("lora", r=1, sites="w")), target) == pytest.approx(floor, rel=1e-6)
    assert floor > 0.3 * target.square().sum().item()


def check_a_spike_outside_the_pair_is_never_learned() -> None:
    """Rank 1 in a direction of its own: the rows of ΔW stay in the row space of A, so that at least its part outside is left."""
    target = teacher(10, 12, [3.0])
    adapted = layer(of(2))
    (branch,) = adapted.branches()
    with torch.no_grad():
        branch.delta.b.fill_(0.1)
    A = branch.delta.pair()[0]
    outside = target @ (torch.eye(12, dtype=torch.float64) - A.T @ torch.linalg.solve(A @ A.T, A))
    left = fit(adapted, target)
    assert left >= outside.square().sum().item() * (1 - 1e-9)
    assert left > 0.5 * 9
    assert fit(layer(get_method("lora", r=1, sites="w")), target) < 1e-8


# --- beside PEFT --------------------------------------------------------------------------------------------------------------


def counterparts(adapted: Any, theirs: Any) -> list[tuple[Tensor, Tensor]]:
    named = dict(theirs.named_parameters())
    rows = [(row.tensor, row.name.rpartition(".")) for row in adapted.params()]
    pairs = [(t, named[f"base_model.model.{site}.vera_lambda_{short}.default"]) for t, (site, _, short) in rows]
    assert len(pairs) == sum(p.requires_grad for p in named.values())
    return pairs


def check_the_trajectory_of_pefts(arch: str = "gpt_neox") -> None:
    """50 steps in fp64 from the same start, to 1e-9."""
    model, targets = trajectory.base(arch), trajectory.TARGETS[arch]
    with quiet():
        theirs = peft.get_peft_model(copy.deepcopy(model), peft.VeraConfig(r=6, target_modules=targets)).double().train()
    adapted = attach(model.train(), get_method("vera", r=6, sites=targets))
    pairs = counterparts(adapted, theirs)
    with torch.no_grad():
        for ours, other in pairs:
            assert (ours - other).abs().max() < 1e-8  # PEFT's 0.1 is fp32's
            assert ours.dtype == other.dtype == torch.float64
            other.copy_(ours)
    losses, wanted = trajectory.train_ours(adapted, adapted.methods["default"]), trajectory.train_theirs(theirs)
    assert wanted[-1] < wanted[0] - 0.1
    assert max(abs(a - b) for a, b in zip(losses, wanted, strict=True)) <= trajectory.TOLERANCE
    assert max((a - b).abs().max().item() for a, b in pairs) <= trajectory.TOLERANCE


# --- the rest -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kwargs", "says"), [({"r": 0}, "r=0"), ({"dropout": 1.0}, "dropout=1.0"), ({"r": "many"}, "r='many'")])
def test_what_cannot_be_is_refused(kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(BadParameter, match=says):
        get_method("vera", **kwargs)


def test_a_copy_of_the_model_has_a_pair_of_its_own() -> None:
    adapted = subject("vera", r=4, sites="q_proj")
    other = copy.deepcopy(adapted.model)
    want = logits(other, batch())
    (pool,) = adapted.shared("default").values()
    pool.A.zero_()
    assert torch.equal(logits(other, batch()), want)
    assert not torch.equal(logits(adapted.model, batch()), want)


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("name", CHECKS)
def test_vera(name: str) -> None:
    CHECKS[name]()


def test_the_trajectory_on_conv1d() -> None:
    check_the_trajectory_of_pefts("gpt2")


# --- mutants ------------------------------------------------------------------------------------------------------------------

Change = Callable[[pytest.MonkeyPatch], None]


def drawn(change: Callable[[Callable[..., Any], int, int, int, int], Any]) -> Change:
    """The pair drawn otherwise."""
    own = vera.projections
    return lambda m: m.setattr(vera, "projections", lambda *arguments: change(own, *arguments))


def at_every_site(m: pytest.MonkeyPatch) -> None:
    """Sites hold copies of their corner, registered."""

    def build(self: Any, site: Any, *, pool: Any, dtype: Any, device: Any) -> Any:
        delta = vera.Scaling(site, self, pool, dtype=dtype, device=device)
        delta.register_buffer("A", pool.A.clone())
        return delta

    m.setattr(vera.VectorSpec, "build", build)


def forward(change: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]) -> Change:
    def changed(m: pytest.MonkeyPatch) -> None:
        not_fused(m)
        m.setattr(vera, "scaled", change)

    return changed


def without_fit(m: pytest.MonkeyPatch) -> None:
    m.setattr(vera.Projections, "fit", lambda self, shapes: None)


def last_columns(self: Any) -> tuple[Tensor, Tensor]:
    (pool,) = self.pools
    return pool.A[:, -self.shape[1] :], pool.B[: self.shape[0]]


SPIKE = torch.linalg.svd(teacher(10, 12, [3.0])).Vh[:1]
"""The row space of the teacher."""

MUTANTS: list[tuple[str, Change]] = [
    ("count", lambda m: m.setattr(vera.Scaling, "trains", frozenset({"d"}))),
    ("one_pair_is_held_once", at_every_site),
    ("equal_vectors_give_equal_changes", lambda m: m.setattr(vera.Scaling, "pair", last_columns)),
    ("the_pair_is_pefts", drawn(lambda own, r, d_in, d_out, key: tuple(t * (1 + 1e-7) for t in own(r, d_in, d_out, key)))),
    ("the_pair_is_pefts", drawn(lambda own, r, d_in, d_out, key: own(r, d_in, d_out, key + 1))),
    ("the_pair_is_pefts", drawn(lambda own, r, d_in, d_out, key: (own(r, d_in, d_out, key)[0], own(r, 1, d_out, key)[1]))),
    ("the_start_is_the_base_and_learns", lambda m: m.setattr(vera.Vectors, "__call__", lambda *_: None)),
    ("the_change_and_its_factors", forward(lambda x, A, d, B, b: (x @ A.T) @ (b[:, None] * B).T)),
    ("the_change_and_its_factors", lambda m: m.setattr(vera.Scaling, "bound", lambda self: len(self.d))),
    ("the_pair_need_not_be_saved", drawn(lambda own, r, d_in, d_out, key: (torch.rand(r, d_in), torch.rand(d_out, r)))),
    ("a_part_of_the_sites_keeps_the_pair_of_all", without_fit),
    ("a_scaling_of_the_pair_is_found_where_lora_of_its_size_fails", forward(lambda x, A, d, B, b: (x @ A.T) @ (b[:, None] * B).T)),
    ("a_spike_outside_the_pair_is_never_learned", forward(lambda x, A, d, B, b: (x @ SPIKE.T) @ b[None])),
    ("the_trajectory_of_pefts", drawn(lambda own, r, d_in, d_out, key: tuple(t * (1 + 1e-6) for t in own(r, d_in, d_out, key)))),
    ("the_trajectory_of_pefts", forward(lambda x, A, d, B, b: reference.scaled(x, A, d.detach(), B, b))),
]


@pytest.mark.parametrize(("name", "change"), MUTANTS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(MUTANTS)])
def test_a_mutant_is_seen(name: str, change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch)
    with pytest.raises((AssertionError, lorakit.LorakitError, RuntimeError)):
        CHECKS[name]()


def test_every_check_has_a_mutant() -> None:
    assert {name for name, _ in MUTANTS} == set(CHECKS)
