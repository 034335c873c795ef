"""What a site sees: moments and gradients equal those that autograd and plain sums give, over every base, with padding, in parts."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit import BadParameter, Incompatible, attach, get_method
from lorakit.core import calibrate
from lorakit.core.calibrate import IGNORED, Calibration, Seen, observe
from lorakit.core.site import select
from lorakit.data.encoded import Encoded
from lorakit.data.pack import collate, pack
from lorakit.data.pad import pad
from lorakit.train.metrics import forward_loss
from tests.laws.subject import awaken, base, batch, everything, far, same_bits

ALL = frozenset({"inputs", "gradients"})
PLACES = {
    "linear": ("llama", ["all-linear"]),
    "conv1d": ("gpt2", ["all-linear"]),
    "rows": ("gpt2", ["c_attn[q]", "c_attn[v]"]),
    "interleaved rows": ("gpt_neox", ["query_key_value[k]", "query_key_value[v]"]),
    "embedding": ("llama", ["embedding", "lm_head"]),
    "bert": ("bert", ["all-linear"]),
}
SAMPLES = [Encoded(ids := batch(9 + n, rows=1, length=n)[0].tolist(), [IGNORED] * (n // 3) + ids[n // 3 :]) for n in (5, 9, 3, 7)]


def inputs_of(model: nn.Module, path: str, shown: Mapping[str, Any]) -> Tensor:
    """What a module is called with."""
    kept: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, args, out: kept.append(args[0].detach()))
    model(**{k: v for k, v in shown.items() if k != "labels"})
    handle.remove()
    return kept[0]


def by_autograd(model: nn.Module, path: str, data: Calibration) -> Tensor:
    """The gradient of the mean loss for a whole stored weight."""
    weight = model.get_submodule(path).weight.requires_grad_(True)
    scored = [data.loss(model, b) for b in data.batches]
    (grad,) = torch.autograd.grad(sum(loss for loss, _ in scored) / sum(n for _, n in scored), weight)
    weight.requires_grad_(False)
    return grad


def whole(tensor: Tensor, path: str, model: nn.Module) -> Tensor:
    """As d_out × d_in."""
    module = model.get_submodule(path)
    return tensor.T if type(module).__name__ in ("Conv1D", "Embedding") else tensor


def texts(*seeds: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": batch(s), "labels": batch(s)} for s in seeds]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", PLACES)
def test_every_base_sees_what_autograd_sees(place: str, dtype: torch.dtype) -> None:
    check_seen(place, dtype)


def check_seen(place: str, dtype: torch.dtype) -> None:
    arch, where = PLACES[place]
    model, data = base(arch, dtype).requires_grad_(False), Calibration(texts(1, 2, 3))
    sites, coarse = select(model, where), dtype == torch.bfloat16
    for site in sites[:: max(1, len(sites) // 4)]:
        seen = observe(model, [site], ALL, data)[site.name]
        rows = [r for part in (site.rows or (range(site.d_out),)) for r in part]
        want = whole(by_autograd(model, site.module, data), site.module, model)[rows]
        assert seen.gradient.shape == (site.d_out, site.d_in)
        assert seen.gradient.dtype == seen.moment.dtype == torch.promote_types(dtype, torch.float32)
        assert far(seen.gradient.double(), want.double()) < (5e-2 if coarse else 1e-5), (place, site.name)
        found = [inputs_of(model, site.module, b) for b in data.batches]
        if site.kind == "embedding":
            assert torch.equal(
                seen.moment, torch.bincount(torch.cat([x.flatten() for x in found]), minlength=site.d_in).to(seen.moment.dtype)
            )
        else:
            X = torch.cat([x.flatten(0, -2) for x in found]).to(seen.moment.dtype)
            assert far(seen.moment, X.T @ X) < 1e-5
            assert far(seen.total, X.sum(0)) < 1e-4
        assert seen.tokens == 3 * 14


def test_a_quantized_base_is_seen_through_its_forward() -> None:
    """W is packed; the gradient for the whole of it is that for the dense weight it stands for."""
    from lorakit.parts.bases.nf4_base import NF4Spec

    adapted = attach(base(hidden_size=64, intermediate_size=128), get_method("lora", r=2).but(base=NF4Spec()))
    dense = base(hidden_size=64, intermediate_size=128)
    for branch in adapted.branches():
        with torch.no_grad():
            dense.get_submodule(branch.site.module).weight.copy_(branch.base.dense())
    data = Calibration(texts(1, 2))
    sites = [b.site for b in adapted.branches()]
    packed, plain = observe(adapted.model, sites, ALL, data), observe(dense, sites, ALL, data)
    for site in sites:
        assert far(packed[site.name].gradient, plain[site.name].gradient) < 1e-4
        assert far(packed[site.name].moment, plain[site.name].moment) < 1e-4


def test_an_active_adapter_is_part_of_the_model() -> None:
    """At a border between tasks, inputs and gradients are those of W + ΔW."""
    adapted = awaken(attach(base(), get_method("lora", r=2)))
    sites, data = [b.site for b in adapted.branches()], Calibration(texts(1, 2))
    live = observe(adapted.model, sites, ALL, data)
    merged = observe(adapted.merge(), sites, ALL, data)
    for site in sites:
        assert far(live[site.name].gradient, merged[site.name].gradient) < 1e-4
        assert far(live[site.name].moment, merged[site.name].moment) < 1e-4


def moments(shown: list[dict[str, Any]], *needs: str, arch: str = "llama") -> dict[str, Seen]:
    model = base(arch)
    return observe(model, select(model, ["all-linear", "embedding"]), frozenset(needs), Calibration(shown, forward_loss))


def apart(a: dict[str, Seen], b: dict[str, Seen]) -> float:
    return max(max(far(a[k].moment, b[k].moment), abs(a[k].tokens - b[k].tokens)) for k in a)


def alone() -> list[dict[str, Tensor]]:
    return [pad([sample], 0) for sample in SAMPLES]


@pytest.mark.parametrize("needs", ["inputs", "target_inputs"])
def test_padding_is_not_seen(needs: str) -> None:
    check_padding(needs)


def check_padding(needs: str) -> None:
    """Rows filled up, windows of several documents, and each document alone: the same tokens count."""
    one = moments(alone(), needs)
    together = moments([pad(SAMPLES, 0)], needs)
    windows = moments([collate(pack(SAMPLES, 14), pad_id=0), collate(pack(SAMPLES[:0] or SAMPLES[2:3], 14), length=9)], needs)
    again = moments([*alone(), *alone()[2:3]], needs)
    n = sum(len(s.input_ids) for s in SAMPLES) if needs == "inputs" else sum(s.trained for s in SAMPLES)
    assert {s.tokens for s in one.values()} == {n}
    assert apart(together, one) < 1e-5
    if needs == "inputs":  # in a window a document's first token has no label
        assert apart(windows, again) < 1e-5
    else:
        assert {s.tokens for s in windows.values()} == {n + SAMPLES[2].trained}


def test_which_tokens_have_a_label() -> None:
    ids, seen = SAMPLES[1], moments(alone()[1:2], "target_inputs")
    counts = seen["model.embed_tokens"].moment
    assert torch.equal(counts, torch.bincount(torch.tensor(ids.input_ids[3:]), minlength=128).float())
    assert torch.equal(
        moments(alone()[1:2], "inputs")["model.embed_tokens"].moment, torch.bincount(torch.tensor(ids.input_ids), minlength=128).float()
    )


@pytest.mark.parametrize(("source", "target"), [(6, 4), (5, 5)])
def test_an_encoder_decoders_two_sides_have_their_own_tokens(source: int, target: int) -> None:
    model = base("t5")
    labels = batch(2, length=target)
    labels[1, 2:] = IGNORED
    mask = torch.ones(2, source, dtype=torch.long)
    mask[0, 3:] = 0
    data = Calibration([{"input_ids": batch(1, length=source), "attention_mask": mask, "labels": labels}], forward_loss)
    seen = observe(model, select(model, "all-linear"), frozenset({"inputs"}), data)
    assert {s.tokens for k, s in seen.items() if k.startswith("encoder")} == {3 + source}
    across = {k: s.tokens for k, s in seen.items() if "EncDecAttention" in k}
    assert {n for k, n in across.items() if k.endswith((".k", ".v"))} == {3 + source}
    assert {n for k, n in across.items() if k.endswith((".q", ".o"))} == {target + 2}
    assert {s.tokens for k, s in seen.items() if k.startswith("decoder") and k not in across} == {target + 2}


def test_processes_with_shares_of_the_batches_see_what_one_sees() -> None:
    """One of three has no batch at all."""
    shown, model = texts(1, 2), base()
    sites = select(model, ["q_proj", "down_proj", "embedding"])
    want = observe(model, sites, ALL, Calibration(shown))
    said: list[list[Tensor]] = []
    for mine in ([], shown[1:]):
        said.append([])
        observe(
            model, sites, ALL, Calibration(mine, total_=lambda t: (said[-1].append(t.clone()), t.add_(1 - t.sign()) if t.dim() == 0 else t))
        )
    order = iter(zip(*said, strict=True))
    got = observe(model, sites, ALL, Calibration(shown[:1], total_=lambda t: [t.add_(other) for other in next(order)]))
    for name, seen in got.items():
        assert seen.tokens == want[name].tokens
        assert far(seen.moment, want[name].moment) < 1e-5
        assert far(seen.gradient, want[name].gradient) < 1e-5


def test_the_model_is_left_as_it_was() -> None:
    model = base()
    model.train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    modes, required = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    bits = everything(model)
    observe(model, select(model, "all-linear"), ALL, Calibration(texts(1)))
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == required
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(same_bits(v, bits[k]) for k, v in everything(model).items())


def test_a_compiled_model_is_seen_uncompiled() -> None:
    """A compiled forward does not call hooks that come later; at a border between tasks the model is compiled."""
    model, data = base().requires_grad_(False), Calibration(texts(1))
    sites = select(model, "q_proj")
    want = observe(model, sites, ALL, data)
    model.compile(backend="eager")
    model(input_ids=batch())
    got, compiled = observe(model, sites, ALL, data), model._compiled_call_impl
    assert compiled is not None
    assert all(same_bits(got[name].moment, want[name].moment) and same_bits(got[name].gradient, want[name].gradient) for name in want)


def test_what_cannot_be_seen_is_refused() -> None:
    model = base()
    with pytest.raises(BadParameter, match="labels"):
        observe(model, select(model, "q_proj"), ALL, Calibration([{"input_ids": batch()}]))
    with pytest.raises(Incompatible, match="never reached"):
        observe(model, select(model, "q_proj"), ALL, Calibration([]))
    with pytest.raises(BadParameter, match="calibration="):
        attach(model, get_method("eva"))


def _counts_padding(m: pytest.MonkeyPatch) -> None:
    m.setattr(calibrate._Watcher, "_mask", lambda self, shape: None)


def _counts_unlabeled(m: pytest.MonkeyPatch) -> None:
    real = calibrate._masks
    m.setattr(calibrate, "_masks", lambda model, shown, *, labeled: real(model, shown, labeled=False))


def _takes_all_rows(m: pytest.MonkeyPatch) -> None:
    real = calibrate._Watcher.__init__

    def init(self: Any, site: Any, needs: frozenset[str]) -> None:
        real(self, site, needs)
        self.index = None if self.index is None else torch.arange(site.d_out)

    m.setattr(calibrate._Watcher, "__init__", init)


def _sums_instead_of_means(m: pytest.MonkeyPatch) -> None:
    real = calibrate._Watcher.seen
    m.setattr(calibrate._Watcher, "seen", lambda self, data, targets: real(self, data, 1))


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (_counts_padding, lambda: check_padding("inputs")),
        (_counts_unlabeled, lambda: check_padding("target_inputs")),
        (_takes_all_rows, lambda: check_seen("interleaved rows", torch.float32)),
        (_sums_instead_of_means, lambda: check_seen("linear", torch.float32)),
    ],
)
def test_mutants_are_seen(change: Callable[[pytest.MonkeyPatch], None], check: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch)
    with pytest.raises(AssertionError):
        check()
