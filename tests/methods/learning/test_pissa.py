"""PiSSA's acceptance properties (arXiv:2404.02948)."""

import math

import pytest
import torch
from torch import Tensor, nn

from lorakit import Adapter, BadParameter, attach, get_method
from lorakit.core.method import Recipe
from lorakit.parts.inits.triplets import principal
from tests.laws.steps import Run
from tests.laws.subject import awaken, base, batch, far, logits, same_bits, subject
from tests.methods.tools import gen, layer, normal, teacher


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [4.0, 16.0])
@pytest.mark.parametrize(("arch", "sites"), [("llama", "all-linear"), ("gpt2", "all-linear"), ("gpt2", "qv"), ("llama", "embedding")])
def test_the_start_is_w(arch: str, sites: str, alpha: float, dtype: torch.dtype) -> None:
    """‖W_res + s·B₀A₀ − W‖ / ‖W‖ < 1e-6; with the anchor it is zero in any precision."""
    adapted = subject("pissa", arch, dtype=dtype, awake=False, sites=sites, alpha=alpha)
    for branch in adapted.branches():
        d, W = branch.delta, branch.base.dense(torch.float32)
        residual = W - d.s * d.B0 @ d.A0
        assert (residual + d.s * (d.B @ d.A) - W).norm() / W.norm() < 1e-6
        assert not branch.weight().any()


def test_the_product_does_not_depend_on_s() -> None:
    products = []
    for alpha in (1.0, 4.0, 64.0):
        adapted = layer(get_method("pissa", r=4, alpha=alpha, sites="w"))
        d = adapted.branches()[0].delta
        assert d.s == alpha / 4
        products.append(d.s * d.B @ d.A)
        assert d.A.norm().item() == pytest.approx(d.B.norm().item())
    assert all(far(p, products[0]) < 1e-12 for p in products)


def test_the_spectrum_is_split() -> None:
    for alpha in (4.0, 10.0):
        adapted = layer(get_method("pissa", r=4, alpha=alpha, sites="w"))
        (branch,) = adapted.branches()
        d, W = branch.delta, branch.base.dense()
        S = torch.linalg.svdvals(W)
        left = torch.linalg.svdvals(W - (d.s * d.B @ d.A).detach())
        torch.testing.assert_close(left[: len(S) - 4], S[4:])
        assert left[len(S) - 4 :].max() < 1e-12
        want = torch.diag(S[:4] / d.s)
        torch.testing.assert_close((d.A @ d.A.T).detach(), want, atol=1e-12, rtol=1e-10)
        torch.testing.assert_close((d.B.T @ d.B).detach(), want, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(("arch", "sites"), [("llama", ["all-linear", "embedding"]), ("gpt2", "all-linear")])
def test_it_is_plain_lora_of_twice_the_rank_on_the_untouched_base(arch: str, sites: object) -> None:
    adapted = subject("pissa", arch, awake=False, sites=sites, alpha=12.0)
    Run(adapted, total=8).steps(3)
    state, tensors = adapted.state(), {}
    for site in state.sites:
        t = state.of(site)
        tensors |= {f"{site.name}.A": torch.cat([t["A"], t["A0"]]), f"{site.name}.B": torch.cat([t["B"], -t["B0"]], 1)}
    lora = Adapter(Recipe("lora", {"r": 8, "alpha": 24.0, "sites": sites}), state.sites, tensors)
    fresh = attach(base(arch), get_method("lora"), name="x").add("y", lora)
    adapted.model.eval()
    assert far(logits(fresh.model, batch()), logits(adapted.model, batch())) < 1e-5
    assert far(logits(adapted.model, batch()), logits(base(arch), batch())) > 1e-3


def test_training_is_that_of_the_papers_form_which_rewrites_w() -> None:
    """W_res frozen in the layer, A and B of LoRA at A₀ and B₀: the same steps."""
    anchored = layer(get_method("pissa", r=4, alpha=6.0, sites="w"))
    d = anchored.branches()[0].delta
    rewritten = nn.ModuleDict({"w": nn.Linear(12, 10).double()})
    rewritten.w.load_state_dict({"weight": anchored.branches()[0].base.dense() - (d.s * d.B @ d.A).detach(), "bias": anchored.model.w.bias})
    literal = attach(rewritten, get_method("lora", r=4, alpha=6.0, sites="w"))
    literal.load_tensors("default", {"w.A": d.A, "w.B": d.B})
    x, y = normal(30, 12, seed=1), normal(30, 10, seed=2)
    losses = []
    for adapted in (anchored, literal):
        run = Run(adapted, total=20, data=lambda i: x, loss=lambda m, b: (m.w(b) - y).square().mean())
        losses.append(torch.stack([run.step() for _ in range(20)]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-8, atol=0)
    torch.testing.assert_close((d.B @ d.A).detach(), (literal.branches()[0].delta.B @ literal.branches()[0].delta.A).detach())
    assert losses[0][-1] < losses[0][0]


def test_it_starts_with_larger_gradients_than_noise_does() -> None:
    x, y = normal(30, 12, seed=1), normal(30, 10, seed=2)
    sizes = {}
    for name in ("pissa", "lora"):
        adapted = layer(get_method(name, r=4, alpha=4.0, sites="w"))
        (adapted.model.w(x) - y).square().mean().backward()
        sizes[name] = sum(p.tensor.grad.square().sum() for p in adapted.params())
    assert sizes["pissa"] > 4 * sizes["lora"]


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_randomized_triplets(shape: tuple[int, int]) -> None:
    d_out, d_in = shape
    W = teacher(d_out, d_in, [8.0, 6.0, 5.0, 4.0]) + 0.3 * normal(d_out, d_in, seed=5) / math.sqrt(d_in)

    def product(niter: int) -> Tensor:
        U, S, Vh = principal(W, 4, niter, gen(0))
        assert (U.shape, S.shape, Vh.shape) == ((d_out, 4), (4,), (4, d_in))
        torch.testing.assert_close(U.T @ U, torch.eye(4, dtype=torch.float64))
        torch.testing.assert_close(Vh @ Vh.T, torch.eye(4, dtype=torch.float64))
        return U * S @ Vh

    assert far(product(16), product(0)) < 1e-10
    assert far(product(4), product(0)) < 1e-3
    best = (W - product(0)).norm()
    assert best.item() == pytest.approx(torch.linalg.svdvals(W)[4:].norm().item())
    assert torch.equal(principal(W, 4, 4, gen(0))[1], principal(W, 4, 4, gen(0))[1])


def test_randomized_init_is_still_an_exact_start() -> None:
    adapted = subject("pissa", awake=False, niter=2)
    assert all(not b.weight().any() for b in adapted.branches())
    assert far(logits(adapted.model, batch()), logits(base(), batch())) < 1e-5


def test_other_adapters_on_the_base_stay_right() -> None:
    adapted = awaken(attach(base(), get_method("lora", r=4), name="a"))
    want = logits(adapted.model, batch())
    adapted.add("b", get_method("pissa", r=4)).switch("a")
    assert same_bits(logits(adapted.model, batch()), want)


def test_what_has_no_root_is_refused() -> None:
    for wrong in ({"alpha": 0.0}, {"alpha": -2.0}, {"alpha_pattern": {"q_proj": -1.0}}):
        with pytest.raises(BadParameter, match="alpha > 0"):
            attach(base(), get_method("pissa", **wrong))
    with pytest.raises(BadParameter, match="niter"):
        get_method("pissa", niter=-1)
