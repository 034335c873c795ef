"""X-LoRA's acceptance properties (arXiv:2402.07148)."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

import lorakit
from lorakit import Adapted, attach, get_method
from lorakit.adapters.expert import expert
from lorakit.adapters.peft import to_peft
from lorakit.core.errors import AdapterMismatch, BadParameter, CheckpointError, Incompatible, NotExportable, NotMergeable
from lorakit.methods.experts import xlora
from lorakit.methods.experts.xlora import Gate, Gated
from lorakit.parts.patches import prepass
from lorakit.parts.patches.prepass import Prepass
from lorakit.parts.routers import softmax
from tests.laws.steps import Run
from tests.laws.subject import awaken, base, batch, far, logits, loss_of, not_fused, refusal, same_bits

SITES = (["q_proj", "v_proj"], ["q_proj", "mlp", "embedding"], "v_proj")
RANKS = (4, 2, 3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Three LoRAs of different ranks, scales and sites; the second one in PEFT's format."""
    root = tmp_path_factory.mktemp("adapters")
    for i, (r, sites) in enumerate(zip(RANKS, SITES, strict=True)):
        one = awaken(attach(base(), get_method("lora", r=r, alpha=5.0, sites=sites)), seed=i, size=0.3)
        if i == 1:
            to_peft(one.state(), root / str(i), model=base())
        else:
            one.save(root / str(i))
    return tuple(str(root / str(i)) for i in range(3))


def mixed(folders: tuple[str, ...], *, noise: float = 0.5, **kwargs: Any) -> Adapted:
    """A mixture of the folders' adapters, its gate away from its start."""
    adapted = attach(base(), get_method("xlora", adapters=folders, **kwargs))
    return awaken(adapted, size=noise)


def singles(folders: tuple[str, ...]) -> list[Tensor]:
    return [logits(lorakit.load(base(), folder).model, batch()) for folder in folders]


def gate_of(adapted: Adapted) -> Gate:
    gate = adapted.shared("default")["gate"]
    assert isinstance(gate, Gate)
    return gate


@torch.no_grad()
def silence(adapted: Adapted, bias: list[float] | None = None) -> Adapted:
    """The gate's last layer zero, or only its bias."""
    gate = gate_of(adapted)
    last = gate.spec.depth
    gate.get_parameter(f"W{last}").zero_()
    gate.get_parameter(f"c{last}").copy_(torch.tensor(bias or [0.0] * len(gate.get_parameter(f"c{last}"))))
    return adapted


# ------------------------------------------------------------------------------------------------------------------ what is mixed
def test_a_gate_on_one_adapter_is_that_adapter(folders: tuple[str, ...]) -> None:
    """Ranks, scales and sites of each its own, in either format."""
    want = singles(folders)
    for i in range(3):
        bias = [0.0] * 3
        bias[i] = 200.0
        found = logits(silence(mixed(folders), bias).model, batch())
        assert far(found, want[i]) < 1e-5
        assert far(found, want[i - 1]) > 1e-2


def uniform(adapted: Adapted, c: float = 1.0) -> float:
    """How far a mixture is from W + c/N Σ ΔW_i, put into plain weights."""
    model = base()
    with torch.no_grad():
        for branch in adapted.branches():
            weight = model.get_submodule(branch.site.module).weight
            change = sum(f.s * f.B @ f.A for f in branch.delta.experts()) * c / 3
            weight.add_(change.T if branch.site.kind == "embedding" else change)  # type: ignore[union-attr]
    return far(logits(adapted.model, batch()), logits(model, batch()))


def test_a_gate_of_zeros_mixes_evenly(folders: tuple[str, ...]) -> None:
    assert uniform(silence(mixed(folders))) < 1e-5
    assert uniform(silence(mixed(folders, weight=2.0)), 2.0) < 1e-5
    assert uniform(silence(mixed(folders, weight=2.0))) > 1e-2
    assert uniform(silence(mixed(folders, softmax=False), [1 / 3] * 3)) < 1e-5
    assert uniform(silence(mixed(folders), [1.0, 0.0, 0.0])) > 1e-2


def test_the_adapters_keep_their_bits_and_only_the_gate_learns(folders: tuple[str, ...]) -> None:
    adapted = attach(base(), get_method("xlora", adapters=folders))
    assert {p.name for p in adapted.params()} == {"lora_shared.gate.W1", "lora_shared.gate.c1"}
    assert adapted.params().numel() == (32 + 1) * 3
    before = {k: v.clone() for k, v in adapted.tensors("default").items()}
    Run(adapted, total=3).steps(3)
    for name, tensor in adapted.tensors("default").items():
        assert same_bits(tensor, before[name]) != name.startswith("lora_shared.gate"), name
    assert all(p.grad is None for b in adapted.branches() for p in b.delta.parameters())
    trained = attach(base(), get_method("xlora", adapters=folders, train_adapters=True))
    assert {p.role for p in trained.params()} == {"A", "B", "W1", "c1"}


def test_the_fill_up_of_lower_ranks_stays_zero_in_training(folders: tuple[str, ...]) -> None:
    adapted = attach(base(), get_method("xlora", adapters=folders, train_adapters=True))
    Run(adapted, total=3).steps(3)
    q = next(b.delta for b in adapted.branches() if b.site.name.endswith("0.self_attn.q_proj"))
    assert q.A.shape == (3, 4, 32)
    assert not q.A[1, 2:].any() and not q.B[1, :, 2:].any() and not q.A[2].any()
    assert q.A[0].any() and q.A[1, :2].any()


# -------------------------------------------------------------------------------------------------------- the gate, written out
def by_hand(adapted: Adapted, hidden: Tensor) -> Tensor:
    gate, spec = gate_of(adapted), gate_of(adapted).spec
    h = hidden
    for i in range(1, spec.depth + 1):
        h = h @ gate.get_parameter(f"W{i}").T + gate.get_parameter(f"c{i}")
        h = h.clamp_min(0) if i < spec.depth else h
    g = h.view(*h.shape[:2], -1, 3)
    g = (g / spec.temperature).double().exp() if spec.softmax else g
    g = g / g.sum(-1, keepdim=True) if spec.softmax else g
    if spec.top_k is not None:
        least = g.topk(spec.top_k, dim=-1).values[..., -1:]
        mask = g >= least
        e = torch.where(mask, g.exp(), 0.0)
        g = e / e.sum(-1, keepdim=True) if spec.softmax_top_k else torch.where(mask, g, 0.0)
    return spec.weight * g.float()


def found_gates(adapted: Adapted, ids: Tensor, **inputs: Any) -> Tensor:
    """What the sites of a forward read."""
    seen: list[Tensor] = []
    handle = adapted.branches()[-1].host.module.register_forward_pre_hook(lambda *_: seen.append(adapted.context.memo.get(prepass.GATES)))
    with torch.no_grad():
        adapted.model(input_ids=ids, **inputs)
    handle.remove()
    return seen[-1]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": {"depth": 3, "size": 8},
    "cold": {"temperature": 0.3, "weight": 1.7},
    "layerwise": {"layerwise": True, "depth": 2, "size": 8},
    "top": {"top_k": 2},
    "renormalized": {"top_k": 2, "softmax": False, "softmax_top_k": True},
    "raw": {"softmax": False},
}


@pytest.mark.parametrize("label", OPTIONS)
def test_the_gate_is_its_formula_of_the_bases_last_hidden_state(label: str, folders: tuple[str, ...]) -> None:
    adapted = mixed(folders, **OPTIONS[label])
    hidden = base()(input_ids=batch(), output_hidden_states=True).hidden_states[-1]
    with torch.no_grad():
        want = by_hand(adapted, hidden)
        own = by_hand(adapted, adapted.model(input_ids=batch(), output_hidden_states=True).hidden_states[-1])  # the mutant: not the base's
    found = found_gates(adapted, batch())
    assert found.shape == want.shape
    assert far(found, want) < 1e-5
    assert far(found, own) > 1e-3


def test_top_n_of_n_is_dense_and_what_is_left_out_is_not_made_up_for(folders: tuple[str, ...]) -> None:
    ids = batch()
    dense = found_gates(mixed(folders, noise=0.1), ids)
    assert same_bits(found_gates(mixed(folders, noise=0.1, top_k=3), ids), dense)
    two = found_gates(mixed(folders, noise=0.1, top_k=2), ids)
    assert (two.count_nonzero(dim=-1) == 2).all()
    assert same_bits(two[two > 0], dense[two > 0])
    assert (two.sum(-1) < 0.999).all()
    each = found_gates(mixed(folders, top_k=2, softmax=False, softmax_top_k=True), ids)
    assert torch.allclose(
        each.sum(-1), torch.ones(each.shape[:-1])
    )  # a token for itself; not one softmax over the batch, as the first code had


def test_a_gate_of_zero_among_the_largest_stays() -> None:
    """Upstream takes what is not zero for what is chosen."""
    g = torch.tensor([0.0, -1.0, -2.0])
    mask = softmax.largest(g, 2)
    assert mask.tolist() == [True, True, False]
    assert torch.allclose(softmax.shared(g, mask), torch.softmax(torch.tensor([0.0, -1.0, -torch.inf]), 0))
    kept = g * mask
    upstream = torch.softmax(kept.masked_fill(kept == 0, -torch.inf), 0)
    assert upstream.tolist() == [0.0, 1.0, 0.0]


def test_each_site_has_its_gate_with_layerwise(folders: tuple[str, ...]) -> None:
    adapted = silence(mixed(folders, layerwise=True))
    names = [b.site.name for b in adapted.branches()]
    want = logits(adapted.model, batch())
    with torch.no_grad():
        gate_of(adapted).get_parameter("c1").view(len(names), 3)[names.index("model.layers.1.self_attn.v_proj"), 0] = 50.0
    seen: dict[str, Tensor] = {}
    gates = Gated.gates
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Gated, "gates", lambda self, x, ctx: seen.setdefault(self.site.name, gates(self, x, ctx)))
        assert far(logits(adapted.model, batch()), want) > 1e-4
    assert len(seen) == len(names)
    assert [name for name, g in seen.items() if g[..., 0].min() > 5 * g[..., 1].max()] == ["model.layers.1.self_attn.v_proj"]


def test_the_first_pass_may_have_the_adapters_at_a_scale(folders: tuple[str, ...]) -> None:
    """v for every gate of the first pass; v = 0 is the base."""
    adapted = mixed(folders, pass_scale=0.5)
    half = silence(mixed(folders, softmax=False), [0.5] * 3)
    hidden = half.model(input_ids=batch(), output_hidden_states=True).hidden_states[-1]
    with torch.no_grad():
        assert far(found_gates(adapted, batch()), by_hand(adapted, hidden)) < 1e-5
        assert far(found_gates(mixed(folders), batch()), by_hand(adapted, hidden)) > 1e-3


# ------------------------------------------------------------------------------------------------------------ every token for itself
def distances(adapted: Adapted) -> list[float]:
    """A sample alone, against it in a batch with padding, with another future, and token by token with a cache."""
    ids = batch(rows=3, length=8)
    want = logits(adapted.model, ids[1:2, :5])
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    other = ids.clone()
    other[1, 5:] = 7
    with torch.no_grad():
        padded = adapted.model(input_ids=ids, attention_mask=mask).logits[1:2, :5]
        future = adapted.model(input_ids=other).logits[1:2, :5]
        cache, pieces = None, []
        for part in (ids[1:2, :3], ids[1:2, 3:4], ids[1:2, 4:5]):
            out = adapted.model(input_ids=part, past_key_values=cache, use_cache=True)
            cache, pieces = out.past_key_values, [*pieces, out.logits]
    return [far(found, want) for found in (padded, future, torch.cat(pieces, 1))]


def test_a_token_is_gated_by_what_stands_before_it_alone(folders: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(distances(mixed(folders))) < 2e-5
    decide = Gate.decide
    monkeypatch.setattr(Gate, "decide", lambda self, h: decide(self, h.mean((0, 1), keepdim=True).expand_as(h)))
    assert min(distances(mixed(folders))) > 1e-4


def test_without_a_cache_of_its_own_decoding_is_wrong(folders: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepass, "behind", lambda cache, config: DynamicCache(config=config))  # an empty one every time
    assert distances(mixed(folders))[2] > 1e-4


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}, {"cache_implementation": "static"}])
def test_generation_with_a_cache_is_generation_without(options: dict[str, Any], folders: tuple[str, ...]) -> None:
    model: Any = mixed(folders).model.eval()
    found = []
    for more in ({**options}, {**{k: v for k, v in options.items() if "cache" not in k}, "use_cache": False}):
        torch.manual_seed(0)
        found.append(model.generate(batch(), max_new_tokens=6, pad_token_id=0, **{"do_sample": False, **more}))
    assert torch.equal(*found)


def calls(folders: tuple[str, ...], cache: bool) -> int:
    """Tokens that the first layer reads in generating 6."""
    model: Any = mixed(folders).model.eval()
    count: list[int] = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda layer, args: count.append(args[0].shape[1]))
    model.generate(batch(rows=1), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=cache)
    handle.remove()
    return sum(count)


def test_decoding_reads_every_token_once_a_pass(folders: tuple[str, ...]) -> None:
    assert calls(folders, cache=True) == 2 * (7 + 5)
    assert calls(folders, cache=False) == 2 * sum(range(7, 13))  # PEFT's way


def reordered(folders: tuple[str, ...], change: Callable[[Any], None]) -> float:
    """After a cache was turned and cut, the next token's logits against those of the texts so turned and cut."""
    adapted, ids = mixed(folders), batch(rows=3, length=6)
    with torch.no_grad():
        cache = adapted.model(input_ids=ids[:, :5], use_cache=True).past_key_values
        change(cache)
        order = torch.tensor([2, 0, 0])
        turned = torch.cat([ids[order, :4], ids[:, 5:]], 1)
        out = adapted.model(input_ids=ids[:, 5:], past_key_values=cache, use_cache=True).logits[:, -1]
        return far(out, adapted.model(input_ids=turned).logits[:, -1])


def test_the_base_pass_follows_the_cache(folders: tuple[str, ...]) -> None:
    order = torch.tensor([2, 0, 0])

    def both(cache: Any) -> None:
        cache.reorder_cache(order)
        cache.crop(-1)

    def front(cache: Any) -> None:  # the mutant: the forward's layers alone
        n, behind = vars(cache)[prepass.OWN], cache.layers[vars(cache)[prepass.OWN] :]
        cache.layers = cache.layers[:n]
        both(cache)
        for layer in behind:
            layer.crop(-1)
        cache.layers = cache.layers + behind

    assert reordered(folders, both) < 2e-5
    assert reordered(folders, front) > 1e-4
    assert reordered(folders, lambda cache: None) > 1e-4

    adapted, ids = mixed(folders), batch(rows=1)
    with torch.no_grad():  # a copy of a cache goes its own way
        cache = adapted.model(input_ids=ids[:, :4], use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
        adapted.model(input_ids=ids[:, :1], past_key_values=cache)
        assert far(adapted.model(input_ids=ids[:, 4:], past_key_values=twin).logits, logits(adapted.model, ids)[:, 4:]) < 2e-5


def test_a_cache_filled_by_the_base_is_refused(folders: tuple[str, ...]) -> None:
    adapted = mixed(folders)
    with adapted.disabled(), torch.no_grad():
        cache = adapted.model(input_ids=batch(), use_cache=True).past_key_values
    with pytest.raises(Incompatible, match="start it anew"):
        adapted.model(input_ids=batch()[:, :1], past_key_values=cache)
    assert adapted.context.memo == {}, "what a failed forward knew is left behind"


def test_two_forwards_under_one_context_have_gates_of_their_own(folders: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def gradient(checkpointing: bool) -> Tensor:
        adapted = mixed(folders)
        model: Any = adapted.model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with adapted.given(step=0):
            loss = loss_of(model, batch(0)) + loss_of(model, batch(1))
        loss.backward()
        grad = gate_of(adapted).get_parameter("W1").grad
        assert grad is not None
        return grad

    assert same_bits(gradient(True), gradient(False))
    monkeypatch.setattr(Prepass, "_enter", lambda *_: None)
    monkeypatch.setattr(Prepass, "_leave", lambda *_: None)
    monkeypatch.setattr(Prepass, "_say", lambda self, g: self.cell.value.memo.__setitem__(prepass.GATES, g))
    assert far(gradient(True), gradient(False)) > 1e-4


def test_no_gradient_and_no_graph_passes_through_the_first_pass(folders: tuple[str, ...]) -> None:
    adapted = mixed(folders)
    hidden: list[Tensor] = []
    decide = Gate.decide
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Gate, "decide", lambda self, h: decide(self, hidden.append(h) or h))
        loss_of(adapted.model, batch()).backward()
    assert not hidden[0].requires_grad
    assert adapted.context.memo == {}


# ------------------------------------------------------------------------------------------------------------------------- fresh experts
def test_fresh_experts_are_silent_teach_the_gate_nothing_and_then_learn() -> None:
    adapted = attach(base(), get_method("xlora", experts=3, r=2))
    assert same_bits(logits(adapted.model, batch()), logits(base(), batch()))
    loss_of(adapted.model, batch()).backward()
    assert not gate_of(adapted).get_parameter("W1").grad.any()  # type: ignore[union-attr]
    awaken(adapted)
    loss_of(adapted.model, batch()).backward()
    assert gate_of(adapted).get_parameter("W1").grad.any()  # type: ignore[union-attr]


def test_one_fresh_expert_is_lora_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    not_fused(monkeypatch)  # which rounds in another order
    found = []
    for name, more in (("xlora", {"experts": 1}), ("lora", {})):
        adapted = attach(base(), get_method(name, r=3, alpha=8.0, dropout=0.25, **more))
        with torch.no_grad():
            for i, branch in enumerate(adapted.branches()):
                B = torch.randn(branch.site.d_out, 3, generator=torch.Generator().manual_seed(i))
                branch.delta.B.copy_(B.view_as(branch.delta.B))
        with adapted.given(step=1):
            found.append(adapted.model.train()(input_ids=batch()).logits.detach())
    assert same_bits(*found)


def permuted(*, gate: bool, folders: tuple[str, ...]) -> float:
    adapted, order = mixed(folders), torch.tensor([2, 0, 1])
    want = logits(adapted.model, batch())
    with torch.no_grad():
        parts = [b.delta.state_dict() for b in adapted.branches()] + ([gate_of(adapted).state_dict()] if gate else [])
        for tensor in [t for part in parts for t in part.values()]:
            tensor.copy_(tensor[order].clone())
    return far(logits(adapted.model, batch()), want)


def test_experts_have_no_order(folders: tuple[str, ...]) -> None:
    assert permuted(gate=True, folders=folders) < 1e-5
    assert permuted(gate=False, folders=folders) > 1e-2


# ---------------------------------------------------------------------------------------------------------------- where it wins and loses
def told_apart(gate: bool, *, domains: int = 2) -> float:
    """Loss of telling by the first token which of two contradicting adapters has to answer. Without a gate: the best even mixture."""
    model = base()
    ids = batch(rows=8, length=5)
    ids[:, 0] = torch.tensor([5, 9]).repeat_interleave(4)
    ids[4:, 1:] = ids[:4, 1:]  # the same texts after another flag
    target = torch.tensor([20, 30]).repeat_interleave(4) if domains == 2 else torch.full((8,), 20)
    adapted = attach(model, get_method("xlora", experts=2, r=2, sites="mlp"))
    answer = [20, 30] if domains == 2 else [20, 20]
    with torch.no_grad():  # expert i pushes the last hidden state to its answer, whatever the text
        for branch in adapted.branches():
            if branch.site.name != "model.layers.1.mlp.down_proj":
                continue
            up = model.lm_head.weight[answer] * 6  # type: ignore[union-attr, index]
            x = torch.stack([model.model.layers[1].mlp.down_proj.weight.new_ones(branch.site.d_in)] * 2)  # type: ignore[union-attr]
            branch.delta.A.zero_()
            branch.delta.A[:, 0] = x
            branch.delta.B[:, :, 0] = up
    for branch in adapted.branches():
        branch.delta.requires_grad_(False)
    params = list(gate_of(adapted).parameters())
    if not gate:
        with torch.no_grad():
            params[0].zero_()
        params = params[1:]
    optimizer = torch.optim.Adam(params, lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(adapted.model(input_ids=ids).logits[:, -1][:, [20, 30]], (target == 30).long())
        loss.backward()
        optimizer.step()
    return loss.item()


def test_a_gate_tells_contradicting_adapters_apart_and_no_fixed_mixture_does() -> None:
    assert told_apart(gate=True) < 0.1
    assert told_apart(gate=False) > 0.6  # log 2 but for what the base itself knows


def test_it_loses_nothing_but_a_pass_where_the_adapters_agree() -> None:
    """Two equal adapters: whatever the gate, the output is that of one, at twice the passes."""
    adapted = attach(base(), get_method("xlora", experts=2, r=2))
    awaken(adapted)
    with torch.no_grad():
        for branch in adapted.branches():
            for p in (branch.delta.A, branch.delta.B):
                p[1] = p[0]
    want = logits(adapted.model, batch())
    awaken_gate = gate_of(adapted).get_parameter("W1")
    with torch.no_grad():
        awaken_gate.add_(torch.randn(awaken_gate.shape, generator=torch.Generator().manual_seed(3)))
    assert far(logits(adapted.model, batch()), want) < 1e-5
    single = lorakit.core.attach.attach_adapter(base(), expert(adapted.state(), 0), force=False)
    assert far(logits(single.model, batch()), want) < 1e-5
    assert not torch.equal(logits(single.model, batch()), logits(base(), batch()))


# ------------------------------------------------------------------------------------------------------------------------- at rest
def test_saved_it_needs_the_folders_no_more(folders: tuple[str, ...], tmp_path: Path) -> None:
    moved = tuple(str(tmp_path / f"gone{i}") for i in range(3))
    for here, there in zip(folders, moved, strict=True):
        lorakit.adapters.io.save_adapter(lorakit.adapters.io.load_adapter(here, model=base()), there)
    adapted = mixed(moved, layerwise=True, depth=2, size=8)
    want = logits(adapted.model, batch())
    adapted.save(tmp_path / "mixture")
    for folder in moved:
        for file in Path(folder).iterdir():
            file.unlink()
        Path(folder).rmdir()
    again = lorakit.load(base(), tmp_path / "mixture")
    assert same_bits(logits(again.model, batch()), want)
    with pytest.raises(CheckpointError, match="there is no folder"):
        attach(base(), get_method("xlora", adapters=moved))


def test_an_adapter_comes_out_as_it_went_in(folders: tuple[str, ...]) -> None:
    adapted = mixed(folders)
    for i, want in enumerate(singles(folders)):
        one = expert(adapted.state(), i)
        assert (one.recipe.kwargs["r"], one.recipe.kwargs["alpha"]) == (RANKS[i], 5.0)
        assert far(logits(lorakit.core.attach.attach_adapter(base(), one, force=False).model, batch()), want) < 1e-6


def test_it_is_never_merged_and_says_why(folders: tuple[str, ...]) -> None:
    assert "gates that depend on the input" in refusal(NotMergeable, mixed(folders).merge)


def test_what_cannot_be_mixed_is_refused(folders: tuple[str, ...], tmp_path: Path) -> None:
    awaken(attach(base(), get_method("dora", r=2))).save(tmp_path / "dora")
    with pytest.raises(NotExportable, match="dora rescales W itself"):
        attach(base(), get_method("xlora", adapters=(str(tmp_path / "dora"),)))
    with pytest.raises(AdapterMismatch, match="trained on"):
        attach(base(seed=1), get_method("xlora", adapters=folders[:1]))
    with pytest.raises(Incompatible, match="is an encoder-decoder"):
        attach(base("t5"), get_method("xlora"))
    with pytest.raises(BadParameter, match="output head"):
        attach(base(), get_method("xlora", sites="lm_head"))
    for wrong in ({"depth": 0}, {"temperature": 0.0}, {"top_k": 5}, {"softmax_top_k": True}, {"gate_dropout": 1.0}, {"experts": 0},
                  {"adapters": ("a",), "sites": "mlp"}):  # fmt: skip
        with pytest.raises(BadParameter):
            get_method("xlora", **wrong)
    twice = mixed(folders).add("other", get_method("xlora"))
    with pytest.raises(Incompatible, match="each make a pass"):
        logits(twice.switch("default", "other").model, batch())


def test_a_site_alone_says_that_it_needs_the_model(folders: tuple[str, ...]) -> None:
    adapted = mixed(folders)
    with pytest.raises(Incompatible, match="call the model itself"):
        adapted.branches()[-1].host.module(torch.zeros(1, 2, adapted.branches()[-1].site.d_in))


def test_dropout_in_a_deep_gate_is_its_own_and_repeats() -> None:
    adapted = awaken(attach(base(), get_method("xlora", experts=2, r=2, depth=2, size=16, gate_dropout=0.5)), size=0.5)
    model = adapted.model.train()
    found = []
    for step in (0, 1, 0):
        with adapted.given(step=step):
            found.append(logits(model, batch()))
    assert same_bits(found[0], found[2]) and not torch.equal(found[0], found[1])
    assert isinstance(model, nn.Module) and xlora.Gate is Gate
