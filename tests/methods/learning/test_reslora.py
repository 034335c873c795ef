"""ResLoRA's acceptance properties (arXiv:2402.18039)."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit import Adapted, attach, get_method
from lorakit.core.calibrate import Calibration
from lorakit.core.errors import BadParameter, Incompatible, NotExportable, NotMergeable
from lorakit.methods.learning.reslora import Links, Residual, approximate
from tests.laws.steps import Run
from tests.laws.subject import awaken, base, batch, calibration, far, logits, loss_of, same_bits, subject
from tests.methods.tools import normal

VARIANTS = ("is", "bs", "ms")


class Net(nn.Module):
    """Three linear layers in a row, each called w."""

    def __init__(self, d: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"w": nn.Linear(d, d, bias=False)}) for _ in range(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer["w"](x).tanh()  # type: ignore[index]
        return x


def net(**kwargs: Any) -> Adapted:
    torch.manual_seed(0)
    return awaken(attach(Net(), get_method("reslora", r=2, alpha=4.0, sites="w", **kwargs)), size=0.3)


def brute(adapted: Adapted, variant: str, pre: int) -> Tensor:
    """The formulas, written out."""
    pairs = [(b.delta.A, b.delta.B) for b in adapted.branches()]
    weights = [layer["w"].weight for layer in adapted.model.layers]
    x, seen = normal(5, 6, seed=2), []
    for n, W in enumerate(weights):
        A, B = pairs[n]
        seen.append(x)
        before = [n - i for i in range(1, n + 1)][: pre if pre >= 0 else None]
        if variant == "is":
            change = (x + sum(seen[k] for k in before[:1])) @ A.T @ B.T
        elif variant == "bs":
            change = x @ A.T @ B.T + sum(x @ pairs[k][0].T @ pairs[k][1].T for k in before)
        else:
            change = (x @ A.T + sum(seen[k] @ pairs[k][0].T for k in before)) @ B.T
        x = (x @ W.T + 2.0 * change).tanh()
    return x


def error(variant: str, pre: int = 4) -> float:
    adapted = net(variant=variant, pre=pre)
    return far(adapted.model(normal(5, 6, seed=2)).detach(), brute(adapted, variant, pre).detach())


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_equals_the_formula_written_out(variant: str) -> None:
    for pre in (1, 2, -1):
        assert error(variant, pre) < 1e-13


def test_mutants_of_the_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    links = Links.__init__

    def doubled(self: Links, sites: Any, pre: int) -> None:  # the official code: a first layer is its own predecessor
        links(self, sites, pre)
        self.before[sites[0].name] = [sites[0]]

    with monkeypatch.context() as m:
        m.setattr(Links, "__init__", doubled)
        assert error("is") > 1e-2

    def backward(self: Links, sites: Any, pre: int) -> None:
        links(self, sites, pre)
        self.before[sites[2].name] = [sites[0]]

    with monkeypatch.context() as m:
        m.setattr(Links, "__init__", backward)
        for variant in VARIANTS:
            assert error(variant) > 1e-3


def test_chains_link_equal_places_of_layers_and_nothing_else() -> None:
    adapted = subject("reslora", model={"num_hidden_layers": 3}, sites="all-linear", pre=-1)
    names = {b.site.name: [d.site.name for d in b.delta.chain] for b in adapted.branches()}
    assert names["model.layers.0.self_attn.q_proj"] == []
    assert names["model.layers.2.self_attn.q_proj"] == ["model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.q_proj"]
    assert names["model.layers.1.mlp.down_proj"] == ["model.layers.0.mlp.down_proj"]
    some = subject("reslora", model={"num_hidden_layers": 3}, sites=["layers.0.mlp.up_proj", "layers.2.mlp.up_proj"])
    assert [len(b.delta.chain) for b in some.branches()] == [0, 1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_start_is_the_base_and_detaching_leaves_no_tap(variant: str) -> None:
    adapted = subject("reslora", awake=False, variant=variant)
    want = logits(base(), batch())
    assert same_bits(logits(adapted.model.eval(), batch()), want)
    model = adapted.detach()
    assert not any("lora" in name for name, _ in model.named_modules())


def test_block_shortcuts_merge_exactly_and_the_others_say_why_not() -> None:
    adapted = subject("reslora", variant="bs", dtype=torch.float64)
    live = logits(adapted.model.eval(), batch())
    assert far(logits(adapted.merge(), batch()), live) < 1e-12
    adapted.unmerge()
    assert len(adapted.state().factors()["model.layers.1.self_attn.q_proj"].A) == 8
    for variant in ("is", "ms"):
        other = subject("reslora", variant=variant)
        with pytest.raises(NotMergeable, match="not linear"):
            other.merge()
        with pytest.raises(NotExportable, match="more than a change of weights"):
            other.state().factors()


def test_a_first_layers_a_learns_through_the_second_even_without_its_own_path() -> None:
    """ms: the gradient of A_1 has the second layer's term."""
    adapted = net(variant="ms")
    first, *_ = adapted.branches()
    with torch.no_grad():
        first.delta.B.zero_()
        adapted.model.layers[1]["w"].weight.zero_()
    adapted.model(normal(5, 6, seed=2)).square().sum().backward()
    assert first.delta.A.grad.abs().max() > 1e-6
    lora = awaken(attach(Net(), get_method("lora", r=2, sites="w")), size=0.3)
    with torch.no_grad():
        lora.branches()[0].delta.B.zero_()
        lora.model.layers[1]["w"].weight.zero_()
    lora.model(normal(5, 6, seed=2)).square().sum().backward()
    assert not lora.branches()[0].delta.A.grad.any()


@pytest.mark.parametrize("variant", ["is", "ms"])
def test_checkpointing_reads_the_forwards_own_predecessors(variant: str) -> None:
    """Two forwards before one backward: a memo that all forwards shared would mix them."""

    def grads(checkpointed: bool) -> list[Tensor]:
        adapted = subject("reslora", variant=variant, model={"num_hidden_layers": 3})
        if checkpointed:
            adapted.model.activation_checkpointing_enable({"use_reentrant": False})
        model = adapted.model.train()
        (loss_of(model, batch(0)) - 0.5 * loss_of(model, batch(1))).backward()
        return [p.tensor.grad for p in adapted.params()]

    for one, two in zip(grads(False), grads(True), strict=True):
        assert far(one, two) < 1e-5


def test_decoding_with_a_cache_equals_the_whole_forward() -> None:
    adapted = subject("reslora", variant="ms", dtype=torch.float64)
    ids = batch()
    model = adapted.model.eval()
    whole = logits(model, ids)
    with torch.no_grad():
        out = model(input_ids=ids[:, :4], use_cache=True)
        last = model(input_ids=ids[:, 4:], past_key_values=out.past_key_values).logits
    assert far(last, whole[:, 4:]) < 1e-12


@pytest.mark.parametrize("variant", ["is", "ms"])
def test_the_approximation_is_labeled_and_beats_dropping_the_paths(variant: str) -> None:
    """Where inputs hardly change from layer to layer, x_{n−1} = x_n nearly, the folded pair is near; forgetting the path is not."""

    class Still(Net):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + 0.01 * layer["w"](x)  # type: ignore[index]
            return x

    torch.manual_seed(0)
    adapted = awaken(attach(Still(), get_method("reslora", r=2, alpha=4.0, sites="w", variant=variant)), size=0.3)
    x = normal(50, 6, seed=2)
    data = Calibration([{}], lambda model, _: (model(x).sum(), 1))
    want = adapted.model(x).detach() - x
    folded, ratios = approximate(adapted, data)
    assert folded.meta["approximates"] == "reslora (bi)"
    assert [len(r) for r in ratios.values()] == ([0, 1, 1] if variant == "is" else [0, 1, 2])
    assert ratios["layers.1.w"][0] == pytest.approx(1.0, abs=0.05)
    plain = dict(adapted.state().tensors)
    adapted.add("folded", folded)
    near = far(adapted.model(x).detach() - x, want)
    adapted.load_tensors("folded", plain)
    without = far(adapted.model(x).detach() - x, want)
    assert near < 0.2 * without


def test_weights_norms_give_the_other_ratio_and_the_base_is_not_mutated() -> None:
    adapted = subject("reslora", variant="ms")
    before = {n: p.clone() for n, p in adapted.model.named_parameters()}
    _, ratios = approximate(adapted, calibration(2), "bw")
    W = [layer.mlp.up_proj.weight.norm() for layer in adapted.model.model.layers]
    assert ratios["model.layers.1.mlp.up_proj"] == pytest.approx([float(W[0] / W[1])])
    assert all(same_bits(before[n], p) for n, p in adapted.model.named_parameters())


def loss_after(method: str, target: Any, steps: int = 400, **kwargs: Any) -> float:
    torch.manual_seed(0)
    adapted = attach(Net(), get_method(method, r=1, alpha=1.0, sites="w", **kwargs))
    optimizer = torch.optim.Adam([p.tensor for p in adapted.params()], lr=1e-2)
    x = normal(200, 6, seed=2)
    want = target(adapted, x)
    for _ in range(steps):
        loss = (adapted.model(x) - want).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_it_wins_on_a_target_that_skips_a_layer_and_loses_on_one_that_does_not() -> None:
    """Planted: the last layer needs what the first one saw, which the dead middle layer destroys; and a LoRA teacher, whose
    layers' changes of rank r are independent, where block shortcuts add the first one's to all."""

    def skipping(adapted: Adapted, x: Tensor) -> Tensor:
        with torch.no_grad():
            adapted.model.layers[1]["w"].weight.zero_()  # nothing passes through
            return (2 * (x @ normal(6, 1, seed=8) @ normal(1, 6, seed=9)) / 6).tanh()

    assert loss_after("reslora", skipping, variant="ms") < 0.5 * loss_after("lora", skipping)

    def plain(adapted: Adapted, x: Tensor) -> Tensor:
        torch.manual_seed(0)
        teacher = awaken(attach(Net(), get_method("lora", r=1, alpha=1.0, sites="w")), size=0.5)
        return teacher.model(x).detach()

    assert loss_after("lora", plain, 1500) < 0.2 * loss_after("reslora", plain, 1500, variant="bs")


def test_impossible_parameters_are_refused() -> None:
    for kwargs, says in (({"pre": 0}, "pre=0"), ({"variant": "xs"}, "variant"), ({"dropout": 1.0}, "dropout=1.0")):
        with pytest.raises(BadParameter, match=says):
            get_method("reslora", **kwargs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_resumes_and_reloads(variant: str) -> None:
    straight = Run(subject("reslora", awake=False, variant=variant, dropout=0.25), total=6).steps(4)
    again = Run(subject("reslora", awake=False, variant=variant, dropout=0.25), total=6)
    again.restore(Run(subject("reslora", awake=False, variant=variant, dropout=0.25), total=6).steps(2).state()).steps(2)
    for name, tensor in straight.adapted.tensors("default").items():
        assert same_bits(tensor, again.adapted.tensors("default")[name]), name
    fresh = subject("reslora", awake=False, variant=variant)
    fresh.add("saved", straight.adapted.state())
    assert same_bits(logits(fresh.model.eval(), batch()), logits(straight.adapted.model.eval(), batch()))
    assert all(isinstance(b.delta, Residual) for b in fresh.branches())


def test_a_mixtures_experts_are_refused() -> None:
    with pytest.raises(Incompatible, match="cannot adapt"):
        attach(base("mixtral"), get_method("reslora", r=2, sites="experts"))


def test_ranks_may_differ_along_a_chain_only_where_products_are_added() -> None:
    pattern = {r"layers\.1\.self_attn\.q_proj": 2}
    with pytest.raises(BadParameter, match=r"q_proj of rank 2 cannot add .*q_proj of rank 4"):
        subject("reslora", variant="ms", r=4, sites=["q_proj"], rank_pattern=pattern)
    adapted = subject("reslora", variant="bs", r=4, sites=["q_proj"], rank_pattern=pattern)
    assert [b.delta.bound() for b in adapted.branches()] == [4, 6]
