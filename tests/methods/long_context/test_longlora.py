"""LongLoRA's acceptance properties (arXiv:2309.12307): shifted groups in training only, causal for all heads; what is trained."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit import BadParameter, Incompatible, NotMergeable, attach, get_method, load
from lorakit.core.attach import Adapted
from lorakit.core.context import Cell
from lorakit.parts.patches import masks, shifted
from lorakit.parts.patches.attention import Call, Out
from lorakit.parts.patches.shifted import Shifted, ShiftedSpec, grouped, pieces
from tests.laws.subject import base, batch, far, logits, same_bits, subject
from tests.methods.tools import normal

T, G = 13, 4


def seen(t: int, g: int, heads: int, *, causal: bool = True) -> Tensor:
    """Which keys each query may see, written down place by place: [heads, t, t]."""
    out = torch.zeros(heads, t, t, dtype=torch.bool)
    for h in range(heads):
        starts = [0, *range(g // 2, t, g)] if h >= heads // 2 else list(range(0, t, g))
        group = [max(k for k, start in enumerate(starts) if start <= i) for i in range(t)]
        for i in range(t):
            for j in range(t):
                out[h, i, j] = group[i] == group[j] and (j <= i or not causal)
    return out


def reference(call: Call) -> Out:
    """softmax(q kᵀ / √d + mask) v, key-value heads repeated: [b, t, h, d]."""
    k, v = (x.repeat_interleave(call.query.shape[1] // x.shape[1], dim=1) for x in (call.key, call.value))
    scores = call.query @ k.transpose(2, 3) * call.query.shape[3] ** -0.5
    mask = masks.additive(call.explicit(), scores.dtype)
    return (scores if mask is None else scores + mask).softmax(-1).matmul(v).transpose(1, 2), None


def call(*, heads: int = 4, kv: int = 2, t: int = T, mask: Tensor | None = None, causal: bool = True) -> Call:
    q, k, v = (normal(2, n, t, 8, seed=i) for i, n in enumerate((heads, kv, kv)))
    return Call(nn.Module().train(), q, k, v, mask, causal and mask is None, {})


def patch(g: int = G, **options: Any) -> Shifted:
    return Shifted(base("llama"), Cell(), ShiftedSpec(g, **options))


PADDING = (torch.arange(T) >= torch.tensor([0, 7])[:, None])[:, None, None]  # [2, 1, 1, T], on the left, where causality does not hide it


def check_pattern(**shape: int) -> None:
    """Every head sees what is written down, with padding and without, folded or not."""
    heads, t = shape.get("heads", 4), shape.get("t", T)
    for padding in (None, PADDING) if t == T else (None,):
        want = seen(t, G, heads)[None] if padding is None else seen(t, G, heads)[None] & padding
        one = call(**shape, mask=None if padding is None else masks.causal(t, t, torch.device("cpu")) & padding)
        got, _ = patch().attend(one, reference, 0)
        exact, _ = reference(call(**shape, mask=want))
        real = want.any(-1).all(1).expand(2, -1)  # a padded query may be left without keys
        assert far(got[real], exact[real]) < 1e-10


SHAPES = [{}, {"t": 16}, {"t": 3}, {"t": 5}, {"heads": 4, "kv": 4}, {"kv": 1}, {"heads": 5, "kv": 5}, {"heads": 6, "kv": 3}]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_head_sees_its_group(shape: dict[str, int]) -> None:
    check_pattern(**shape)


def test_without_causality_too() -> None:
    got, _ = patch().attend(call(causal=False), reference, 0)
    exact, _ = reference(call(mask=seen(T, G, 4, causal=False)[None]))
    assert far(got, exact) < 1e-10


MUTANTS: dict[str, Any] = {
    "nothing is shifted": lambda t, g, o: pieces(t, g, 0),
    "everything is shifted": lambda t, g, o: pieces(t, g, g // 2),
    "the rest is lost in the group before": lambda t, g, o: pieces(t, g + 1, o),
}


@pytest.mark.parametrize("what", MUTANTS)
def test_mutants_of_the_groups_are_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shifted, "pieces", MUTANTS[what])
    with pytest.raises(AssertionError):
        check_pattern()


def test_a_mutant_that_reuses_the_first_blocks_mask_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_only(mask: Tensor, b: int, start: int, size: int, count: int) -> Tensor:
        return mask[:1, :, :size, :size].expand(b * count, -1, -1, -1)

    monkeypatch.setattr(shifted, "fold_mask", first_only)
    with pytest.raises(AssertionError):
        check_pattern()


def test_one_group_without_a_shift_is_full_attention() -> None:
    one = call()
    assert far(grouped(one, T, 0, reference), reference(one)[0]) < 1e-12


def test_scores_are_linear_in_the_text() -> None:
    """Per head at most T · g numbers, where full attention has T²; folding equals that count exactly."""
    counted: list[int] = []

    def counting(one: Call) -> Out:
        counted.append(one.query.shape[0] * one.query.shape[1] * one.query.shape[2] * one.key.shape[2])
        return reference(one)

    t, g = 32, 8
    patch(g).attend(call(t=t), counting, 0)
    unshifted, shifted_ = 2 * (t // g) * g * g, 2 * ((t // g - 1) * g * g + 2 * (g // 2) ** 2)
    assert sum(counted) == 2 * (unshifted + shifted_)  # two texts
    assert sum(counted) / (2 * 4) <= t * g < t * t / 2


def train_logits(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model.train()(input_ids=ids, attention_mask=mask, use_cache=False).logits


def written(t: int, heads: int, padding: Tensor | None = None) -> Tensor:
    """The pattern as a 4-D mask that Transformers takes as it is."""
    want = seen(t, -(-t // 4), heads)[None]
    return want if padding is None else want & padding


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "mixtral", "gpt_neox", "gpt2", "bert"])
def test_the_whole_model_in_training_equals_one_given_the_mask(arch: str, implementation: str) -> None:
    ids = batch(length=T)
    adapted = subject("longlora", arch, awake=False, model={"attn_implementation": implementation})
    plain = base(arch, attn_implementation=implementation)
    for padding in (None, PADDING):
        mask = written(T, 4, padding).expand(2, -1, -1, -1)
        mask = mask if implementation == "sdpa" else masks.additive(mask, torch.float32)
        got = train_logits(adapted.model, ids, None if padding is None else padding[:, 0, 0].long())
        want = plain(input_ids=ids, attention_mask=mask, use_cache=False).logits.detach()
        real = torch.ones(2, T, dtype=torch.bool) if padding is None else padding[:, 0, 0]
        assert far(got[real], want[real]) < 1e-5


def test_packed_documents_stay_apart_in_their_groups() -> None:
    adapted = subject("longlora", awake=False)
    positions = torch.cat([torch.arange(8), torch.arange(5)]).expand(2, -1)
    document = (torch.arange(T) >= 8).long()
    same = document[:, None] == document[None, :]
    got = adapted.model.train()(input_ids=batch(length=T), position_ids=positions, use_cache=False).logits
    want = base()(input_ids=batch(length=T), position_ids=positions, attention_mask=written(T, 4).expand(2, -1, -1, -1) & same).logits
    assert far(got, want) < 1e-5


def leaks(adapted: Adapted, t: int = 8) -> list[tuple[int, int]]:
    """(earlier output, later token that changes it), in training mode."""
    ids = batch(length=t)
    before, found = train_logits(adapted.model, ids), []
    for later in range(t):
        changed = ids.clone()
        changed[:, later] = (changed[:, later] + 1) % 128
        moved = (train_logits(adapted.model, changed) - before).abs().amax((0, 2)) > 1e-6
        found += [(i, later) for i in range(later) if moved[i]]
    return found


def test_no_token_sees_a_later_one_unless_the_leaking_path_is_asked_for() -> None:
    for arch in ("llama", "gpt2"):
        assert not leaks(subject("longlora", arch, group=4))
        leaked = leaks(subject("longlora", arch, group=4, wrap=True))
        assert (0, 7) in leaked, "the beginning sees the end"


def test_the_leaking_path_is_the_released_eager_one() -> None:
    """Roll half of the heads by −g/2, attend causally in groups, roll back: written with torch.roll."""
    t, g = 8, 4
    one = call(t=t)
    got, _ = patch(g, wrap=True).attend(one, reference, 0)
    outs = []
    for half in (False, True):
        whole = [x.repeat_interleave(4 // x.shape[1], dim=1)[:, 2 * half : 2 * half + 2] for x in (one.query, one.key, one.value)]
        q, k, v = (x.roll(-half * g // 2, dims=2) for x in whole)
        blocks = [reference(Call(one.module, *(x[:, :, s : s + g] for x in (q, k, v)), None, True, {}))[0] for s in range(0, t, g)]
        outs.append(torch.cat(blocks, dim=1).roll(half * g // 2, dims=1))
    assert far(got, torch.cat(outs, dim=2)) < 1e-10
    with pytest.raises(BadParameter, match="multiple of an even group"):
        patch(g, wrap=True).attend(call(t=7), reference, 0)


def test_information_crosses_one_group_a_layer_and_no_more() -> None:
    """Planted reach: which inputs reach the last output after L layers is exactly the L-th power of what one layer sees."""
    t = 16
    one = seen(t, 4, 4).any(0)
    for layers in (1, 2, 3):
        adapted = subject("longlora", awake=False, group=4, model={"num_hidden_layers": layers})
        x = normal(1, t, 32, dtype=torch.float32).requires_grad_()
        out = adapted.model.train()(inputs_embeds=x, use_cache=False).logits
        reached = torch.stack([torch.autograd.grad(out[0, i].sum(), x, retain_graph=True)[0][0].abs().amax(1) > 0 for i in range(t)])
        want = torch.linalg.matrix_power(one.double(), layers) > 0
        assert torch.equal(reached, want)
    assert not want[-1, 0], "a dependency over the whole text cannot be learned here"
    whole = subject("lora", model={"num_hidden_layers": 1}).model.train()(inputs_embeds=x, use_cache=False).logits
    assert torch.autograd.grad(whole[0, -1].sum(), x)[0][0, 0].abs().max() > 0, "plain LoRA can"


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_eval_is_full_attention_bit_for_bit(arch: str) -> None:
    ids = batch(length=T)
    adapted = subject("longlora", arch, awake=False)
    assert same_bits(logits(adapted.model, ids), logits(base(arch), ids))
    lora = attach(base(arch), get_method("lora", r=4, sites="attention", unfreeze=tuple(u.name for u in adapted.unfrozen["default"])))
    trained = subject("longlora", arch)
    lora.load_tensors("default", trained.tensors("default"))
    assert same_bits(logits(trained.model, ids), logits(lora.model, ids))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(trained.model.generate(ids, **options), lora.model.generate(ids, **options))
    assert far(train_logits(trained.model, ids), logits(lora.model, ids)) > 1e-3, "and training is not"


def test_a_mutant_that_also_acts_in_eval_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shifted, "acts", lambda self, one: one.query.shape[2] == one.key.shape[2])
    with pytest.raises(AssertionError):
        test_eval_is_full_attention_bit_for_bit("llama")


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "bert"])
def test_what_is_trained_is_lora_on_attention_and_every_embedding_and_norm(arch: str) -> None:
    adapted = subject("longlora", arch)
    names = {name for name, p in adapted.model.named_parameters() if p.requires_grad}
    assert {b.site.role for b in adapted.branches()} <= {"q", "k", "v", "o", "qkv"}
    whole = {name for name in names if ".lora." not in name}
    want = {
        f"{path}.{k}" for path, m in base(arch).named_modules() for k, _ in m.named_parameters(recurse=False)
        if isinstance(m, nn.Embedding) or "norm" in type(m).__name__.lower()
    }  # fmt: skip
    assert whole == want
    deltas = {f"{b.site.module}.lora.branches.default.delta.{k}" for b in adapted.branches() for k in "AB"}
    assert names - whole == deltas
    assert not subject("longlora", arch, whole=False).unfrozen["default"]


def test_a_longer_context_interpolates_positions_and_leaves_no_trace(tmp_path: Any) -> None:
    model = base()
    before, config = dict(model.named_buffers()), model.config.to_dict()
    adapted = attach(model, get_method("longlora", r=4, context=700))
    linear = base(rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0})  # ⌈700 / 256⌉
    assert far(logits(model, batch()), logits(linear, batch())) < 1e-6
    assert far(logits(model, batch()), logits(base(), batch())) > 1e-2
    assert model.config.max_position_embeddings == 700
    with pytest.raises(NotMergeable, match="interpolated"):
        adapted.merge()
    adapted.save(tmp_path)
    assert same_bits(logits(load(base(), tmp_path).model, batch()), logits(model, batch()))
    with adapted.disabled():
        assert same_bits(logits(model, batch()), logits(base(), batch()))
    adapted.detach()
    assert model.config.to_dict() == config
    assert all(b is before[n] for n, b in model.named_buffers())
    same = attach(base(), get_method("longlora", r=4, context=100))
    assert same_bits(logits(same.model, batch()), logits(base(), batch())), "the base's own length is enough"


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(Incompatible, match="plain rotary positions"):
        attach(base("gpt2"), get_method("longlora", context=1000))
    with pytest.raises(Incompatible, match="plain rotary positions"):
        attach(base(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}), get_method("longlora", context=1000))
    with pytest.raises(Incompatible, match="encoder-decoder"):
        attach(base("t5"), get_method("longlora"))
    for group in (-1, 1):
        with pytest.raises(BadParameter, match="group"):
            get_method("longlora", group=group)
