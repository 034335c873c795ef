"""Prefix tuning's acceptance properties (arXiv:2101.00190), both forms; the embedding form's are in test_prompt_tuning.py."""

import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit import BadParameter, Incompatible, NotMergeable, attach, get_method
from lorakit.adapters.inspect import inspect_adapter
from lorakit.core.attach import Adapted
from lorakit.data.packable import why_not_packable
from lorakit.parts.patches import attention, masks, prefix
from lorakit.parts.patches.prefix import recorded
from tests.adapters.test_trajectory_peft import STEPS, TOLERANCE, batches
from tests.adapters.test_trajectory_peft import base as exact_base
from tests.laws.subject import base, batch, far, same_bits, subject

N = 4


@torch.no_grad()
def worded(arch: str, words: Tensor, **model: Any) -> Adapted:
    """A model whose prefix is what `words` are in it."""
    host = base(arch, torch.float64, **model)
    found = recorded(host, words)
    adapted = attach(host, get_method("prefix", tokens=len(words)))
    patch = adapted.shared("default")["prefix"]
    patch.K.copy_(torch.stack([k for k, _ in found]))
    patch.V.copy_(torch.stack([v for _, v in found]))
    return adapted


@torch.no_grad()
def check_words_in_front(arch: str, implementation: str = "sdpa") -> None:
    """A prefix of the keys and values of words is those words in front: an oracle without any mask or prefix of ours."""
    words, ids = batch(9, rows=1, length=N)[0], batch(length=6)
    adapted = worded(arch, words, attn_implementation=implementation)
    whole = torch.cat([words.expand(2, -1), ids], dim=1)
    for lengths in ((6, 6), (6, 3)):
        real = torch.arange(6) < torch.tensor(lengths)[:, None]
        mask = real.long()
        positions = (N + torch.arange(6)).expand(2, -1)  # as far from the words as in the whole text
        want = base(arch, torch.float64, attn_implementation=implementation)(
            input_ids=whole, attention_mask=torch.cat([torch.ones(2, N, dtype=torch.long), mask], dim=1)
        ).logits[:, N:]
        got = adapted.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        assert far(got[real], want[real]) < 1e-6, (arch, implementation, far(got[real], want[real]))
        if all(real.flatten()):
            assert far(adapted.model(input_ids=ids, position_ids=positions).logits, want) < 1e-6


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "mistral", "gpt_neox", "gpt2"])
def test_a_prefix_of_words_is_those_words_in_front(arch: str, implementation: str) -> None:
    check_words_in_front(arch, implementation)


def interleaved(own: Tensor, given: Tensor) -> Tensor:
    heads = own.to(given).view(given.shape[1], -1, given.shape[3])
    return torch.cat([heads.expand(len(given), -1, -1, -1), given], dim=2)


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "the mask is lengthened at the end": (masks, "lengthened", lambda mask, n: mask if mask is None else F.pad(mask, (0, n), value=1)),
    "no mask means no causality": (attention.Call, "explicit", lambda self: self.mask),
    "the prefix is put behind": (prefix, "_joined", lambda own, given: torch.cat([given, given[:, :, :N]], dim=2)),
    "heads are read in another order": (prefix, "_joined", interleaved),
}


@pytest.mark.parametrize("what", MUTANTS)
def test_mutants_are_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[what])
    with pytest.raises(AssertionError):
        check_words_in_front("llama")


@torch.no_grad()
def check_packed(adapted: Adapted) -> None:
    """Each document of a packed window has the logits that it has alone: all of them see the prefix."""
    documents = [batch(1, rows=1, length=5), batch(2, rows=1, length=3)]
    together = adapted.model(
        input_ids=torch.cat(documents, dim=1), position_ids=torch.cat([torch.arange(5), torch.arange(3)])[None], use_cache=False
    ).logits
    alone = [adapted.model(input_ids=ids, use_cache=False).logits for ids in documents]
    assert far(together, torch.cat(alone, dim=1)) < 1e-5


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox"])
def test_the_layer_form_is_exact_in_packed_windows(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = subject("prefix", arch)
    check_packed(adapted)
    assert why_not_packable(adapted.model) is None
    monkeypatch.setattr(masks, "lengthened", lambda mask, n: torch.cat([mask[..., :1].expand(*mask.shape[:-1], n), mask], dim=-1))
    with pytest.raises(AssertionError):
        check_packed(adapted)


def generated(model: nn.Module, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    return model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, **options)


@pytest.mark.parametrize("form", ["layer", "embedding"])
@pytest.mark.parametrize("arch", ["llama", "mistral", "gpt2", "gpt_neox", "roberta", "t5"])
def test_decoding_with_a_cache_equals_decoding_without(arch: str, form: str) -> None:
    """Left padding, beams and a window smaller than the text included."""
    adapted = subject("prefix", arch, form=form, model={"sliding_window": 4} if arch == "mistral" else {})
    ids, mask = batch(length=8), torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    for options in ({}, {"num_beams": 3}):
        with_cache, without = (generated(adapted.model, ids, mask, use_cache=cache, **options) for cache in (True, False))
        assert torch.equal(with_cache, without)
        if arch != "t5" and form == "layer":  # alone, without padding
            alone = generated(adapted.model, ids[1:, 3:], mask[1:, 3:], use_cache=True, **options)
            n = min(alone.shape[1] - 5, with_cache.shape[1] - 8)
            assert torch.equal(with_cache[1, 8 : 8 + n], alone[0, 5 : 5 + n]) or arch == "roberta"  # whose positions count padding


def test_a_preallocated_cache_works_in_the_layer_form() -> None:
    adapted = subject("prefix")
    ids, mask = batch(length=8), torch.ones(2, 8, dtype=torch.long)
    options = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(generated(adapted.model, ids, mask), generated(adapted.model, ids, mask, **options))


@pytest.mark.parametrize("arch", ["gpt_neox", "gpt2"])
def test_a_trajectory_is_pefts(arch: str) -> None:
    """PEFT puts the prefix into the cache, whose length shifts the text: with positions so shifted, every step agrees."""
    ours = attach(exact_base(arch), get_method("prefix", tokens=N))
    patch = ours.shared("default")["prefix"]
    with warnings.catch_warnings(action="ignore"):
        theirs = peft.get_peft_model(exact_base(arch), peft.PrefixTuningConfig(num_virtual_tokens=N, task_type="CAUSAL_LM"))
    (weight,) = [p for p in theirs.parameters() if p.requires_grad]
    with torch.no_grad():
        both = torch.stack([patch.K, patch.V], dim=1)  # [layers, 2, n, d]
        weight.data = both.permute(2, 0, 1, 3).flatten(1).to(torch.float64).clone()
    optimizers = [torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.01) for ps in ([patch.K, patch.V], [weight])]
    losses = []
    for ids in batches():
        positions = (N + torch.arange(ids.shape[1])).expand(len(ids), -1)
        pair = (ours.model(input_ids=ids, labels=ids, position_ids=positions).loss, theirs(input_ids=ids, labels=ids).loss)
        for loss, optimizer in zip(pair, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append([loss.item() for loss in pair])
    assert len(losses) == STEPS
    assert losses[-1][0] < losses[4][0] - 0.05, "it did train"
    assert max(abs(a - b) for a, b in losses) < TOLERANCE
    got = torch.stack([patch.K, patch.V], dim=1).permute(2, 0, 1, 3).flatten(1)
    assert far(got.detach(), weight.detach()) < 1e-8


def test_inspect_shows_what_is_trained() -> None:
    report = inspect_adapter(subject("prefix").state())
    assert report.shared == {"lora_shared.prefix.K": [2, 3, 16], "lora_shared.prefix.V": [2, 3, 16]}


def test_the_count_is_a_closed_form() -> None:
    for arch, d_kv in (("llama", 16 + 16), ("gpt2", 32 + 32)):
        adapted = subject("prefix", arch, tokens=5)
        assert adapted.params().numel() == 2 * 5 * d_kv
        assert subject("prefix", arch, tokens=5, form="embedding").params().numel() == 5 * 32
    assert subject("prefix", "t5", tokens=5).params().numel() == 6 * 5 * 64, "encoder, decoder and cross-attention of two layers each"


def test_starts() -> None:
    model = base().train()
    model.model.layers[0].eval()
    attach(model, get_method("prefix"))
    assert model.training
    assert not model.model.layers[0].self_attn.training, "each module's mode is left as it was"
    words = subject("prefix", awake=False, start="words").shared("default")["prefix"]
    found = recorded(base(), torch.randint(128, (3,), generator=_stream("prefix")))
    assert same_bits(words.K.detach(), torch.stack([k for k, _ in found]))
    normal = subject("prefix", awake=False, start="normal", tokens=50, std=0.5).shared("default")["prefix"]
    assert 0.45 < normal.K.std() < 0.55
    assert 0.45 < normal.V.std() < 0.55


def _stream(name: str) -> torch.Generator:
    from lorakit.core import random

    return random.generator(0, name)


def learned(adapted: Adapted, loss: Callable[[], Tensor], *, steps: int = 150, lr: float = 0.1) -> float:
    optimizer = torch.optim.AdamW([p.tensor for p in adapted.params()], lr=lr)
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return loss().item()


def test_it_finds_a_prefix_that_steered_the_teacher_and_cannot_find_a_change_of_weights() -> None:
    """Planted: the teacher is the base behind hidden words (a prefix can be them exactly), or the base with another head (it cannot)."""
    hidden, ids = batch(9, rows=1, length=N)[0], batch(3, rows=8, length=10)
    positions = (N + torch.arange(10)).expand(8, -1)
    steered = worded("llama", hidden)
    with torch.no_grad():
        target = steered.model(input_ids=ids, position_ids=positions).logits
    other = base("llama", torch.float64)
    with torch.no_grad():
        other.lm_head.weight.mul_(-1)
        reversed_ = other(input_ids=ids, position_ids=positions).logits
    left = []
    for want in (target, reversed_):
        ours = attach(base("llama", torch.float64), get_method("prefix", tokens=N), seed=1)

        def off(model: nn.Module, want: Tensor = want) -> Tensor:
            return (model(input_ids=ids, position_ids=positions).logits - want).square().mean()

        left.append(learned(ours, lambda ours=ours, off=off: off(ours.model)) / off(base("llama", torch.float64)).item())
    assert left[0] < 0.1, left
    assert left[1] > 0.1 > 10 * left[0], left


def test_it_is_never_merged_scaled_or_misread() -> None:
    adapted = subject("prefix")
    with pytest.raises(NotMergeable, match="keys and values"):
        adapted.merge()
    with pytest.raises(Incompatible, match="cannot be scaled"):
        adapted.scale("default", 0.5)
    with pytest.raises(BadParameter, match="at least one"):
        get_method("prefix", tokens=0)
    with pytest.raises(BadParameter, match="ratio"):
        get_method("prefix", ratio=0.0)
    with pytest.raises(BadParameter):
        get_method("prefix", form="middle")
    with pytest.raises(Incompatible, match="one width"):
        attach(_uneven(), get_method("prefix"))


def _uneven() -> nn.Module:
    model = base("llama")
    layer: Any = model.model.layers[1].self_attn
    layer.k_proj = nn.Linear(32, 8, bias=False)
    return model


def test_two_prefixes_are_one_longer_one() -> None:
    """Adapters add up: the later one stands in front."""
    adapted = subject("prefix", dtype=torch.float64)
    adapted.add("other", get_method("prefix", tokens=2), seed=3)
    adapted.switch("default", "other")
    two = adapted.model(input_ids=batch()).logits
    parts = [adapted.shared(name)["prefix"] for name in ("default", "other")]
    joined = attach(base("llama", torch.float64), get_method("prefix", tokens=3 + 2))
    patch = joined.shared("default")["prefix"]
    with torch.no_grad():
        patch.K.copy_(torch.cat([p.K for p in parts], dim=1))
        patch.V.copy_(torch.cat([p.V for p in parts], dim=1))
    assert far(joined.model(input_ids=batch()).logits, two) < 1e-6
    with adapted.disabled():
        assert same_bits(adapted.model(input_ids=batch()).logits, base("llama", torch.float64)(input_ids=batch()).logits)
