"""FourierFT's acceptance properties (arXiv:2405.03003). Every check below is shown able to fail by a mutant at the end."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.tuners.fourierft.layer import FourierFTLayer
from torch import Tensor

from lorakit import BadParameter, attach, get_method
from lorakit.methods.sharing import fourierft
from lorakit.ops import reference, spectral
from tests.adapters import test_trajectory_peft as trajectory
from tests.adapters.subject import quiet
from tests.laws.steps import Run
from tests.laws.subject import base, batch, far, logits, loss_of, same_bits, subject
from tests.methods.tools import fit, layer, normal, teacher


def few(n: int = 6, **kwargs: Any) -> Any:
    return get_method("fourierft", **{"n_frequency": n, "sites": "w", **kwargs})


def at(u: int, v: int, c: float, *, d_out: int = 10, d_in: int = 12, scaling: float = 150.0) -> Tensor:
    """ΔW of one entry."""
    (branch,) = layer(few(1, scaling=scaling), d_out=d_out, d_in=d_in).branches()
    with torch.no_grad():
        branch.delta.at.fill_((u % d_out) * d_in + v % d_in)
        branch.delta.c.fill_(c)
    return branch.weight().detach()


# --- the update ---------------------------------------------------------------------------------------------------------------


def check_count() -> None:
    """n a site whatever its shape, and another n where a pattern says so."""
    adapted = subject("fourierft", sites=["all-linear", "embedding"], n_frequency=30)
    assert adapted.params().numel() == 30 * len(adapted.branches())
    adapted = subject("fourierft", n_frequency=30, n_frequency_pattern={"q_proj": 7, r"layers\.1\.mlp\.\w+": 9})
    sizes = {b.site.name: len(b.delta.c) for b in adapted.branches()}
    assert sizes["model.layers.0.self_attn.q_proj"] == 7
    assert sizes["model.layers.1.mlp.up_proj"] == 9
    assert sizes["model.layers.0.mlp.up_proj"] == 30
    assert all(len(b.delta.at.unique()) == len(b.delta.c) for b in adapted.branches()), "no place twice"


def check_one_entry_is_a_plane_wave() -> None:
    """scaling · c / (d_out d_in) · cos 2π (u p / d_out + v q / d_in), of rank at most 2."""
    p, q = torch.arange(10.0, dtype=torch.float64)[:, None], torch.arange(12.0, dtype=torch.float64)
    for u, v in ((0, 0), (3, 5), (9, 1), (5, 6)):
        want = 110 * 1.3 / 120 * torch.cos(2 * math.pi * (u * p / 10 + v * q / 12))
        found = at(u, v, 1.3, scaling=110.0)
        assert (found - want).abs().max() < 1e-12
        assert int(torch.linalg.matrix_rank(found, atol=1e-9)) <= 2


def check_opposite_entries_are_the_same_wave() -> None:
    assert far(at(0, 4, 1.3), at(0, -4, 1.3)) < 1e-12
    for u, v in ((3, 5), (2, 4), (9, 11)):
        assert far(at(u, v, 1.3), at(-u, -v, 1.3)) < 1e-12
        assert far(at(u, -v, 1.3), at(u, v, 1.3)) > 0.1, "while turning one sign alone is another"


def check_the_size_of_the_start() -> None:
    """‖ΔW‖²_F ≈ scaling² n / (2 d_out d_in) for c ~ N(0, 1), and for every seed another."""
    norms = [layer(few(400), d_in=64, d_out=64, seed=seed).branches()[0].weight().norm().item() for seed in range(8)]
    assert sum(x**2 for x in norms) / 8 == pytest.approx(150**2 * 400 / (2 * 64 * 64), rel=0.1)
    assert len(set(norms)) == 8


def check_sites_of_one_shape_share_their_places() -> None:
    """And no others do; nor another entry_seed."""
    places = {b.site.name: b.delta.at for b in subject("fourierft", awake=False).branches()}
    first, second = (f"model.layers.{i}.self_attn." for i in (0, 1))
    assert torch.equal(places[first + "q_proj"], places[second + "o_proj"])
    assert not torch.equal(places[first + "q_proj"], places[first + "k_proj"])
    other = subject("fourierft", awake=False, entry_seed=3, sites="q_proj").branches()[0].delta.at
    assert not torch.equal(places[first + "q_proj"], other)


# --- the start ----------------------------------------------------------------------------------------------------------------


def check_zero_is_the_base_and_learns() -> None:
    method = get_method("fourierft", init="zero")
    assert method.identity
    assert not get_method("fourierft").identity
    for sites in ("all-linear", "embedding"):
        adapted = subject("fourierft", awake=False, sites=sites, init="zero")
        assert same_bits(logits(adapted.model, batch()), logits(base(), batch()))
        loss_of(adapted.model, batch()).backward()
        assert all(p.tensor.grad.abs().min() > 0 for p in adapted.params())
        normal_one = subject("fourierft", awake=False, sites=sites)
        assert far(logits(normal_one.model, batch()), logits(base(), batch())) > 0.1


# --- forward and backward -----------------------------------------------------------------------------------------------------


def check_gradients_go_through_the_spectrum() -> None:
    """∂L/∂c = scaling / (d_out d_in) · Re fft2(∂L/∂ΔW) at the places, ∂L/∂x = ∂L/∂y ΔW; by finite differences, and to second order."""
    (branch,) = layer(few(9)).branches()
    d = branch.delta
    x = normal(2, 3, 12).requires_grad_()
    y = d(x, None)
    g_y = normal(2, 3, 10, seed=4)
    g_x, g_c = torch.autograd.grad(y, [x, d.c], g_y)
    G = g_y.flatten(0, 1).T @ x.detach().flatten(0, 1)
    assert far(g_c, 150 / 120 * torch.fft.fft2(G).real.flatten()[d.at]) < 1e-12
    assert far(g_x, g_y @ branch.weight()) < 1e-12
    arguments = d.at, 10, 12, 1.5
    told = {"raise_exception": False}
    assert torch.autograd.gradcheck(lambda x, c: spectral.project(x, c, *arguments), (x, d.c), **told)
    assert torch.autograd.gradcheck(lambda c: spectral.project(torch.arange(12).view(3, 4), c, *arguments), (d.c,), **told)
    assert torch.autograd.gradgradcheck(lambda x, c: spectral.project(x, c, *arguments), (x, d.c), **told)


def check_nothing_dense_is_kept_for_backward() -> None:
    """x, c and the places: backward forms ΔW again."""
    delta = layer(few(6), d_in=40, d_out=30).branches()[0].delta
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        delta(normal(2, 40).requires_grad_(), None)
    assert kept
    assert max(kept) == 80 < 30 * 40


def check_half_precision() -> None:
    """The spectrum is transformed in fp32 whatever the base is, and ΔW rounded once."""
    adapted = subject("fourierft", dtype=torch.bfloat16, sites="q_proj")
    branch = adapted.branches()[0]
    assert branch.delta.c.dtype == branch.weight().dtype == torch.float32
    x = normal(3, 32, dtype=torch.float32).bfloat16()
    assert torch.equal(branch.delta(x, None), x @ branch.weight().bfloat16().T)


# --- what it learns -----------------------------------------------------------------------------------------------------------


def energy(target: Tensor, where: Tensor) -> float:
    """What of ‖T‖²_F lies at neither the places nor their opposites: the least that training can leave."""
    d_out, d_in = target.shape
    u, v = where // d_in, where % d_in
    mask = torch.ones_like(target)
    mask[u, v] = 0
    mask[(-u) % d_out, (-v) % d_in] = 0
    # with real coefficients an entry and its opposite give a cosine: the sine part, Im fft2, is out of reach everywhere
    F = torch.fft.fft2(target)
    return ((F.real * mask).square().sum() + F.imag.square().sum()).item() / target.numel()


def check_a_few_waves_are_found_where_lora_cannot() -> None:
    """Six waves at the shared places, of rank up to 12, from 6 values; LoRA of rank 1 has 22 and keeps most of it."""
    (branch,) = layer(few(6)).branches()
    with torch.no_grad():
        branch.delta.c.copy_(normal(6, seed=3) + 2)
    target = branch.weight().detach()
    assert fit(layer(few(6, init="zero")), target) < 1e-8
    floor = torch.linalg.svdvals(target)[1:].square().sum().item()
    assert fit(layer(get_method("lora", r=1, sites="w")), target) == pytest.approx(floor, rel=1e-6)
    assert floor > 0.3 * target.square().sum().item()


def check_a_generic_teacher_is_fitted_to_its_part_at_the_places() -> None:
    """A spike of rank 1 has its energy spread over the whole spectrum; LoRA of rank 1 fits it."""
    target = teacher(10, 12, [3.0])
    adapted = layer(few(6, init="zero"))
    floor = energy(target, adapted.branches()[0].delta.at)
    assert fit(adapted, target) == pytest.approx(floor, rel=1e-8)
    assert floor > 0.5 * 9
    assert fit(layer(get_method("lora", r=1, sites="w")), target) < 1e-8


# --- beside PEFT --------------------------------------------------------------------------------------------------------------


def beside(arch: str, model: Any, *, n: int = 30, scaling: float = 150.0, seed: int = 777) -> tuple[Any, Any]:
    """Ours and PEFT's on one model, with our coefficients in both."""
    targets = trajectory.TARGETS[arch]
    config = peft.FourierFTConfig(n_frequency=n, scaling=scaling, random_loc_seed=seed, target_modules=targets)
    with quiet():
        theirs = peft.get_peft_model(copy.deepcopy(model), config).train()
    method = get_method("fourierft", n_frequency=n, scaling=scaling, entry_seed=seed, sites=targets)
    adapted = attach(model.train(), method)
    with torch.no_grad():
        for ours, other in counterparts(adapted, theirs):
            other.copy_(ours)
    return adapted, theirs


def counterparts(adapted: Any, theirs: Any) -> list[tuple[Tensor, Tensor]]:
    named = dict(theirs.named_parameters())
    pairs = [(b.delta.c, named[f"base_model.model.{b.site.name}.fourierft_spectrum.default"]) for b in adapted.branches()]
    assert len(pairs) == sum(p.requires_grad for p in named.values())
    return pairs


def check_the_change_is_pefts() -> None:
    """The same bits of ΔW for the same seed, at Linear and Conv1D, and the same logits."""
    for arch in ("gpt_neox", "gpt2"):
        for seed, scaling in ((777, 150.0), (3, 97.3)):
            adapted, theirs = beside(arch, base(arch), seed=seed, scaling=scaling)
            for branch in adapted.branches():
                module = theirs.get_submodule(f"base_model.model.{branch.site.name}")
                assert same_bits(branch.weight().detach(), module.get_delta_weight("default").detach())
            assert far(logits(adapted.model.eval(), batch()), logits(theirs.eval(), batch())) < 1e-6


def in_fp64(m: pytest.MonkeyPatch) -> None:
    """PEFT's own get_delta_weight, with the two places at which it rounds to fp32 lifted: `.float()` and torch's default dtype."""
    own = FourierFTLayer.get_delta_weight

    def get_delta_weight(self: Any, adapter: str) -> Tensor:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(torch.Tensor, "float", lambda t: t)
            torch.set_default_dtype(torch.float64)
            try:
                return own(self, adapter)
            finally:
                torch.set_default_dtype(torch.float32)

    m.setattr(FourierFTLayer, "get_delta_weight", get_delta_weight)


def check_the_trajectory_of_pefts(arch: str = "gpt_neox") -> None:
    """50 steps in fp64 from the same coefficients, to 1e-9."""
    with pytest.MonkeyPatch.context() as m:
        in_fp64(m)
        adapted, theirs = beside(arch, trajectory.base(arch), n=100)
        for (ours, _), branch in zip(counterparts(adapted, theirs), adapted.branches(), strict=True):
            assert ours.dtype == branch.weight().dtype == torch.float64
        losses, reference = trajectory.train_ours(adapted, adapted.methods["default"]), trajectory.train_theirs(theirs)
    assert reference[-1] < reference[0] - 0.1
    assert max(abs(a - b) for a, b in zip(losses, reference, strict=True)) <= trajectory.TOLERANCE
    assert max((a - b).abs().max().item() for a, b in counterparts(adapted, theirs)) <= trajectory.TOLERANCE


# --- what PEFT lacks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "sites"), [("llama", "embedding"), ("gpt2", "wte"), ("gpt2", ["c_attn[q]", "c_attn[v]"])])
def test_embeddings_and_parts_of_fused_weights_learn(arch: str, sites: Any) -> None:
    adapted = subject("fourierft", arch, sites=sites, awake=False, init="zero", n_frequency=60)
    run = Run(adapted, total=30, lr=5e-2, data=lambda i: batch(0))
    losses = [run.step().item() for _ in range(12)]
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"n_frequency": 0}, r"n_frequency=0 is not possible at site .* use 1 to 1024"),
        ({"n_frequency": 1025}, "n_frequency=1025"),
        ({"n_frequency_pattern": {"q_proj": 2000}}, "n_frequency=2000"),
        ({"n_frequency_pattern": {"k_proj": 20}}, "matches the name of none"),
        ({"n_frequency_pattern": {"(": 20}}, "not a regular expression"),
        ({"init": "ones"}, "init='ones'"),
    ],
)
def test_what_cannot_be_is_refused(kwargs: dict[str, Any], says: str) -> None:
    model = base()
    with pytest.raises(BadParameter, match=says):
        attach(model, get_method("fourierft", **{"sites": "q_proj", **kwargs}))
    assert not any("lora" in name for name, _ in model.named_modules())


def test_the_file_holds_the_coefficients_alone() -> None:
    state = subject("fourierft", sites=["q_proj", "embedding"]).state()
    assert {k.rsplit(".", 1)[-1] for k in state.tensors} == {"c"}
    assert sum(t.numel() for t in state.tensors.values()) == 6 * len(state.sites)


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("name", CHECKS)
def test_fourierft(name: str) -> None:
    CHECKS[name]()


def test_the_trajectory_on_conv1d() -> None:
    check_the_trajectory_of_pefts("gpt2")


# --- mutants ------------------------------------------------------------------------------------------------------------------

Change = Callable[[pytest.MonkeyPatch], None]


def waves(change: Callable[..., Tensor]) -> Change:
    """Re ifft2 replaced by change(it, c, at, d_out, d_in)."""
    own = spectral.wave
    return lambda m: m.setattr(spectral, "wave", lambda *arguments: change(own, *arguments))


def hartley(own: Any, c: Tensor, at: Tensor, d_out: int, d_in: int) -> Tensor:
    """Real and imaginary part together."""
    F = torch.fft.ifft2(c.new_zeros(d_out * d_in).index_copy(0, at, c).view(d_out, d_in))
    return F.real + F.imag


def gradients(change: Callable[[Tensor], Tensor]) -> Change:
    own = spectral.read
    return lambda m: m.setattr(spectral, "read", lambda G, at: change(own(G, at)))


def by_columns(m: pytest.MonkeyPatch) -> None:
    """A flat place is read as column, row."""
    own = fourierft.places
    m.setattr(fourierft, "places", lambda d_out, d_in, n, seed: (lambda i: i % d_out * d_in + i // d_out)(own(d_out, d_in, n, seed)))


def by_site(m: pytest.MonkeyPatch) -> None:
    """Every site draws places of its own."""
    own, seeds = fourierft.places, itertools.count()
    m.setattr(fourierft, "places", lambda d_out, d_in, n, seed: own(d_out, d_in, n, next(seeds)))


def plain(m: pytest.MonkeyPatch) -> None:
    m.setattr(fourierft.Spectral, "forward", lambda self, x, ctx: reference.project(x, self.weight()))


def always_normal(m: pytest.MonkeyPatch) -> None:
    own = fourierft.Coefficients.__call__
    m.setattr(fourierft.Coefficients, "__call__", lambda self, *rest: own(fourierft.Coefficients("normal"), *rest))


MUTANTS: list[tuple[str, Change]] = [
    ("count", lambda m: m.setattr(fourierft.SpectralSpec, "at", lambda self, site: self.n)),
    ("one_entry_is_a_plane_wave", waves(hartley)),
    ("one_entry_is_a_plane_wave", waves(lambda own, c, at, *d: own(c, at, *d) * math.sqrt(math.prod(d)))),
    ("opposite_entries_are_the_same_wave", waves(hartley)),
    ("the_size_of_the_start", waves(hartley)),
    ("sites_of_one_shape_share_their_places", by_site),
    ("zero_is_the_base_and_learns", always_normal),
    ("gradients_go_through_the_spectrum", gradients(lambda g: 1.01 * g)),
    ("gradients_go_through_the_spectrum", waves(lambda own, c, *rest: own(c.detach(), *rest))),
    ("nothing_dense_is_kept_for_backward", plain),
    ("half_precision", waves(lambda own, c, *rest: own(c.bfloat16().float(), *rest).bfloat16())),
    ("a_few_waves_are_found_where_lora_cannot", gradients(lambda g: g.sign())),
    ("a_generic_teacher_is_fitted_to_its_part_at_the_places", waves(hartley)),
    ("the_change_is_pefts", by_columns),
    ("the_change_is_pefts", waves(lambda own, c, *rest: own(c.double(), *rest).float())),
    ("the_trajectory_of_pefts", waves(lambda own, *rest: own(*rest) * (1 + 1e-6))),
    ("the_trajectory_of_pefts", gradients(lambda g: g + 1e-9)),
]


@pytest.mark.parametrize(("name", "change"), MUTANTS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(MUTANTS)])
def test_a_mutant_is_seen(name: str, change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch)
    with pytest.raises(AssertionError):
        CHECKS[name]()


def test_every_check_has_a_mutant() -> None:
    assert {name for name, _ in MUTANTS} == set(CHECKS)


def test_a_matrix_whose_places_nobody_could_shuffle_is_refused():
    with pytest.raises(BadParameter, match="2147483648 × 16 is too large for fourierft"):
        fourierft.places(2**31, 16, 20, 777)
