"""Arrow's acceptance properties (arXiv:2405.11157)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.adapters.plain import plain_lora
from lorakit.core.adapter import Adapter
from lorakit.core.context import Ctx
from lorakit.core.delta import Factors
from lorakit.core.errors import BadParameter, Incompatible
from lorakit.serve.arrow import Chosen, attach_arrow, prototype, without_general
from tests.serve.values import IDS, alone, equals, far, logits, made, several, tiny_model

NO = Ctx(torch.zeros(2, dtype=torch.int64))


def pair(seed: int, r: int = 3, *, s: float = 2.0) -> Factors:
    rng = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(r, 10, generator=rng), torch.randn(12, r, generator=rng), s)


def chosen(adapters: dict[str, Adapter], name: str = "model.layers.0.self_attn.q_proj", **options: Any) -> Chosen:
    """The delta of one site."""
    adapted = attach_arrow(tiny_model("llama"), adapters, **options)
    (delta,) = (branch.delta for branch in adapted.branches() if branch.site.name == name)
    assert isinstance(delta, Chosen)
    return delta


def dense(f: Factors) -> Tensor:
    return f.s * f.B.double() @ f.A.double()


# ------------------------------------------------------------------------------------------------------------------------ prototypes
@pytest.mark.parametrize("seed", range(4))
def test_a_prototype_is_the_top_right_singular_vector_of_the_update(seed: int) -> None:
    f = pair(seed)
    v = prototype(f)
    want = torch.linalg.svd(dense(f)).Vh[0]
    assert abs(float(v @ want)) == pytest.approx(1.0, abs=1e-9)
    assert float(v.norm()) == pytest.approx(1.0, abs=1e-9)


def test_it_knows_neither_scale_nor_how_the_update_is_factored() -> None:
    f = pair(1)
    G = torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    turned = Factors(G @ f.A.double(), f.B.double() @ torch.linalg.inv(G), f.s)
    for other in (f._replace(s=-7.0), f._replace(A=f.A * 1e-3), turned):
        assert abs(float(prototype(other) @ prototype(f))) == pytest.approx(1.0, abs=1e-6)
    assert not prototype(f._replace(B=f.B * 0)).any()


# --------------------------------------------------------------------------------------------------------------------------- routing
def test_a_token_along_a_prototype_goes_to_its_adapter() -> None:
    delta = chosen(equals(4), k=1)
    V = delta.get_buffer("V")
    for i in range(4):
        for sign in (1.0, -1.0):
            x = sign * 5 * V[i]
            assert delta.gates(x[None], NO)[0].tolist() == [float(j == i) for j in range(4)]
            f = delta.experts()[i]
            assert far(delta(x[None], NO)[0], dense(f).float() @ x) < 1e-5


@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (2, 0.5), (4, 2.0)])
def test_gates_are_a_softmax_over_the_k_largest_scores(k: int, temperature: float) -> None:
    adapters = equals(4)
    delta = chosen(adapters, k=k, temperature=temperature)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    factors = [a.factors()["model.layers.0.self_attn.q_proj"] for a in adapters.values()]
    want_y = torch.zeros(2, 5, factors[0].B.shape[0], dtype=torch.float64)
    gates = delta.gates(x, NO)
    for b in range(2):
        for t in range(5):
            scores = torch.stack([(x[b, t].double() @ prototype(f)).abs() for f in factors])
            best = scores.argsort(descending=True)[:k]
            weights = (scores[best] / temperature).softmax(0)
            assert torch.allclose(gates[b, t].double()[best], weights, atol=1e-5)
            assert int((gates[b, t] > 0).sum()) == k
            want_y[b, t] = sum(w * dense(factors[int(i)]) @ x[b, t].double() for w, i in zip(weights, best, strict=True))
    assert far(delta(x, NO).double(), want_y) < 1e-5


def test_one_adapter_is_itself_and_equal_ones_need_no_choice() -> None:
    one = made(1, r=2)
    want = alone(one)
    assert far(logits(attach_arrow(tiny_model("llama"), {"a": one}, k=1).model, IDS), want) < 1e-5
    assert far(logits(attach_arrow(tiny_model("llama"), {"a": one, "b": one, "c": one}, k=2).model, IDS), want) < 1e-5


def test_the_order_of_the_adapters_does_not_matter() -> None:
    adapters = several()
    back = dict(reversed(adapters.items()))
    one, other = (logits(attach_arrow(tiny_model("llama"), some, k=2).model, IDS) for some in (adapters, back))
    assert far(one, other) < 1e-5


def test_one_that_is_added_later_has_its_prototype_and_leaves_the_others_theirs() -> None:
    adapters = equals(4)
    before, after = chosen(dict(list(adapters.items())[:3]), k=1), chosen(adapters, k=1)
    V = after.get_buffer("V")
    assert torch.equal(V[:3], before.get_buffer("V"))
    assert after.gates(5 * V[3][None], NO)[0].tolist() == [0.0, 0.0, 0.0, 1.0]
    x = 5 * V[1][None]
    assert torch.equal(after.gates(x, NO)[:, :3], before.gates(x, NO))


def test_who_has_no_update_at_a_site_is_not_chosen_there() -> None:
    with_q, without = made(1, r=2, sites=["q_proj"]), made(2, r=2, sites=["v_proj"])
    adapted = attach_arrow(tiny_model("llama"), {"q": with_q, "v": without}, k=2)
    x = torch.randn(1, 3, 32)
    for branch in adapted.branches():
        want = [1.0, 0.0] if branch.site.role == "q" else [0.0, 1.0]
        assert branch.delta.gates(x, NO)[0, 0].tolist() == want  # type: ignore[operator]
    silent = Adapter(with_q.recipe, with_q.sites, {k: v * 0 if k.endswith(".B") else v for k, v in with_q.tensors.items()}, with_q.meta)
    model = attach_arrow(tiny_model("llama"), {"a": silent, "b": silent}, k=1).model
    assert far(logits(model, IDS), logits(tiny_model("llama"), IDS)) < 1e-6


def test_ids_are_routed_too() -> None:
    adapters = {f"a{i}": made(i, r=2, sites="embedding") for i in range(3)}
    delta = chosen(adapters, "model.embed_tokens", k=2)
    ids = torch.tensor([[5, 9, 5]])
    onehot = torch.nn.functional.one_hot(ids, 128).float()
    assert torch.allclose(delta.gates(ids, NO), delta.gates(onehot, NO), atol=1e-6)
    assert far(delta(ids, NO), delta(onehot, NO)) < 1e-5


def test_tokens_are_routed_by_what_came_before_only_and_rows_by_themselves() -> None:
    model = attach_arrow(tiny_model("llama"), several(), k=2).model
    whole = logits(model, IDS)
    later = IDS.clone()
    later[:, 6:] = (later[:, 6:] + 17) % 128
    assert far(logits(model, later)[:, :6], whole[:, :6]) < 1e-6
    assert far(logits(model, IDS[1:2])[0], whole[1]) < 1e-5
    cache, out = None, []
    with torch.no_grad():
        for piece in (IDS[:, :4], *IDS[:, 4:].split(1, 1)):
            one = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = one.past_key_values
            out.append(one.logits)
    assert far(torch.cat(out, 1), whole) < 1e-5


@pytest.mark.parametrize("options", [{"k": 0}, {"k": 5}, {"temperature": 0.0}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(BadParameter, match="expected k from 1 to the number of adapters, 4"):
        attach_arrow(tiny_model("llama"), equals(4), **options)


def test_two_domains_that_no_single_lora_serves() -> None:
    """y = ±u x by one input coordinate: linear in x there is an error that stays; two routed experts have none."""
    u, flag = torch.randn(12), torch.zeros(2, 10)
    flag[0, 0], flag[1, 1] = 1.0, 1.0
    v = torch.randn(10)
    v[:2] = 0
    adapters = {}
    site = made(1, sites=["q_proj"], r=2).sites[0]
    for name, sign, i in (("plus", 1.0, 0), ("minus", -1.0, 1)):
        A = torch.zeros(2, site.d_in)
        A[0, :10], A[1, :10] = v / v.norm(), 10 * flag[i]  # the domain's own coordinate is answered most
        B = torch.zeros(site.d_out, 2)
        B[:12, 0], B[20, 1] = sign * u, 10.0
        adapters[name] = plain_lora([site], {site.name: Factors(A, B, 1.0)}, {})
    delta = chosen(adapters, site.name, k=1)
    for i, sign in ((0, 1.0), (1, -1.0)):
        x = torch.zeros(1, site.d_in)
        x[0, i], x[0, 2:10] = 3.0, torch.randn(8)
        want = sign * float(x[0, :10] @ v / v.norm()) * u
        assert far(delta(x, NO)[0, :12], want) < 1e-5


# ---------------------------------------------------------------------------------------------------------------- general knowledge
def test_general_knowledge_is_taken_away_from_the_update_or_from_the_factors() -> None:
    (task, *general), name = equals(3, alpha=2.0).values(), "model.layers.1.mlp.up_proj"
    t, *g = (a.factors()[name] for a in (task, *general))
    exact = without_general(task, general).factors()[name]
    assert far(dense(exact), dense(t) - sum(map(dense, g)) / 2) < 1e-5  # type: ignore[arg-type]
    assert len(exact.A) == 6
    published = without_general(task, general, space="factor:both").factors()[name]
    A, B = t.A - (g[0].A + g[1].A) / 2, t.B - (g[0].B + g[1].B) / 2
    assert far(dense(published), dense(Factors(A, B, t.s))) < 1e-5
    assert len(published.A) == 2
    assert far(dense(published), dense(exact)) > 1e-2
    with pytest.raises(Incompatible, match="factor space"):
        without_general(task, [made(1, r=4)], space="factor:both")
    with pytest.raises(BadParameter, match="no general adapter"):
        without_general(task, [])


# ------------------------------------------------------------------------------------------------------------------------ beside PEFT
def clear(seed: int) -> Adapter:
    """An update whose largest singular value stands out: PEFT's fixed number of iterations finds its vector."""
    one = made(seed, r=2, alpha=2.0, sites=["q_proj", "v_proj"])
    tensors = {k: torch.cat([v[:1] * 6, v[1:]]) if k.endswith(".A") else v for k, v in one.tensors.items()}
    return Adapter(one.recipe, one.sites, tensors, one.meta)


@pytest.mark.parametrize("general", [False, True])
def test_it_says_what_peft_says(tmp_path: Path, general: bool) -> None:
    import peft

    from lorakit.adapters.peft_write import to_peft
    from tests.adapters.subject import quiet

    adapters = {f"a{i}": clear(i) for i in range(5)}
    for name, adapter in adapters.items():
        to_peft(adapter, tmp_path / name)
    mine, apart = (list(adapters)[:3], list(adapters)[3:]) if general else (list(adapters), [])
    config = peft.ArrowConfig(top_k=2, router_temperature=0.7, use_gks=general)
    with quiet():
        theirs = peft.create_arrow_model(
            tiny_model("llama"),
            task_specific_adapter_paths=[str(tmp_path / name) for name in mine],
            arrow_config=config,
            **({"general_adapter_paths": [str(tmp_path / name) for name in apart]} if general else {}),
        ).eval()
        want = logits(theirs, IDS)
    ours = {name: adapters[name] for name in mine}
    if general:
        ours = {name: without_general(a, [adapters[n] for n in apart], space="factor:both") for name, a in ours.items()}
    assert far(logits(attach_arrow(tiny_model("llama"), ours, k=2, temperature=0.7).model, IDS), want) < 1e-3
    assert far(logits(attach_arrow(tiny_model("llama"), ours, k=1, temperature=0.7).model, IDS), want) > 1e-2


# ------------------------------------------------------------------------------------------------------------------------ the mutants
def test_a_signed_score_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "abs", lambda self: self)
    delta = chosen(equals(4), k=1)
    x = -5 * delta.get_buffer("V")[2]
    assert delta.gates(x[None], NO)[0].argmax() != 2


def test_the_direction_of_A_alone_would_be_seen() -> None:
    """The top right singular vector of A, without B, is another one."""
    f = pair(1)
    assert abs(float(torch.linalg.svd(f.A.double()).Vh[0] @ prototype(f))) < 0.99
