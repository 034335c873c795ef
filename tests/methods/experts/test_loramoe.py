"""LoRAMoE's acceptance properties (arXiv:2312.09979), and those of any router that reads a site's input."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit
from lorakit import Adapted, attach, get_method
from lorakit.adapters.expert import expert
from lorakit.adapters.peft import to_peft
from lorakit.core import context
from lorakit.core.context import Ctx
from lorakit.core.errors import BadParameter, DataError, Incompatible, NotExportable, NotMergeable
from lorakit.core.events import Scored
from lorakit.data.encoded import Encoded
from lorakit.data.pack import collate, pack
from lorakit.data.pad import pad
from lorakit.methods.experts import loramoe
from lorakit.methods.experts.loramoe import Localized, Routed, dispersion, shares
from lorakit.ops import reference as ops
from lorakit.parts.routers import softmax
from lorakit.train.kinds import told
from lorakit.train.metrics import forward_scored
from tests.laws.subject import awaken, base, batch, far, logits, loss_of, not_fused, refusal, same_bits
from tests.methods.tools import minimize, normal

SITES = ["all-linear", "embedding"]


def adapted_to(n: int = 4, *, size: float = 0.3, model: nn.Module | None = None, **kwargs: Any) -> Adapted:
    method = get_method("loramoe", **{"experts": n, "r": 2, "alpha": 4.0, "dropout": 0.0, "sites": SITES, **kwargs})
    return awaken(attach(base(dtype=torch.float64) if model is None else model, method), size=size)


# ------------------------------------------------------------------------------------------------------------- one expert is LoRA
def as_lora(monkeypatch: pytest.MonkeyPatch | None = None) -> bool:
    """Whether one expert gives LoRA's bits, init, dropout and gradients included."""
    found = []
    for name, more in (("loramoe", {"experts": 1}), ("lora", {})):
        adapted = attach(base(), get_method(name, r=3, alpha=8.0, dropout=0.25, sites=SITES, **more))
        with torch.no_grad():
            for i, branch in enumerate(adapted.branches()):
                drawn = normal(branch.site.d_out, 3, seed=i, dtype=torch.float32)
                branch.delta.B.copy_(drawn.view_as(branch.delta.B))
        with adapted.given(step=3):
            out = adapted.model.train()(input_ids=batch()).logits
        out.square().sum().backward()
        found.append([out.detach(), *(p.tensor.grad.flatten() for p in adapted.params() if p.role in "AB")])
    return all(same_bits(a, b) for a, b in zip(*found, strict=True))


def test_one_expert_is_lora_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    not_fused(monkeypatch)  # which rounds in another order
    assert as_lora()
    monkeypatch.setattr(loramoe, "dense", lambda z: torch.sigmoid(z))  # a gate that is not normalized
    assert not as_lora()


# ------------------------------------------------------------------------------------------------------- what the router may change
def sameness() -> float:
    """How far the outputs of equal experts are from those of other routers."""
    adapted = adapted_to()
    with torch.no_grad():
        for branch in adapted.branches():
            for p in (branch.delta.A, branch.delta.B):
                p.copy_(p[:1].expand_as(p).clone())
    want = logits(adapted.model, batch())
    with torch.no_grad():
        for branch in adapted.branches():
            branch.delta.R.add_(normal(*branch.delta.R.shape, seed=9))
    return far(logits(adapted.model, batch()), want)


def test_equal_experts_leave_the_router_nothing_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sameness() < 1e-12
    monkeypatch.setattr(loramoe, "dense", lambda z: torch.exp(0.1 * z))
    assert sameness() > 1e-2


def router_gradient(*, asleep: bool) -> float:
    adapted = adapted_to()
    with torch.no_grad():
        for branch in adapted.branches() if asleep else ():
            branch.delta.B.zero_()
    if asleep:
        assert far(logits(adapted.model, batch()), logits(base(dtype=torch.float64), batch())) == 0
    loss_of(adapted.model, batch()).backward()
    return max(float(b.delta.R.grad.abs().max()) for b in adapted.branches())


def test_silent_experts_are_the_identity_and_teach_the_router_nothing() -> None:
    assert router_gradient(asleep=True) == 0
    assert router_gradient(asleep=False) > 1e-6


def permuted(*, router: bool) -> float:
    adapted, order = adapted_to(), torch.tensor([2, 0, 3, 1])
    want = logits(adapted.model, batch())
    with torch.no_grad():
        for branch in adapted.branches():
            for name in ("A", "B", "R") if router else ("A", "B"):
                p = branch.delta.get_parameter(name)
                p.copy_(p[order].clone())
    return far(logits(adapted.model, batch()), want)


def test_experts_have_no_order() -> None:
    assert permuted(router=True) < 1e-12
    assert permuted(router=False) > 1e-2


def test_experts_start_with_draws_of_their_own() -> None:
    adapted = attach(base(), get_method("loramoe", experts=3))
    for branch in adapted.branches():
        A = branch.delta.A
        assert not branch.delta.B.any() and all(not torch.equal(A[i], A[j]) for i in range(3) for j in range(i))


# -------------------------------------------------------------------------------------------- every token, sample and step for itself
def alone(change: Callable[[Tensor], Tensor] = lambda g: g) -> list[float]:
    """Distance of a sample in a batch, with padding behind and with another future, from itself alone."""
    adapted = adapted_to()
    ids = batch(rows=3, length=8)
    want = logits(adapted.model, ids[1:2, :5])
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.no_grad():
        padded = adapted.model(input_ids=ids, attention_mask=mask).logits[1:2, :5]
        other = ids.clone()
        other[1, 5:] = 7
        future = adapted.model(input_ids=other).logits[1:2, :5]
        cache, pieces = None, []
        for part in (ids[1:2, :3], ids[1:2, 3:4], ids[1:2, 4:5]):
            out = adapted.model(input_ids=part, past_key_values=cache, use_cache=True)
            cache, pieces = out.past_key_values, [*pieces, out.logits]
    return [far(found, want) for found in (padded, future, torch.cat(pieces, 1))]


def test_a_token_is_routed_by_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding, neighbors in the batch, tokens to come and decoding with a cache change nothing."""
    assert max(alone()) < 1e-12
    monkeypatch.setattr(loramoe, "dense", lambda z: softmax.dense(z - z.mean(dim=tuple(range(z.ndim - 1)))))  # over the whole batch
    assert min(alone()) > 1e-6


def test_the_gates_are_computed_in_fp32_on_a_bf16_base() -> None:
    adapted = adapted_to(model=base(dtype=torch.bfloat16), sites="q_proj")
    delta = adapted.branches()[0].delta
    x = normal(3, 32, dtype=torch.bfloat16)
    assert delta.gates(x, adapted.context).dtype == torch.float32
    want = torch.softmax(x.float() @ delta.R.T, -1)
    assert far(delta.gates(x, adapted.context), want) < 1e-6
    assert far(torch.softmax(x @ delta.R.bfloat16().T, -1).float(), want) > 1e-4


def test_generation_with_a_cache_is_generation_without() -> None:
    model = adapted_to(model=base()).model.eval()
    found = [model.generate(batch(), max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*found)


# --------------------------------------------------------------------------------------------------------- the constraint's own numbers
def test_the_dispersion_of_known_shares() -> None:
    even = torch.ones(3, 4)
    assert dispersion(even) == 0
    local = Localized(1.0, 0.5, 2, "published")
    weights = local.weights(torch.tensor([1]), 4)
    assert weights.tolist() == [[1.5, 1.5, 0.5, 0.5]]
    assert local.weights(torch.tensor([0]), 4).tolist() == [[0.5, 0.5, 1.5, 1.5]]
    assert dispersion(weights * torch.ones(1, 4)).item() == pytest.approx(1 / 3, rel=1e-6)
    assert dispersion(torch.ones(1, 1)) == 0  # one sample, one expert: no variance, and no NaN
    assert Localized(1.0, 0.5, 2, "intended").weights(torch.tensor([1]), 4).tolist() == [[0.5, 0.5, 1.5, 1.5]]
    biased = (weights - weights.mean()).square().mean() / weights.mean().square()
    assert abs(float(biased) - 1 / 3) > 0.05  # the mutant: a biased variance


def test_three_kinds_share_the_experts_in_order() -> None:
    weights = Localized(1.0, 0.5, 3, "published").weights(torch.tensor([0, 1, 2]), 6)
    assert [row.index(1.5) for row in weights.tolist()] == [4, 2, 0]
    with pytest.raises(DataError, match="kind 3; with kinds=3 expected 0 to 2"):
        Localized(1.0, 0.5, 3, "published").weights(torch.tensor([3]), 6)


def balanced(target: str, delta: float = 0.5) -> Tensor:
    """The shares [4] of a sample of kind 1 at the least dispersion: experts 0 and 1 are its own."""
    local = Localized(1.0, delta, 2, target)  # type: ignore[arg-type]
    z = normal(1, 4).mul_(0.1).requires_grad_()
    ctx = Ctx(torch.zeros(2), kinds=torch.ones(1, 1, dtype=torch.long), samples=torch.zeros(1, 1, dtype=torch.long))
    optimizer = torch.optim.LBFGS([z], max_iter=200, tolerance_grad=1e-14, tolerance_change=1e-18, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = local.constraint([("site", softmax.dense(z)[None])], ctx)
        loss.backward()
        return loss

    optimizer.step(closure)
    return softmax.dense(z.detach())[0]


def test_published_gives_the_matching_experts_the_smaller_share_and_intended_the_larger() -> None:
    low, high = balanced("published"), balanced("intended")
    assert torch.allclose(low[:2] / low[2:], torch.full((2,), 1 / 3, dtype=torch.float64), atol=1e-4)  # (1 − δ) / (1 + δ)
    assert torch.allclose(high[:2] / high[2:], torch.full((2,), 3.0, dtype=torch.float64), atol=1e-3)


# ------------------------------------------------------------------------------------------- kinds reach the gates, packed and padded
DOCUMENTS = [Encoded(ids := batch(9 + n, rows=1, length=n)[0].tolist(), ids, kind=n % 2) for n in (5, 9, 3, 8)]


def constraint(batches: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch | None = None) -> list[float]:
    """The constraint's part of the loss, a target."""
    adapted = adapted_to(balance=1.0, delta=0.5)
    objective = adapted.methods["default"].objective
    assert objective is not None
    found = []
    for inputs in batches:
        plain: list[float] = []

        def score(k: int, inputs: dict[str, Any] = inputs, plain: list[float] = plain) -> Scored:
            done = forward_scored(adapted.model, inputs)
            plain.append(done.loss.item())
            return done

        with told(adapted.model, inputs), torch.no_grad():
            loss, n = objective(score, adapted)
        found.append((loss.item() - plain[0]) / n)
        assert all(d.seen is None and not d.watched for d in (b.delta for b in adapted.branches()))
    return found


def test_the_constraint_is_the_same_packed_padded_and_over_again() -> None:
    windows = collate(pack(DOCUMENTS, 14), length=16)
    rows = pad(DOCUMENTS, 0)
    wide = {k: torch.nn.functional.pad(v, (0, 4), value={"kinds": -1, "labels": -100}.get(k, 0)) for k, v in rows.items()}
    assert windows["kinds"].tolist()[0][-2:] == [-1, -1]
    packed, padded, wider = constraint([windows, rows, wide])
    assert packed > 0.01
    assert packed == pytest.approx(padded, rel=1e-6)
    assert padded == pytest.approx(wider, rel=1e-6)
    unmasked = {**wide, "kinds": wide["kinds"].amax(1, keepdim=True).expand_as(wide["kinds"])}  # the published code: padding counts
    rowwise = {**windows, "position_ids": torch.arange(16).expand(len(windows["kinds"]), -1)}  # the mutant: a window is a sample
    assert abs(constraint([unmasked])[0] / padded - 1) > 1e-3
    assert abs(constraint([rowwise])[0] / packed - 1) > 1e-3


def test_shares_of_equally_long_samples_are_the_published_sums() -> None:
    g, sample = softmax.dense(normal(12, 4)), torch.arange(3).repeat_interleave(4)
    sums = torch.zeros(3, 4, dtype=torch.float64).index_add(0, sample, g)
    assert dispersion(shares(g, sample)).item() == pytest.approx(dispersion(sums).item(), rel=1e-6)


def test_without_kinds_the_constraint_says_what_it_needs() -> None:
    batch_of = pad([Encoded([5, 6, 7], [5, 6, 7])], 0)
    assert "kinds" not in batch_of
    with pytest.raises(DataError, match="give every row an integer 'kind', or set balance=0"):
        constraint([batch_of])
    assert get_method("loramoe").objective is None  # the official script's default: no constraint, no kinds needed


def test_a_site_that_does_not_see_every_token_is_refused() -> None:
    local = Localized(1.0, 0.5, 2, "published")
    ctx = Ctx(torch.zeros(2), kinds=torch.zeros(1, 3, dtype=torch.long), samples=torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(Incompatible, match="'pooler' does not see every token"):
        local.constraint([("pooler", torch.ones(1, 4))], ctx)


def gradients(*, checkpointing: bool, balance: float = 0.5) -> list[Tensor]:
    adapted = adapted_to(balance=balance, delta=0.5, dropout=0.25)
    model = adapted.model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    rows = pad(DOCUMENTS, 0)

    def score(k: int) -> Scored:
        with adapted.given(step=5, seed=k << 32):
            return forward_scored(model, {k: v for k, v in rows.items() if k != "kinds"})

    with told(model, rows):
        loss, _ = adapted.methods["default"].objective(score, adapted) if balance else score(0)[:2]  # type: ignore[misc]
    loss.backward()
    assert all(b.delta.seen is None for b in adapted.branches()), "gates are kept alive"
    return [p.tensor.grad for p in adapted.params()]


def test_the_constraint_is_exact_under_activation_checkpointing_and_leaves_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, again, without = gradients(checkpointing=False), gradients(checkpointing=True), gradients(checkpointing=True, balance=0)
    assert all(far(a, b) < 1e-9 for a, b in zip(again, plain, strict=True))
    assert max(far(a, b) for a, b in zip(without, plain, strict=True)) > 1e-3
    gates = Routed.gates

    def hoarding(self: Routed, x: Tensor, ctx: Ctx) -> Tensor:
        self.seen = gates(self, x, ctx)  # a recomputation collects as well
        return self.seen

    monkeypatch.setattr(Routed, "gates", hoarding)
    with pytest.raises(AssertionError, match="kept alive"):
        gradients(checkpointing=True)


def test_collecting_compiles_without_a_break() -> None:
    adapted = adapted_to(balance=0.5, model=base(), sites="q_proj")
    layer, delta = adapted.branches()[0].host.module, adapted.branches()[0].delta
    x = normal(2, 5, 32, dtype=torch.float32)
    delta.watched = True
    torch._dynamo.reset()
    want, seen = layer(x), delta.seen
    delta.seen = None
    got = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert far(got, want) < 1e-6
    assert far(delta.seen, seen) < 1e-6
    (grad,) = torch.autograd.grad(delta.seen.square().sum(), delta.R)
    assert grad.abs().max() > 0


# ---------------------------------------------------------------------------------------------------------------- where it wins and loses
def separable(name: str, *, share: bool = False, **kwargs: Any) -> float:
    """Least mean error of a rank-1 adapter on two domains, flagged by the first coordinate, with opposite targets y = ± (v·x) u.

    `share`: both domains have the same target, which LoRA holds as it is."""
    flag = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(24)
    x = torch.cat([flag[:, None], normal(48, 5, seed=3)], dim=1)
    v, u = normal(5, seed=4), normal(4, seed=5)
    y = (x[:, 1:] @ v)[:, None] * u * (1 if share else flag[:, None])
    model = nn.ModuleDict({"w": nn.Linear(6, 4, bias=False).double()})
    nn.init.zeros_(model["w"].weight)  # type: ignore[arg-type]
    adapted = awaken(attach(model, get_method(name, r=1, alpha=1.0, dropout=0.0, sites="w", **kwargs)), size=0.3)
    return minimize(adapted, lambda: (model["w"](x) - y).square().mean(), steps=6) / y.square().mean().item()


def test_two_experts_solve_domains_that_contradict_each_other_and_no_lora_does() -> None:
    """LoRA is linear in x: over both domains the best it can do for ± is next to nothing. A router that reads the flag solves it."""
    assert separable("lora") > 0.7
    assert separable("loramoe", experts=2) < 1e-2
    assert separable("loramoe", experts=1) > 0.7  # the mutant: no one to choose


def test_it_loses_where_one_map_serves_all() -> None:
    """The same task for both domains: LoRA of the same rank has it exactly, with a fifth of the parameters of four experts and a router."""
    net = nn.ModuleDict({"w": nn.Linear(6, 4)})
    lora = attach(net, get_method("lora", r=1, sites="w"))
    few = lora.params().numel()
    lora.detach()
    assert attach(net, get_method("loramoe", r=1, experts=4, sites="w")).params().numel() > 5 * few
    assert separable("lora", share=True) < 1e-9


# ------------------------------------------------------------------------------------------------------------------------- at rest
def test_it_is_never_merged_or_exported_whole_and_says_why(tmp_path: Path) -> None:
    adapted = adapted_to()
    assert "gates that depend on the input" in refusal(NotMergeable, adapted.merge)
    assert "gates that depend on the input" in refusal(NotExportable, lambda: to_peft(adapted.state(), tmp_path))


def one_expert(i: int, taken: int) -> float:
    """The i-th expert taken out, against the mixture with all gates on `taken`."""
    adapted = adapted_to(model=base(), rank_pattern={"down_proj": 3}, alpha_pattern={"q_proj": 7.0}, sites="all-linear")
    single = lorakit.core.attach.attach_adapter(base(), expert(adapted.state(), i), force=False)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Routed, "gates", lambda self, x, ctx: torch.eye(4)[taken].expand(*x.shape[:-1], 4))
        return far(logits(single.model, batch()), logits(adapted.model, batch()))


def test_an_expert_is_an_ordinary_lora(tmp_path: Path) -> None:
    assert one_expert(2, 2) < 1e-5
    assert one_expert(2, 1) > 1e-2
    adapter = expert(adapted_to(model=base()).state(), 0)
    assert adapter.recipe.name == "lora"
    assert to_peft(adapter, tmp_path, model=base()).peft_type == "LORA"
    with pytest.raises(BadParameter, match="has 4, from 0 to 3"):
        expert(adapted_to().state(), 4)
    with pytest.raises(NotExportable, match="mixes no experts"):
        expert(adapter, 0)


def test_parameters_are_checked() -> None:
    for wrong in ({"experts": 0}, {"balance": -1.0}, {"delta": 1.0}, {"balance": 0.1, "experts": 5}, {"dropout": 1.0}):
        with pytest.raises(BadParameter):
            get_method("loramoe", **wrong)


def test_the_mixture_is_its_sum_written_out() -> None:
    x, g, A, B = normal(3, 5, 6), softmax.dense(normal(3, 5, 4, seed=1)), normal(4, 2, 6, seed=2), normal(4, 7, 2, seed=3)
    want = sum(g[..., i, None] * (x @ A[i].T @ B[i].T) for i in range(4)) * 0.7
    assert far(ops.mixture(x, g, A, B, 0.7), want) < 1e-14
    ids = torch.tensor([[1, 4, 4]])
    one_hot = torch.eye(6, dtype=torch.float64)[ids]
    assert far(ops.mixture(ids, g[:1, :3], A, B, 0.7), ops.mixture(one_hot, g[:1, :3], A, B, 0.7)) < 1e-14
    assert context.Ctx(torch.zeros(2)).kinds is None
