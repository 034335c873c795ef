"""Every figure against dense updates; what two adapters do not share counts as zero; bad input is named."""

import io
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lorakit.adapters.diagnose import distance as module
from lorakit.adapters.diagnose.distance import DIAGONAL, distance
from lorakit.adapters.diagnose.update import Update
from lorakit.adapters.io import load_adapter
from lorakit.adapters.pair import change
from lorakit.core.errors import AdapterMismatch, BadParameter, NoSuchSite, NotExportable
from tests.adapters.diagnose.subject import BASE, dense, random_adapter, reference, resplit, without_rank
from tests.adapters.subject import shaken, tiny_model

SIZES = {"x.q": (6, 5), "x.v": (4, 5), "x.up": (9, 3)}


def figures(a, b, **kwargs):
    (pair,) = distance({"a": a, "b": b}, **kwargs).pairs
    return pair.total.figures


@st.composite
def two_adapters(draw):
    """Of different ranks, scales and methods, at one to three sites of the same small shapes."""
    sides = st.integers(2, 8)
    sizes = {f"x.{n}": (draw(sides), draw(sides)) for n in draw(st.sampled_from(["q", "qv", "qvo"]))}
    limit = min(min(size) for size in sizes.values())

    def one(seed):
        ranks = {"r": draw(st.integers(1, limit)), "rank_pattern": {"q": draw(st.integers(1, limit))}}
        alpha = draw(st.sampled_from([0.1, 1.0, 8.0]))
        method = draw(st.sampled_from(["lora", "rslora"]))
        return random_adapter(sizes, method=method, seed=seed, alpha=alpha, **(ranks if method == "lora" else {"r": ranks["r"]}))

    seed = draw(st.integers(0, 10**6))
    return one(seed), one(seed + 1)


@given(two_adapters())
def test_every_figure_is_that_of_the_dense_updates(adapters):
    a, b = adapters
    (pair,) = distance({"a": a, "b": b}).pairs
    assert pair.total.figures == pytest.approx(reference(dense(a), dense(b)), abs=1e-9)
    for name, tally in pair.sites.items():
        alone = [{name: dense(x)[name]} for x in adapters]
        assert tally.figures == pytest.approx(reference(*alone), abs=1e-9)


@given(two_adapters())
@settings(max_examples=25, derandomize=True)  # how well a direction of small σ is kept in fp32 depends on the draw
def test_how_an_update_is_split_does_not_matter(adapters):
    a, b = adapters
    sign = {"sign_conflict": 0, "weighted_conflict": 0}  # an entry near zero may change its sign with the rounding to fp32
    assert figures(resplit(a), b) | sign == pytest.approx(figures(a, b) | sign, abs=1e-3)


def test_an_adapter_and_itself_or_its_negative():
    a = random_adapter(SIZES, r=2)
    minus = replace(a, tensors={k: -t if k.endswith("B") else t for k, t in a.tensors.items()})
    same = {"cosine": 1, "row_overlap": 1, "column_overlap": 1, "sign_conflict": 0, "weighted_conflict": 0}
    for other, expected in ((a, same), (minus, same | {"cosine": -1, "sign_conflict": 1, "weighted_conflict": 1})):
        found = figures(a, other)
        assert {k: found[k] for k in expected} == pytest.approx(expected)


def test_scales_count_where_sites_are_put_together():
    """The same tensors under the same α: of rsLoRA's other scales only the ratio between sites of different rank is seen."""
    a = random_adapter(SIZES, r=1, rank_pattern={"q": 4}, alpha=8)
    b = random_adapter(SIZES, r=1, rank_pattern={"q": 4}, alpha=8, alpha_pattern={"q": 80}, seed=1)
    assert figures(a, b) == pytest.approx(reference(dense(a), dense(b)))
    assert figures(a, b)["cosine"] != pytest.approx(figures(a, replace(b, recipe=a.recipe))["cosine"], abs=1e-3)


def test_a_weight_that_only_one_changes_is_zero_in_the_other_and_listed():
    a = random_adapter(SIZES, r=2)
    b = random_adapter({"x.q": (6, 5), "y.o": (3, 3)}, r=3, seed=1)
    found = distance({"a": a, "b": b})
    (pair,) = found.pairs
    assert pair.total.figures == pytest.approx(reference(dense(a), dense(b)))
    assert abs(pair.total.cosine) < abs(pair.sites["x.q"].cosine)
    assert (list(pair.sites), pair.only_a, pair.only_b) == (["x.q"], ["x.v", "x.up"], ["y.o"])
    assert found.notes == ["2 weights only in a, zero in b (x.v, …)", "1 weights only in b, zero in a (y.o, …)"]


def test_entries_at_zero_are_not_compared():
    a = random_adapter({"x.q": (6, 5)}, r=2)
    a.tensors["x.q.B"][:3] = 0
    b = random_adapter({"x.q": (6, 5)}, r=2, seed=1)
    b.tensors["x.q.A"][:, :2] = 0
    (pair,) = distance({"a": a, "b": b}).pairs
    assert pair.total.entries == 3 * 3
    assert pair.total.figures == pytest.approx(reference(dense(a), dense(b)))


def test_of_an_update_of_zero_there_is_nothing_to_say():
    a, zero = random_adapter(SIZES, r=2), random_adapter(SIZES, r=2, seed=1)
    zero = replace(zero, tensors={k: torch.zeros_like(t) if k.endswith("B") else t for k, t in zero.tensors.items()})
    assert set(figures(a, zero).values()) == {None}
    json.dumps(distance({"a": a, "z": zero}).as_dict(), allow_nan=False)


def test_at_random_overlaps_are_those_of_chance_and_half_the_signs_differ():
    found = [figures(*(random_adapter({"x": (60, 90)}, r=r, seed=2 * i + r % 2) for r in (4, 7))) for i in range(40)]
    mean = {k: sum(f[k] for f in found) / len(found) for k in found[0]}
    assert mean["row_chance"] == pytest.approx(7 / 90)
    assert mean["column_chance"] == pytest.approx(7 / 60)
    assert mean["row_overlap"] == pytest.approx(7 / 90, rel=0.1)
    assert mean["column_overlap"] == pytest.approx(7 / 60, rel=0.1)
    assert mean["sign_conflict"] == pytest.approx(0.5, abs=0.02)
    assert mean["cosine"] == pytest.approx(0, abs=0.05)


def test_rows_are_made_some_at_a_time_and_once(monkeypatch):
    adapters = {str(i): random_adapter(SIZES, r=2, seed=i) for i in range(4)}
    before = distance(adapters).as_dict()
    made, real = [], Update.rows

    def rows(self, at):
        block = real(self, at)
        made.append(block.numel())
        return block

    monkeypatch.setattr(Update, "rows", rows)
    monkeypatch.setattr(module, "BLOCK", 7)
    assert distance(adapters).as_dict()["matrices"]["sign_conflict"] == before["matrices"]["sign_conflict"]
    assert max(made) <= 7
    assert sum(made) == 4 * sum(d_out * d_in for d_out, d_in in SIZES.values())


def test_of_many_every_pair_as_if_alone():
    adapters = {name: random_adapter(SIZES, r=r, seed=r) for name, r in (("a", 1), ("b", 2), ("c", 3))}
    adapters["c"] = replace(adapters["c"], sites=adapters["c"].sites[:2])
    found = distance(adapters)
    assert [(p.a, p.b) for p in found.pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    for p in found.pairs:
        (alone,) = distance({p.a: adapters[p.a], p.b: adapters[p.b]}).pairs
        assert p.total.figures == pytest.approx(alone.total.figures)
        assert (p.only_a, p.only_b) == (alone.only_a, alone.only_b)
    for figure, own in DIAGONAL.items():
        matrix = found.matrix(figure)
        assert (own is None) == ("chance" in figure)
        assert [matrix[i][i] for i in range(3)] == [own] * 3
        assert matrix[2][0] == matrix[0][2] == found.pairs[1].total.figures[figure]


def test_only_some_sites():
    a, b = random_adapter(SIZES, r=2), random_adapter(SIZES, r=2, seed=1)
    (pair,) = distance({"a": a, "b": b}, where=["v", "up"]).pairs
    assert list(pair.sites) == ["x.v", "x.up"]
    assert pair.total.figures == pytest.approx(reference(*({k: W for k, W in dense(x).items() if k != "x.q"} for x in (a, b))))
    with pytest.raises(NoSuchSite, match="'vv' matches no"):
        distance({"a": a, "b": b}, where=["vv"])


# ------------------------------------------------------------------------------------------------------------------ real adapters
def real(arch, name, seed, **kwargs):
    return shaken(tiny_model(arch), name, seed=seed, **kwargs).state()


def test_a_part_of_a_fused_weight_against_the_whole():
    a = real("gpt2", "lora", 1, r=3, sites=["c_attn", "c_fc"])
    b = real("gpt2", "lora", 2, r=2, sites=["c_attn[q]", "c_attn[v]", "c_fc"])
    wide = {s.name: d.weight().double() for s, d in zip(a.sites, a.deltas().values(), strict=True)}
    other = {name: torch.zeros_like(W) for name, W in wide.items()}
    for s, delta in zip(b.sites, b.deltas().values(), strict=True):
        at = torch.cat([torch.arange(r.start, r.stop) for r in s.rows or (range(s.d_out),)])
        other[s.whole][at] = delta.weight().double()
    (pair,) = distance({"a": a, "b": b}).pairs
    assert set(pair.sites) == wide.keys()
    assert pair.total.figures == pytest.approx(reference(wide, other), abs=1e-5)
    (alone,) = distance({"b": b, "c": real("gpt2", "lora", 3, r=2, sites=["c_attn[q]", "c_fc"])}).pairs
    assert "transformer.h.0.attn.c_attn[q]" in alone.sites
    assert "transformer.h.0.attn.c_attn[v]" in alone.only_a


def test_experts_are_compared_one_by_one():
    a, b = (real("mixtral", "lora", seed, r=2, sites=["experts"]) for seed in (1, 2))
    both = [{f"{s}#{e}": W.double() for s, d in x.deltas().items() for e, W in enumerate(d.weight())} for x in (a, b)]
    assert figures(a, b) == pytest.approx(reference(*both), abs=1e-5)


@pytest.mark.parametrize(
    ("name", "kwargs"), [("fourierft", {"n_frequency": 100}), *((name, {}) for name in ("krona", "vera", "pissa", "adalora", "melora"))]
)
def test_adapters_of_any_method(name, kwargs):
    a, b = real("llama", name, 1, **kwargs), real("llama", "lora", 2, r=2)
    both = [{s: d.weight().double() for s, d in x.deltas().items()} for x in (a, b)]
    both = [{s: W for s, W in x.items() if s in both[0].keys() & both[1].keys()} for x in both]
    found, expected = figures(a, b, where=list(both[0])), reference(*both)
    assert found["cosine"] == pytest.approx(expected["cosine"], abs=1e-5)
    assert found["row_overlap"] == pytest.approx(expected["row_overlap"], abs=1e-3)
    assert found["sign_conflict"] == pytest.approx(expected["sign_conflict"], abs=1e-3)


def test_a_method_that_rescales_needs_the_model():
    model = tiny_model("llama")
    a, b = (real("llama", "dora", seed, sites=["q_proj"]) for seed in (1, 2))
    with pytest.raises(NotExportable, match="dora rescales W itself.*--model"):
        figures(a, b)
    both = [{s.name: change(x, s, x.deltas()[s.name], model).double() for s in x.sites} for x in (a, b)]
    assert figures(a, b, model=model)["cosine"] == pytest.approx(reference(*both)["cosine"], abs=1e-5)
    with pytest.raises(AdapterMismatch, match="the model has no such weight"):
        figures(a, b, model=tiny_model("gpt2"))
    with pytest.raises(AdapterMismatch, match="is 32 × 32 in the adapter and 64 × 64 in the model"):
        figures(a, b, model=tiny_model("llama", hidden_size=64))


def test_a_site_without_rank_is_one_without_an_update():
    a, b = (random_adapter(SIZES, method="eva", seed=seed) for seed in (1, 2))
    for one, other in ((a, without_rank(b, "x.v")), (without_rank(a, "x.v"), without_rank(b, "x.v"))):
        (pair,) = distance({"a": one, "b": other}).pairs
        assert set(pair.sites["x.v"].figures.values()) == {None}
        alone = distance({"a": one, "b": other}, where=["q", "up"]).pairs[0].total
        assert pair.total.inner == alone.inner
        assert (pair.total.square_a > alone.square_a) == (one is a)


def test_what_was_trained_whole_is_named():
    a, b = (real("llama", "lora", seed, unfreeze=("norm",)) for seed in (1, 2))
    assert "a: 1 tensors trained whole are left out (model.norm.weight, …)" in distance({"a": a, "b": b}).notes


# ---------------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("name", "kwargs", "why"),
    [
        ("bitfit", {}, "bitfit changes no weight"),
        ("prefix", {}, "more than a change of weights"),
        ("adapter_houlsby", {"r": 4}, "more than a change of weights"),
    ],
)
def test_what_is_no_change_of_weights_is_refused(name, kwargs, why):
    a = real("gpt2", name, 1, **kwargs)
    with pytest.raises(NotExportable, match=why):
        distance({"a": a, "b": replace(a)})


def test_other_bases_are_named():
    a, b = random_adapter(SIZES), random_adapter(SIZES, seed=1, base={"name": "other", "checkpoint": None, "rows": "bbbb"})
    with pytest.raises(AdapterMismatch, match=r"one was made for base \(aaaa\) and two for other \(bbbb\).*--force"):
        distance({"one": a, "two": b})
    assert distance({"one": a, "two": b}, force=True).pairs
    assert distance({"one": a, "two": replace(b, meta={})}).pairs
    with pytest.raises(AdapterMismatch, match="b was made for base.* and c for other"):
        distance({"a": replace(a, meta={}), "b": replace(a, meta={"base": BASE}), "c": b})


def test_no_weight_in_common():
    a, b = random_adapter({"x.q": (6, 5)}, r=2), random_adapter({"y.q": (6, 5)}, r=2)
    with pytest.raises(AdapterMismatch, match=r"a and b change no weight in common \(x.q, …; y.q, …\)"):
        distance({"a": a, "b": b})


def test_shapes_that_differ_are_named():
    a, b = random_adapter({"x.q": (6, 5)}, r=2), random_adapter({"x.q": (6, 7)}, r=2)
    with pytest.raises(AdapterMismatch, match=r"x.q of b is 6 × 7; that of another adapter is 6 × 5"):
        distance({"a": a, "b": b})


def test_nan_is_named():
    a, b = random_adapter(SIZES), random_adapter(SIZES, seed=1)
    b.tensors["x.v.A"][0, 0] = float("nan")
    with pytest.raises(AdapterMismatch, match="the update of x.v holds NaN"):
        distance({"a": a, "b": b})


def test_one_adapter_has_no_distance():
    with pytest.raises(BadParameter, match="a distance needs at least two adapters; given: 1"):
        distance({"a": random_adapter(SIZES)})


def test_the_tables():
    adapters = {name: random_adapter(SIZES, r=2, seed=i) for i, name in enumerate("abc")}
    for some, expected in (("ab", ["a and b", "x.v", "total"]), ("abc", ["3 adapters", "│ a", "│ c"])):
        out = Console(file=io.StringIO(), width=140)
        out.print(distance({name: adapters[name] for name in some}).table())
        assert all(text in out.file.getvalue() for text in expected)


def test_attached_and_saved_adapters_are_read(tmp_path):
    a, b = shaken(tiny_model("llama"), "lora", seed=1), shaken(tiny_model("llama"), "rslora", seed=2, r=3)
    for adapted, folder in ((a, "a"), (b, "b")):
        adapted.save(tmp_path / folder)
    read = [load_adapter(tmp_path / folder) for folder in "ab"]
    assert figures(*read) == figures(a.state(), b.state())
