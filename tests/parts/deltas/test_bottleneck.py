"""The bottleneck against the same written plainly, and the draw that silences layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lorakit import BadParameter, Site
from lorakit.core.context import Ctx
from lorakit.core.scale import Rank
from lorakit.parts.deltas.bottleneck import ACTIVATIONS, BottleneckSpec, Form
from tests.methods.tools import normal

PLAIN = {"relu": nn.ReLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"), "silu": nn.SiLU(), "tanh": nn.Tanh()}


def site(layer: int | None = 0, role: str = "down", d_in: int = 10, d_out: int = 6) -> Site:
    return Site(f"layers.{layer}.{role}", "linear", d_in, d_out, layer, role)


def form(r: int = 3, scale: float = 1.0, **rest) -> Form:
    return Form(Rank.of(r, scale, rule="constant"), **rest)


def built(spec: BottleneckSpec, at: Site, *, pool=None):
    delta = spec.build(at, pool=pool, dtype=torch.float64, device=torch.device("cpu"))
    with torch.no_grad():
        for i, p in enumerate(delta.parameters()):
            p.add_(normal(*p.shape, seed=i))
    return delta


def context(step: int = 0, seed: int = 0) -> Ctx:
    return Ctx(torch.tensor([seed, step]))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_up_of_f_of_down(activation, norm):
    delta = built(BottleneckSpec(form(scale=2.5, activation=activation, norm=norm)), site())
    plain = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3), PLAIN[activation], nn.Linear(3, 6)).double()
    if norm:
        plain[0].load_state_dict({"weight": delta.norm_weight, "bias": delta.norm_bias})
    else:
        plain[0] = nn.Identity()
    plain[1].load_state_dict({"weight": delta.A, "bias": delta.a})
    plain[3].load_state_dict({"weight": delta.B, "bias": delta.b})
    h = normal(2, 5, 6, seed=9)
    torch.testing.assert_close(delta(h, context()), 2.5 * plain(h))


def test_ids_are_one_hot_rows():
    at = Site("embed", "embedding", 10, 6, None, "embed")
    delta = built(BottleneckSpec(form(), beside=True), at)
    ids = torch.tensor([[1, 4, 9]])
    torch.testing.assert_close(delta(ids, context()), delta(F.one_hot(ids, 10).double(), context()))


def test_counts():
    for beside, norm, at in ((False, False, site()), (True, True, site()), (True, False, site(role="gate")), (False, True, site(role="q"))):
        spec = BottleneckSpec(form(norm=norm), beside)
        assert spec.count(at) == sum(p.numel() for p in built(spec, at).parameters())
    assert BottleneckSpec(form()).count(site()) == 2 * 3 * 6 + 3 + 6, "2 r d + r + d"


def spoken(drop_random: int, layers: int, *, step: int, training: bool = True) -> list[bool]:
    """Which layers change the output in one step."""
    deltas = [built(BottleneckSpec(form(drop_random=drop_random)), site(layer)).train(training) for layer in range(layers)]
    assert [d.draws for d in deltas] == [layer < drop_random for layer in range(layers)]
    return [bool(d(torch.ones(1, 6, dtype=torch.float64), context(step)).count_nonzero()) for d in deltas]


def test_the_first_n_layers_are_silent_together_and_n_is_uniform():
    counts = [0] * 4
    for step in range(400):
        speaks = spoken(3, 5, step=step)
        n = speaks.index(True)
        assert speaks == [layer >= n for layer in range(5)], "silent layers are the first ones"
        counts[n] += 1
    assert all(60 < c < 140 for c in counts), counts


def test_nobody_is_silent_outside_training_or_without_a_draw():
    assert all(spoken(3, 5, step=s, training=False) == [True] * 5 for s in range(20))
    assert all(spoken(0, 5, step=s) == [True] * 5 for s in range(20))
    assert BottleneckSpec(form(drop_random=3)).form.silence(site(None)) == 0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"dropout": 1.0}, "dropout=1.0"), ({"drop_random": -1}, "drop_random=-1"), ({"activation": "rellu"}, "Did you mean 'relu'")],
)
def test_impossible_values(wrong, said):
    with pytest.raises(BadParameter, match=said):
        form(**wrong)
