"""MELoRA's acceptance properties (arXiv:2402.17263). Every check below is shown able to fail by a mutant at the end."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from lorakit import Adapter, BadParameter, Site, attach, get_method
from lorakit.core.method import Recipe
from lorakit.methods.bottleneck import melora
from tests.adapters import test_trajectory_peft as trajectory
from tests.adapters.subject import quiet
from tests.laws.steps import Run
from tests.laws.subject import awaken, base, batch, far, logits, loss_of, not_fused, same_bits, subject
from tests.methods.tools import fit, layer, normal, teacher


def mini(n: int = 2, r: int = 2, **kwargs: Any) -> Any:
    return get_method("melora", r=r, n=n, alpha=2.0 * r, sites="w", **kwargs)


def on_diagonal(n: int, d_out: int, d_in: int) -> Tensor:
    """True inside the n diagonal blocks."""
    return torch.block_diag(*[torch.ones(d_out // n, d_in // n)] * n).bool()


# --- size and shape -----------------------------------------------------------------------------------------------------------


def check_count() -> None:
    site = Site("w", "linear", 24, 24, None, "other")
    assert {get_method("melora", r=2, n=n).count([site]) for n in (1, 2, 4, 8)} == {96}
    assert get_method("lora", r=8).count([site]) == 384, "what the same rank costs LoRA"
    adapted = layer(mini(n=4), d_in=24, d_out=24)
    assert adapted.params().numel() == 96
    assert adapted.branches()[0].delta.bound() == 8


def check_rank() -> None:
    for n in (1, 2, 4):
        (branch,) = awaken(layer(mini(n=n), d_in=16, d_out=24)).branches()
        assert int(torch.linalg.matrix_rank(branch.weight())) == branch.delta.bound() == 2 * n


def check_off_the_blocks_is_zero() -> None:
    adapted = layer(mini(n=3), d_out=9)
    Run(adapted, total=6, data=lambda i: normal(5, 12, seed=i), loss=lambda m, x: (m.w(x) - 1).square().mean()).steps(5)
    change = adapted.branches()[0].weight().detach()
    assert torch.equal(change[~on_diagonal(3, 9, 12)], torch.zeros(9 * 12 * 2 // 3, dtype=torch.float64))
    assert change[on_diagonal(3, 9, 12)].count_nonzero() == 9 * 12 // 3


def check_forward_is_the_block_diagonal_matrix() -> None:
    """Of inputs of one, two and three dimensions, and of ids."""
    (branch,) = awaken(layer(mini(n=2))).branches()
    d = branch.delta
    blocks = [d.s * d.B[rows] @ d.A[:, cols] for rows, cols in ((slice(5), slice(6)), (slice(5, 10), slice(6, 12)))]
    W = torch.block_diag(*blocks)
    for x in (normal(12), normal(3, 12), normal(2, 3, 12)):
        torch.testing.assert_close(d(x, None), x @ W.T)
    ids = torch.arange(12).view(3, 4)
    torch.testing.assert_close(d(ids, None), W.T[ids])


def check_the_start() -> None:
    """Each mini is a LoRA of its own: Kaiming by its d_in / n inputs, and zero."""
    adapted = layer(mini(n=4, r=8), d_in=400, d_out=400)
    d = adapted.branches()[0].delta
    bound = (4 / 400) ** 0.5
    assert 0.95 * bound < d.A.abs().max() <= bound
    assert d.A.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not d.B.any()
    assert d.s == 2.0


# --- one mini is LoRA ---------------------------------------------------------------------------------------------------------


def check_one_mini_is_lora() -> None:
    """Bit for bit: the start, outputs under dropout, gradients, tensors after steps, the merged weight; at an embedding too. Not fused: the
    fused function, which minis have no use for, rounds in another order."""
    with pytest.MonkeyPatch.context() as m:
        not_fused(m)
        _check_one_mini_is_lora()


def _check_one_mini_is_lora() -> None:
    for arch, sites in (("llama", ["all-linear", "embedding"]), ("gpt2", ["c_attn[q]", "mlp"])):
        runs = []
        for name, more in (("lora", {}), ("melora", {"n": 1})):
            method = get_method(name, r=4, dropout=0.25, sites=sites, rank_pattern={"c_fc|up_proj": 2}, **more)
            adapted = attach(base(arch), method)
            found = dict(adapted.tensors("default").items())
            found = {f"start {k}": v.clone() for k, v in found.items()}
            with adapted.given(step=3):
                loss = loss_of(adapted.model.train(), batch())
            loss.backward()
            found |= {f"grad {p.name}": p.tensor.grad.clone() for p in adapted.params()}
            adapted.model.zero_grad()
            Run(adapted, total=6).steps(3)
            found |= adapted.tensors("default") | {"logits": logits(adapted.model.eval(), batch())}
            found |= {f"change {b.site.name}": b.weight().detach() for b in adapted.branches()}
            runs.append(found)
        assert runs[0].keys() == runs[1].keys()
        for key, value in runs[0].items():
            assert same_bits(value, runs[1][key]), (arch, key)


# --- what it learns -----------------------------------------------------------------------------------------------------------


def check_a_teacher_on_the_blocks_is_fitted() -> None:
    """Rank 4 on the blocks with the parameters of rank 2, where LoRA of rank 2 keeps Eckart and Young's error."""
    target = torch.block_diag(teacher(5, 6, [3.0, 1.0], seed=1), teacher(5, 6, [2.0, 1.5], seed=3))
    assert fit(layer(mini(n=2)), target) < 1e-8
    floor = 1.5**2 + 1.0**2
    assert fit(layer(get_method("lora", r=2, sites="w")), target) == pytest.approx(floor, rel=1e-6)


def check_a_teacher_off_the_blocks_is_not_learned_at_all() -> None:
    target = teacher(10, 12, [2.0, 1.0]).masked_fill(on_diagonal(2, 10, 12), 0.0)
    assert fit(layer(mini(n=2)), target) == pytest.approx(target.square().sum().item(), rel=1e-9), "the loss is where it was"
    corner = torch.zeros(10, 12, dtype=torch.float64)
    corner[:5, 6:] = teacher(5, 6, [2.0, 1.0])
    assert fit(layer(mini(n=2)), corner) == pytest.approx(5.0, rel=1e-9)
    assert fit(layer(get_method("lora", r=2, sites="w")), corner) < 1e-8, "which LoRA of as many parameters learns"


# --- as plain LoRA ------------------------------------------------------------------------------------------------------------


def check_it_is_lora_of_rank_n_r_with_block_diagonal_factors() -> None:
    for arch, sites in (("llama", ["all-linear", "embedding"]), ("gpt2", "all-linear")):
        adapted = subject("melora", arch, sites=sites, n=2, alpha=12.0)
        state, tensors = adapted.state(), {}
        for name, f in state.factors().items():
            tensors |= {f"{name}.A": f.A, f"{name}.B": f.B}
            assert f.A.shape[0] == 8
            assert not f.A[:4, f.A.shape[1] // 2 :].any()
            assert not f.B[: len(f.B) // 2, 4:].any()
        lora = Adapter(Recipe("lora", {"r": 8, "alpha": 24.0, "sites": sites}), state.sites, tensors)
        fresh = attach(base(arch), get_method("lora"), name="x").add("y", lora)
        assert far(logits(fresh.model, batch()), logits(adapted.model, batch())) < 1e-5
        assert far(logits(adapted.model, batch()), logits(base(arch), batch())) > 1e-3


def check_the_trajectory_of_pefts_lora_held_to_the_blocks(arch: str = "gpt_neox") -> None:
    """PEFT's LoRA of rank n·r from the same factors, the gradients off the blocks set to zero: 50 steps in fp64, to 1e-9."""
    n, r = 2, 4
    model = trajectory.base(arch)
    config = peft.LoraConfig(r=n * r, lora_alpha=2.0 * n * r, target_modules=trajectory.TARGETS[arch])
    with quiet():
        theirs = peft.get_peft_model(copy.deepcopy(model), config).train()
    adapted = attach(model.train(), get_method("melora", r=r, n=n, alpha=2.0 * r))
    named = dict(theirs.named_parameters())
    pairs = []
    for branch in adapted.branches():
        f = branch.factors()
        for end, value in (("lora_A", f.A), ("lora_B", f.B)):
            parameter = named[f"base_model.model.{branch.site.name}.{end}.default.weight"]
            parameter.data.copy_(value.detach())
            blocks = on_diagonal(n, *parameter.shape)
            parameter.register_hook(lambda grad, blocks=blocks: grad * blocks)
            pairs.append((branch, end == "lora_B", parameter))
    losses, reference = trajectory.train_ours(adapted, adapted.methods["default"]), trajectory.train_theirs(theirs)
    assert reference[-1] < reference[0] - 0.1
    assert max(abs(a - b) for a, b in zip(losses, reference, strict=True)) <= trajectory.TOLERANCE
    for branch, up, parameter in pairs:
        assert (branch.factors()[up] - parameter).abs().max() <= trajectory.TOLERANCE


# --- what is refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"n": 3, "sites": "q_proj"}, r"n=3 does not divide both sides of site 'model\.layers\.0\.self_attn\.q_proj' \(32 × 32\)"),
        ({"n": 3}, "a divisor of 32"),
        ({"n": 0}, "at least 1"),
        ({"n": 8, "r": 5, "sites": "q_proj"}, "use r <= 4"),
        ({"rank_pattern": {"no_such": 2}}, "no_such"),
    ],
)
def test_nothing_is_dropped_silently(kwargs: dict[str, Any], says: str) -> None:
    model = base()
    with pytest.raises(BadParameter, match=says):
        attach(model, get_method("melora", **{"r": 2, **kwargs}))
    assert not any("lora" in name for name, _ in model.named_modules())


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("name", CHECKS)
def test_melora(name: str) -> None:
    CHECKS[name]()


def test_the_trajectory_on_conv1d() -> None:
    check_the_trajectory_of_pefts_lora_held_to_the_blocks("gpt2")


# --- mutants ------------------------------------------------------------------------------------------------------------------

Change = Callable[[pytest.MonkeyPatch], None]


def full(m: pytest.MonkeyPatch) -> None:
    """B A without the mask."""
    m.setattr(melora.Minis, "weight", lambda self: self.s * self.B @ self.A)


def rotated(m: pytest.MonkeyPatch) -> None:
    """Each mini reads its neighbor's part of x."""
    own = melora.Minis._down
    m.setattr(melora.Minis, "_down", lambda self, x, A: own(self, x, A)[1:] + own(self, x, A)[:1])


def unmasked(m: pytest.MonkeyPatch) -> None:
    """Forward is that of LoRA."""
    m.setattr(melora.Minis, "forward", lambda self, x, ctx: melora.ops.expand(melora.ops.project(x, self.A), self.B, self.s))


def an_ulp_off(m: pytest.MonkeyPatch) -> None:
    own = melora.Minis.forward
    m.setattr(melora.Minis, "forward", lambda self, x, ctx: own(self, x, ctx) * (1 + 2**-23))


def lora_start(m: pytest.MonkeyPatch) -> None:
    """Kaiming by all of d_in."""
    m.setattr(melora.math, "sqrt", lambda n: 1.0)


MUTANTS: list[tuple[str, Change]] = [
    ("count", lambda m: m.setattr(melora.MinisSpec, "count", lambda self, site: self.n * self.rank.r * (site.d_in + site.d_out))),
    ("rank", lambda m: m.setattr(melora.Minis, "bound", lambda self: self.r)),
    ("rank", full),
    ("off_the_blocks_is_zero", full),
    ("forward_is_the_block_diagonal_matrix", rotated),
    ("forward_is_the_block_diagonal_matrix", unmasked),
    ("the_start", lora_start),
    ("one_mini_is_lora", lambda m: m.setattr(melora.math, "sqrt", lambda n: 1 + 1e-7)),
    ("one_mini_is_lora", an_ulp_off),
    ("a_teacher_on_the_blocks_is_fitted", rotated),
    ("a_teacher_off_the_blocks_is_not_learned_at_all", unmasked),
    ("it_is_lora_of_rank_n_r_with_block_diagonal_factors", rotated),
    ("the_trajectory_of_pefts_lora_held_to_the_blocks", lambda m: m.setattr(melora.ops, "expand", lambda z, B, s: z * (s + 1e-6) @ B.T)),
    ("the_trajectory_of_pefts_lora_held_to_the_blocks", unmasked),
]


@pytest.mark.parametrize(("name", "change"), MUTANTS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(MUTANTS)])
def test_a_mutant_is_seen(name: str, change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch)
    with pytest.raises(AssertionError):
        CHECKS[name]()


def test_every_check_has_a_mutant() -> None:
    assert {name for name, _ in MUTANTS} == set(CHECKS)
