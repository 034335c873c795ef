"""The handle: several adapters, switching, scaling, disabling, and what cannot be done."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lorakit import Adapted, AdapterMismatch, BadParameter, Incompatible, LorakitError, NoSuchSite, attach, get_method
from lorakit.data.tiny import tiny_model
from tests.laws.subject import awaken, base, batch, everything, far, logits, loss_of, same_bits, subject


def two() -> Adapted:
    """Adapters a (LoRA on q, v) and b (DoRA on q), both away from their starts; b is active."""
    adapted = awaken(attach(base(), get_method("lora", r=4, sites="qv"), name="a"))
    return awaken(adapted.add("b", get_method("dora", r=4, sites="q_proj"), seed=3), seed=2)


def of(adapted: Adapted, *names: str) -> Tensor:
    return logits(adapted.switch(*names).model, batch())


# --- several adapters -----------------------------------------------------------------------------------------------------------


def test_each_adapter_alone_is_what_it_is_without_the_other() -> None:
    adapted = two()
    plain = logits(base(), batch())
    assert same_bits(of(adapted), plain)
    alone = awaken(attach(base(), get_method("lora", r=4, sites="qv")))
    assert same_bits(of(adapted, "a"), logits(alone.model, batch()))
    assert not same_bits(of(adapted, "b"), of(adapted, "a"))


def test_updates_of_active_adapters_add_up() -> None:
    adapted = two()
    layer = adapted.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    with torch.no_grad():
        outs = {}
        for names in ((), ("a",), ("b",), ("a", "b"), ("b", "a")):
            adapted.switch(*names)
            outs[names] = layer(x)
    both = outs["a",] + outs["b",] - outs[()]
    torch.testing.assert_close(outs["a", "b"], both)
    torch.testing.assert_close(outs["b", "a"], both)
    assert far(logits(adapted.merge(), batch()), logits(adapted.unmerge(), batch())) < 1e-5


def test_naming_one_adapter_twice_is_naming_it_once() -> None:
    adapted = two()
    assert same_bits(of(adapted, "a", "a"), of(adapted, "a"))
    assert adapted.active == ("a",)


def test_only_active_adapters_are_trainable() -> None:
    adapted = two()
    for names in (("a",), ("b",), ("a", "b"), ()):
        adapted.switch(*names)
        trainable = {id(p) for p in adapted.model.parameters() if p.requires_grad}
        assert trainable == {id(p.tensor) for p in adapted.params()}
        assert len(trainable) == sum({"a": 2 * 4, "b": 3 * 2}[n] for n in names)


def test_scale_is_linear_in_the_output_and_merges() -> None:
    for name in ("lora", "dora", "pissa", "adalora"):
        adapted = subject(name, sites="q_proj")
        layer, x = adapted.model.model.layers[0].self_attn.q_proj, torch.randn(3, 32)
        with torch.no_grad():
            full = layer(x)
            with adapted.disabled():
                frozen = layer(x)
            for w in (0.0, 0.5, -1.0, 2.0):
                adapted.scale("default", w)
                torch.testing.assert_close(layer(x), frozen + w * (full - frozen), msg=lambda m, name=name: f"{name}: {m}")
                live = logits(adapted.model, batch())
                assert far(logits(adapted.merge(), batch()), live) < 1e-5
                adapted.unmerge()
        adapted.scale("default", 1)
        with torch.no_grad():
            assert same_bits(layer(x), full)


def test_disabled_is_the_base_exactly_and_comes_back() -> None:
    adapted = attach(tiny_model("bert", task="sequence-classification"), get_method("lora", unfreeze=("classifier",)))
    awaken(adapted)
    plain = logits(tiny_model("bert", task="sequence-classification"), batch())
    live = logits(adapted.model, batch())
    required = [p.requires_grad for p in adapted.model.parameters()]
    with adapted.disabled():
        assert same_bits(logits(adapted.model, batch()), plain)
        with adapted.disabled():
            assert same_bits(logits(adapted.model, batch()), plain)
        assert same_bits(logits(adapted.model, batch()), plain)
    assert same_bits(logits(adapted.model, batch()), live)
    assert [p.requires_grad for p in adapted.model.parameters()] == required
    with pytest.raises(ZeroDivisionError), adapted.disabled():
        raise ZeroDivisionError
    assert same_bits(logits(adapted.model, batch()), live)


def test_a_finished_adapter_is_added_under_another_name() -> None:
    adapted = two()
    state = adapted.state("b")
    other = attach(base(), get_method("lora"), name="x").add("y", state)
    assert same_bits(of(other, "y"), of(adapted, "b"))
    assert adapted.state("b").tensors.keys() == state.tensors.keys()


def test_what_is_known_about_one_adapter_is_not_said_of_another() -> None:
    adapted = two()
    adapted.switch("a").meta = {"task": "one"}
    adapted.meta |= {"steps": 3}
    state = adapted.state("a")
    assert adapted.state("b").meta.keys() == {"base"}
    other = attach(base(), get_method("lora"), name="x").add("y", state)
    assert other.meta == {"task": "one", "steps": 3}
    assert other.state("x").meta.keys() == {"base"}
    with pytest.raises(BadParameter, match="name the adapter"):
        adapted.switch("a", "b").meta  # noqa: B018


def test_state_is_a_copy() -> None:
    adapted = two()
    state = adapted.state()
    awaken(adapted)
    assert all(not same_bits(state.tensors[k], v) for k, v in adapted.tensors("b").items())


def test_two_methods_on_parts_of_one_fused_weight() -> None:
    adapted = awaken(attach(base("gpt2"), get_method("lora", sites="c_attn[q]"), name="a"))
    awaken(adapted.add("b", get_method("dora", sites="c_attn")), seed=2)
    live = of(adapted, "a", "b")
    assert far(logits(adapted.merge(), batch()), live) < 1e-5
    assert same_bits(of(adapted.unmerge() and adapted, "a", "b"), live)


# --- what cannot be done -----------------------------------------------------------------------------------------------------------


def resized(adapted: Adapted, sites: str) -> object:
    return adapted.add("e", get_method("lora", sites=sites)).model.resize_token_embeddings(140)


REFUSED: dict[str, tuple[type[LorakitError], str, Callable[[Adapted], object]]] = {
    "an unknown adapter": (BadParameter, "Did you mean", lambda a: a.switch("aa")),
    "scaling an unknown adapter": (BadParameter, "no adapter is called 'c'", lambda a: a.scale("c", 2.0)),
    "a name taken": (BadParameter, "already attached", lambda a: a.add("a", get_method("lora"))),
    "a name that torch has taken": (BadParameter, "choose another", lambda a: a.add("eval", get_method("lora"))),
    "a name with a dot": (BadParameter, "letters", lambda a: a.add("a.b", get_method("lora"))),
    "a second attach": (Incompatible, "already adapted", lambda a: attach(a.model, get_method("lora"))),
    "resizing": (Incompatible, "detach", lambda a: a.add("e", get_method("lora", sites="embedding")).model.resize_token_embeddings(140)),
    "resizing under a head": (
        Incompatible,
        "detach",
        lambda a: a.add("h", get_method("lora", sites="lm_head")).model.resize_token_embeddings(140),
    ),
    "state of two": (BadParameter, "name the adapter", lambda a: a.switch("a", "b").state()),
    "adding while merged": (Incompatible, "unmerge", lambda a: a.merge() and a.add("c", get_method("lora"))),
    "switching while merged": (Incompatible, "unmerge", lambda a: a.merge() and a.switch("a")),
    "scaling while merged": (Incompatible, "unmerge", lambda a: a.merge() and a.scale("a", 2.0)),
    "merging twice": (Incompatible, "unmerge", lambda a: a.merge() and a.merge()),
    "disabling while merged": (Incompatible, "unmerge", lambda a: a.merge() and a.disabled().__enter__()),
}


@pytest.mark.parametrize("what", REFUSED)
def test_is_refused_with_a_way_out(what: str) -> None:
    error, says, call = REFUSED[what]
    adapted = two()
    with pytest.raises(error, match=says):
        call(adapted)
    adapted.unmerge()
    adapted.switch("a", "b")
    assert same_bits(logits(adapted.model, batch()), of(two(), "a", "b"))


@pytest.mark.parametrize(
    "method",
    [
        lambda: get_method("lora", sites="nope"),
        lambda: get_method("lora", unfreeze=("nope",)),
        lambda: get_method("lora", r=1000),
        lambda: get_method("pissa", alpha=-1.0),
    ],
)
def test_a_failed_attach_or_add_changes_nothing(method: Callable[[], object]) -> None:
    model = base()
    before, hooks = everything(model), len(model._forward_pre_hooks)
    with pytest.raises(LorakitError):
        attach(model, method())
    assert len(model._forward_pre_hooks) == hooks
    assert {type(m).__name__ for m in model.modules()} == {type(m).__name__ for m in base().modules()}
    assert everything(model).keys() == before.keys()
    assert all(p.requires_grad for p in model.parameters())
    adapted = two()
    want, params = logits(adapted.model, batch()), [p.name for p in adapted.params()]
    with pytest.raises(LorakitError):
        adapted.add("c", method())
    assert adapted.active == ("b",)
    assert [p.name for p in adapted.params()] == params
    assert all(p.tensor.requires_grad for p in adapted.params())
    assert same_bits(logits(adapted.model, batch()), want)
    adapted.add("c", get_method("lora"))


def test_an_adapter_for_another_model_is_refused() -> None:
    state = subject("lora").state()
    for model, says in ((base("gpt2"), "lacks"), (base("llama", hidden_size=64), "other shapes")):
        adapted = attach(model, get_method("lora"))
        with pytest.raises(AdapterMismatch, match=says):
            adapted.add("x", state)
        assert adapted.active == ("default",)


def test_errors_name_the_nearest_site() -> None:
    with pytest.raises(NoSuchSite, match="Did you mean 'q_proj'"):
        attach(base(), get_method("lora", sites="q_porj"))


# --- the model goes on being a model ----------------------------------------------------------------------------------------------


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("how", [copied, pickled])
@pytest.mark.parametrize("name", ["lora", "dora", "adalora"])
def test_deepcopy_and_pickle(name: str, how: Callable[[nn.Module], nn.Module], arch: str) -> None:
    sites = ["all-linear", "embedding"] if arch == "llama" else "qv"
    adapted = subject(name, arch, sites=sites, dropout=0.25, unfreeze=("lm_head",), model={"tied": True})
    if how is copied:  # Transformers' own checkpointing hook does not pickle
        adapted.model.train().activation_checkpointing_enable({"use_reentrant": False})
        loss_of(adapted.model, batch()).backward()  # the checkpointing functions now hold the context
    other = how(adapted.model)
    assert {type(m).__name__ for m in other.modules()} == {type(m).__name__ for m in adapted.model.modules()}
    assert not {id(m) for m in other.modules()} & {id(m) for m in adapted.model.modules()}
    assert same_bits(logits(other.eval(), batch()), logits(adapted.model.eval(), batch()))
    with torch.no_grad():
        for p in adapted.params():
            p.tensor.zero_()
    assert not same_bits(logits(other, batch()), logits(adapted.model, batch()))
    torch.manual_seed(1)
    loss_of(other.train(), batch()).backward()
    assert any(p.grad is not None for p in other.parameters() if p.requires_grad)


def test_an_unfrozen_half_precision_model_copies_too() -> None:
    adapted = subject("lora", "bert", dtype=torch.bfloat16, unfreeze=("*.bias", "LayerNorm"))
    for how in (copied, pickled):
        assert same_bits(logits(how(adapted.model), batch()), logits(adapted.model, batch()))


@pytest.mark.parametrize("name", ["lora", "dora"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
def test_generate(name: str, arch: str) -> None:
    sites = ["all-linear", "embedding"] if arch == "llama" else "all-linear"
    adapted = subject(name, arch, sites=sites)
    ids = batch(length=4)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = adapted.model.generate(ids, **settings)
    assert torch.equal(cached, adapted.model.generate(ids, **settings, use_cache=False))
    adapted.merge()
    assert torch.equal(cached, adapted.model.generate(ids, **settings))
    adapted.unmerge()
    with adapted.disabled():
        assert torch.equal(adapted.model.generate(ids, **settings), base(arch).generate(ids, **settings))


def test_isinstance_names_and_parameters_stay() -> None:
    model = base()
    names = [n for n, _ in model.named_parameters()]
    attach(model, get_method("lora", sites=["all-linear", "embedding"]))
    q = model.model.layers[0].self_attn.q_proj
    assert isinstance(q, nn.Linear)
    assert type(q).__name__ == "AdaptedLinear"
    assert [n for n, _ in model.named_parameters() if ".lora." not in n] == names
    assert model.get_input_embeddings() is model.model.embed_tokens


def test_a_model_that_is_a_single_layer_inside_a_container() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    adapted = awaken(attach(model, get_method("lora", r=2)))
    x = torch.randn(3, 6)
    live = model(x)
    adapted.merge()
    torch.testing.assert_close(model(x), live)
    assert adapted.detach() is model


def test_autocast_and_half_inputs() -> None:
    for name in ("lora", "dora", "pissa", "adalora"):
        adapted = subject(name, dropout=0.25)
        adapted.model.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(adapted.model, batch())
        loss.backward()
        assert all(p.tensor.grad is not None and p.tensor.grad.isfinite().all() for p in adapted.params())


def test_given_is_restored_after_an_error_and_nests() -> None:
    adapted, found = subject("lora"), []
    with pytest.raises(ZeroDivisionError), adapted.given(step=7):  # noqa: PT012
        with adapted.given(step=8):
            found.append(adapted.context.key.tolist())
        found.append(adapted.context.key.tolist())
        raise ZeroDivisionError
    assert found == [[0, 8], [0, 7]]
    assert not adapted.cell.given


@pytest.mark.parametrize(("dropout", "same"), [(0.0, True), (0.1, False)])
def test_an_adapter_without_masks_leaves_the_bases_own_dropout_alone(dropout: float, same: bool) -> None:
    """The base draws its masks from torch's global generator, from which only a delta with masks of its own may draw too."""
    model = tiny_model("gpt2", resid_pdrop=0.2).train()
    ids = torch.arange(10)[None]
    torch.manual_seed(3)
    alone = model(ids).logits
    attach(model, get_method("lora", r=2, dropout=dropout))
    torch.manual_seed(3)
    assert torch.equal(model(ids).logits, alone) is same


def test_merge_and_unload_leaves_a_plain_model_with_the_merged_weights() -> None:
    model = tiny_model("llama")
    plain = {name: type(m) for name, m in model.named_modules()}
    ids = torch.arange(10)[None]
    adapted = attach(model, get_method("dora", r=2, unfreeze="norm"))
    with torch.no_grad():
        for row in adapted.params():
            row.tensor.add_(0.1 * torch.randn_like(row.tensor))
    before = model(ids).logits
    assert adapted.merge_and_unload() is model
    assert torch.allclose(model(ids).logits, before, atol=1e-4)
    assert {name: type(m) for name, m in model.named_modules()} == plain
    assert not model._forward_pre_hooks
