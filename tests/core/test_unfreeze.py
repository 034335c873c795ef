"""Whole modules trained beside the deltas: patterns, precision, switching."""

from typing import Any

import pytest
import torch

from lorakit import Incompatible, Method, NoSuchSite, attach, get_method
from lorakit.data.tiny import ARCHITECTURES, tiny_model
from tests.laws.steps import Run
from tests.laws.subject import awaken, base, batch, everything, far, logits, loss_of, same_bits

PATTERNS = {
    "classifier": {"classifier.weight", "classifier.bias"},
    "classifier.bias": {"classifier.bias"},
    "*.LayerNorm.bias": None,
    "pooler": {"bert.pooler.dense.weight", "bert.pooler.dense.bias"},
    "pooler.dense": {"bert.pooler.dense.weight", "bert.pooler.dense.bias"},
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(pattern: str) -> None:
    model = tiny_model("bert", task="sequence-classification")
    every = {n for n, _ in model.named_parameters()}
    adapted = attach(model, get_method("lora", sites="attention", unfreeze=(pattern,)))
    found = {p.name.removeprefix("unfrozen.") for p in adapted.params() if p.role == "full"}
    assert found == (PATTERNS[pattern] or {n for n in every if n.endswith("LayerNorm.bias")})
    assert found


def test_nothing_matched_is_an_error() -> None:
    with pytest.raises(NoSuchSite, match="Did you mean 'classifier'"):
        attach(tiny_model("bert", task="sequence-classification"), get_method("lora", unfreeze=("clasifier",)))


def test_a_predicate_chooses_by_module_and_may_choose_nothing() -> None:
    def weights_of_norms(module: torch.nn.Module, parameter: str) -> bool:
        return isinstance(module, torch.nn.LayerNorm) and parameter == "weight"

    method = get_method("lora", sites="attention")
    adapted = attach(tiny_model("bert"), method.but(unfreeze=(weights_of_norms,)))
    found = {p.name for p in adapted.params() if p.role == "full"}
    assert found
    assert all(name.endswith("LayerNorm.weight") for name in found)
    assert not adapted.switch().params()
    assert all(p.role != "full" for p in attach(tiny_model("llama"), method.but(unfreeze=(weights_of_norms,))).params())


HALF: list[tuple[str, str, Any, tuple[str, ...]]] = [
    ("llama", "causal-lm", "all-linear", ("embed_tokens", "lm_head", "norm")),
    ("gpt2", "causal-lm", "all-linear", ("*.bias",)),
    ("gpt2", "causal-lm", ["c_attn[q]", "c_fc"], ("*.bias", "wpe")),
    ("bert", "sequence-classification", "all-linear", ("classifier", "*.bias", "LayerNorm")),
    ("gpt_neox", "causal-lm", ["query_key_value[v]"], ("*.bias", "final_layer_norm")),
]


@pytest.mark.parametrize("name", ["lora", "dora"])
@pytest.mark.parametrize(("arch", "task", "sites", "unfreeze"), HALF)
def test_on_a_bf16_base_they_train_in_fp32_and_the_start_is_the_bases(arch: str, task: Any, sites: Any, unfreeze: Any, name: str) -> None:
    model = base(arch, torch.bfloat16, task=task)
    want, before = logits(model, batch()), everything(model)
    adapted = attach(model, get_method(name, sites=sites, unfreeze=unfreeze))
    got = logits(model, batch())
    assert got.dtype == torch.bfloat16
    assert same_bits(got, want)
    assert {p.tensor.dtype for p in adapted.params()} == {torch.float32}
    labels = {} if task == "causal-lm" else {"loss": lambda m, ids: m(input_ids=ids, labels=torch.tensor([0, 1])).loss}
    start = {p.name: p.tensor.detach().clone() for p in adapted.params()}
    Run(adapted, total=8, **labels).steps(3)
    still = [n for n, v in start.items() if torch.equal(v, adapted.params().rows[[p.name for p in adapted.params()].index(n)].tensor)]
    assert not [n for n in still if not n.endswith("key.bias")], still  # softmax ignores a key bias: no gradient but rounding
    assert logits(model.eval(), batch()).dtype == torch.bfloat16
    assert adapted.merge() is model
    adapted.detach()
    assert {type(m).__name__ for m in model.modules()} == {type(m).__name__ for m in base(arch, task=task).modules()}
    assert all(same_bits(v, before[k]) for k, v in everything(model).items())


@pytest.mark.parametrize("unfreeze", [("*",), ("q_proj",), ("layers.0.self_attn",)])
def test_a_weight_is_rescaled_or_trained_whole_not_both(unfreeze: tuple[str, ...]) -> None:
    model = base()
    with pytest.raises(Incompatible, match="q_proj.weight is rescaled"):
        attach(model, get_method("dora", sites="q_proj", unfreeze=unfreeze))
    assert not model._forward_pre_hooks
    assert attach(base("bert"), get_method("dora", sites="query", unfreeze=("query.bias",))).params()
    both = awaken(attach(base(), get_method("lora", sites="q_proj", unfreeze=unfreeze)))
    live = logits(both.model, batch())
    assert far(logits(both.merge(), batch()), live) < 1e-5, "what only adds may be"


@pytest.mark.parametrize("arch", [a for a in ARCHITECTURES if a != "t5"])  # T5 reads `wo.weight.dtype` and casts its input by it
def test_everything_of_a_bf16_model(arch: str) -> None:
    """Full fine-tuning: fp32 parameters in a model that computes in bf16."""
    model = base(arch, torch.bfloat16, tied=True)
    want, ids = logits(model, batch()), batch()
    adapted = attach(model, Method(None, unfreeze=("*",)))
    assert len(adapted.params()) == len(list(model.parameters()))
    assert same_bits(logits(model, ids), want)
    loss_of(model.train(), ids).backward()
    assert {p.tensor.dtype for p in adapted.params()} == {torch.float32}
    assert sum(p.tensor.grad is not None for p in adapted.params()) > 0.8 * len(adapted.params())
    adapted.detach()
    assert same_bits(logits(model.eval(), ids), want)


def test_switching_and_disabling_exchange_the_parameters() -> None:
    model = tiny_model("bert", task="sequence-classification")
    original = model.classifier.weight
    adapted = awaken(attach(model, get_method("lora", unfreeze=("classifier",)), name="a"))
    mine = model.classifier.weight
    awaken(adapted.add("b", get_method("lora", unfreeze=("classifier",))), seed=2)
    theirs = model.classifier.weight
    assert len({id(original), id(mine), id(theirs)}) == 3
    adapted.switch("a")
    assert model.classifier.weight is mine
    with adapted.disabled():
        assert model.classifier.weight is original
    assert adapted.switch().model.classifier.weight is original
    with pytest.raises(Incompatible, match="only one"):
        adapted.switch("a", "b")
    with pytest.raises(Incompatible, match="cannot be scaled"):
        adapted.scale("a", 0.5)
    adapted.detach()
    assert model.classifier.weight is original


def test_what_was_trained_is_in_the_adapter() -> None:
    model = tiny_model("bert", task="sequence-classification")
    adapted = awaken(attach(model, get_method("lora", unfreeze=("classifier",))))
    state = adapted.state()
    assert state.unfrozen().keys() == {"classifier.weight", "classifier.bias"}
    fresh = attach(tiny_model("bert", task="sequence-classification"), get_method("lora"), name="x").add("y", state)
    assert same_bits(logits(fresh.model, batch()), logits(model, batch()))


def test_one_adapter_casting_a_module_and_another_adapting_it_come_apart_in_any_order() -> None:
    casting, adapting = {"unfreeze": ("q_proj",), "sites": "v_proj"}, {"sites": "q_proj"}
    for first, second in ((casting, adapting), (adapting, casting)):
        model = base("llama", torch.bfloat16)
        before, want = everything(model), logits(model, batch())
        adapted = attach(model, get_method("lora", **first), name="a").add("b", get_method("lora", **second))
        for names in (("a",), ("b",), ("a", "b")):
            assert same_bits(logits(adapted.switch(*names).model, batch()), want)
        loss_of(model.train(), batch()).backward()
        adapted.detach()
        assert not [m for m in model.modules() if type(m).__name__.startswith(("Casting", "Adapted"))]
        assert all(same_bits(v, before[k]) for k, v in everything(model.eval()).items())
