"""HiddenKey's acceptance properties (arXiv:2403.00812): dropped keys, cut hidden units, two passes that agree."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit import BadParameter, Incompatible, attach, get_method
from lorakit.core import random
from lorakit.core.attach import Adapted
from lorakit.core.events import Step
from lorakit.methods.learning import hiddenkey
from lorakit.methods.learning.hiddenkey import without
from lorakit.parts.objectives.agreement import Agreement, divergence
from lorakit.parts.patches import masks
from tests.laws.steps import Run
from tests.laws.subject import base, batch, far, logits, same_bits, small, subject


def attentions(adapted: Adapted, ids: Tensor, mask: Tensor | None = None, *, step: int = 0) -> list[Tensor]:
    """Softmax weights of each layer, [b, h, t, s], of one training forward."""
    with adapted.given(step=step), torch.no_grad():
        return list(adapted.model.train()(input_ids=ids, attention_mask=mask, output_attentions=True, use_cache=False).attentions)


def eager(arch: str = "llama", **kwargs: Any) -> Adapted:
    return subject("hiddenkey", arch, model={"attn_implementation": "eager"}, **kwargs)


def check_columns(arch: str, *, rows: int = 4, length: int = 12) -> None:
    """A dropped key has weight 0 for every query of its head but those that it alone would serve; each row sums to one."""
    adapted = eager(arch, keys=0.4, hidden=0.0)
    ids = batch(rows=rows, length=length)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    allowed = torch.ones(length, length).tril().bool() & mask.bool()[:, None, None, :]
    dropped_somewhere = 0
    for weights in attentions(adapted, ids, mask):
        assert far(weights.sum(-1), torch.ones(())) < 1e-5
        assert not weights[~allowed.expand_as(weights)].any(), "padding and the future stay hidden"
        zero = weights == 0
        rescued = (~zero == allowed).all(-1)  # sees all that the model's own mask allows
        kept = (~zero & ~rescued[..., None]).any(2)  # [b, h, s]: keys that some ordinary query sees
        want = allowed & kept[:, :, None, :]
        ordinary = ~rescued & mask.bool()[:, None]
        assert torch.equal((~zero)[ordinary], want[ordinary]), "whole columns, or nothing"
        dropped_somewhere += int((zero & allowed).sum())
    assert dropped_somewhere > 100


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_dropped_keys_are_whole_columns_of_a_head(arch: str) -> None:
    check_columns(arch)


MUTANTS: dict[str, Any] = {
    "element by element": lambda mask, keep: masks.restricted(
        mask, (torch.rand(4, 4, 12, 12, generator=torch.Generator().manual_seed(1)) > 0.4) | torch.eye(12).bool()
    ),
    "nothing dropped": lambda mask, keep: mask,
    "the future seen": lambda mask, keep: keep,
}


@pytest.mark.parametrize("what", MUTANTS)
def test_mutants_of_the_drop_are_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hiddenkey, "without", MUTANTS[what])
    with pytest.raises(AssertionError):
        check_columns("llama")


def test_the_rate_is_that_asked_for_and_differs_by_layer_head_and_step() -> None:
    draws = ((0, 0), (1, 0), (0, 1))  # (step, layer)
    like = torch.empty(64, 8, 1, 32)
    keep = [random.dropout_mask(like, torch.tensor([0, step]), random.stream(f"{layer}.keys"), 0.2) > 0 for step, layer in draws]
    assert all(abs(1 - k.double().mean() - 0.2) < 0.01 for k in keep)
    assert not torch.equal(keep[0], keep[1])
    assert not torch.equal(keep[0], keep[2])
    assert not torch.equal(keep[0][:, 0], keep[0][:, 1])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_no_query_loses_every_key(implementation: str) -> None:
    adapted = subject("hiddenkey", model={"attn_implementation": implementation}, keys=0.97, hidden=0.0)
    ids, mask = batch(rows=8, length=9), torch.ones(8, 9, dtype=torch.long)
    mask[:, 5:] = 0  # keys of padding are no company
    with adapted.given(step=0):
        out = adapted.model.train()(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    out.loss.backward()
    assert out.logits[mask.bool()].isfinite().all()
    assert all(p.tensor.grad.isfinite().all() for p in adapted.params())


def test_a_query_left_without_keys_keeps_those_of_the_mask() -> None:
    causal = torch.ones(3, 3).tril().bool()[None, None]
    keep = torch.tensor([False, True, False])[None, None, None]
    assert without(causal, keep)[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 0]]
    numbers = without(torch.zeros(1, 1, 3, 3).masked_fill(~causal, torch.finfo(torch.float32).min), keep)
    assert torch.equal(masks.visible(numbers), without(causal, keep))
    assert without(None, keep)[0, 0].int().tolist() == [[0, 1, 0]]
    assert without(None, torch.zeros(1, 1, 1, 3, dtype=torch.bool)).all()
    padded = causal & torch.tensor([True, False, False])  # only key 0 is real, and dropped: padding does not count as company
    assert without(padded, torch.tensor([False, True, True])[None, None, None])[0, 0].int().tolist() == [[1, 0, 0]] * 3


def test_hidden_units_are_cut_before_the_down_projection_and_keep_their_mean() -> None:
    downs = {"llama": "model.layers.0.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj", "bert": "bert.encoder.layer.0.output.dense"}
    for arch, path in downs.items():
        adapted = subject("hiddenkey", arch, keys=0.0, hidden=0.25, sites="attention")
        module, seen = adapted.model.get_submodule(path), list[Tensor]()
        module.register_forward_hook(lambda m, args, out, seen=seen: seen.append(args[0].detach()))
        x = torch.ones(50, 40, module.weight.shape[0] if arch == "gpt2" else module.weight.shape[1])
        with adapted.given(step=3):
            module.train()(x), module(x), module.eval()(x)
        cut, again, plain = seen
        assert cut.unique().tolist() == [0.0, pytest.approx(1 / 0.75, rel=1e-3)]
        assert abs(cut.mean() - 1) < 0.01
        assert same_bits(cut, again), "one forward, one mask"
        assert same_bits(plain, x)
        assert not torch.equal(cut[0, 0], cut[0, 1]), "element by element"


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_eval_and_the_checkpoint_are_loras(arch: str) -> None:
    adapted = subject("hiddenkey", arch)
    lora = attach(base(arch), small("lora"))
    lora.load_tensors("default", adapted.tensors("default"))
    assert same_bits(logits(adapted.model.eval(), batch()), logits(lora.model, batch()))
    assert adapted.tensors("default").keys() == lora.tensors("default").keys()
    merged = logits(adapted.merge(), batch())
    assert far(merged, logits(lora.model, batch())) < 1e-5


def test_without_any_drop_the_passes_agree_and_the_loss_is_loras() -> None:
    """p = 0: no patch, KL = 0, the same gradients as LoRA's to rounding."""
    assert not small("hiddenkey", keys=0.0, hidden=0.0).patches
    runs = [Run(subject(name, keys=0.0, hidden=0.0, dtype=torch.float64), total=4) for name in ("hiddenkey", "lora")]
    losses = [[run.step().item() for _ in range(3)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_both_passes_have_masks_of_their_own_and_gradients() -> None:
    adapted = subject("hiddenkey", keys=0.3, hidden=0.2)
    run, seen = Run(adapted, total=4), list[Tensor]()
    adapted.model.train()
    score = Agreement.__call__

    def watching(self: Agreement, scored: Any, handle: Any) -> Any:
        def keep(i: int) -> Any:
            done = scored(i)
            done.outputs.retain_grad()
            seen.append(done.outputs)
            return done

        return score(self, keep, handle)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(Agreement, "__call__", watching)
        run.gradients(next(run.stream()), Step(0, 4))
    one, two = seen
    assert not torch.equal(one, two)
    assert divergence(one[0], two[0]) > 0
    assert all(z.grad.abs().max() > 0 for z in seen)
    same: list[Tensor] = []
    for _ in range(2):  # what passes under one key would give: nothing to agree on
        with adapted.given(step=0, seed=0):
            same.append(adapted.model(input_ids=batch()).logits)
    assert divergence(same[0][0], same[1][0]) == 0


def test_the_half_without_the_divergence_is_one_pass() -> None:
    adapted = subject("hiddenkey", kl=0.0, awake=False)
    assert adapted.methods["default"].objective is None
    calls: list[int] = []
    adapted.model.register_forward_hook(lambda *_: calls.append(1))
    Run(adapted, total=4).step()
    assert len(calls) == 1


def test_what_cannot_be_is_refused() -> None:
    for bad in ({"keys": 1.0}, {"hidden": -0.1}, {"kl": -1.0}):
        with pytest.raises(BadParameter):
            get_method("hiddenkey", **bad)
    with pytest.raises(Incompatible, match="hidden=0"):
        attach(base("mixtral"), small("hiddenkey", sites="attention"))


def noisy(seed: int, n: int, *, flip: float) -> tuple[Tensor, Tensor]:
    """Texts whose class is whether token 5 or token 6 is more frequent; some labels flipped."""
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 7, (n, 9), generator=gen)
    labels = ((ids == 6).sum(1) > 4).long()
    return ids, torch.where(torch.rand(n, generator=gen) < flip, 1 - labels, labels)


def fitted(name: str, seed: int, *, steps: int, flip: float, **kwargs: Any) -> tuple[float, float]:
    """(training, clean test) mean negative log-likelihood after some steps on 24 texts."""
    model = base("llama", task="sequence-classification", num_labels=2)
    adapted = attach(model, small(name, unfreeze=("score",), **kwargs), seed=seed)
    ids, labels = noisy(seed, 24, flip=flip)
    optimizer = torch.optim.AdamW([p.tensor for p in adapted.params()], lr=1e-2)
    objective = adapted.methods["default"].objective
    for i in range(steps):
        outs = []
        for k in range(2 if objective else 1):
            with adapted.given(step=i, seed=k):
                outs.append(model.train()(input_ids=ids).logits)
        loss = sum(F.cross_entropy(z, labels) for z in outs) / len(outs)
        loss = loss + (objective.weight * divergence(*outs) / len(ids) if objective else 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = [F.cross_entropy(model.eval()(input_ids=x).logits, y).item() for x, y in ((ids, labels), noisy(100 + seed, 200, flip=0.0))]
    return found[0], found[1]


@pytest.mark.slow
def test_label_noise_hurts_it_less_than_lora_and_a_short_clean_run_more() -> None:
    drop = {"keys": 0.2, "hidden": 0.2, "kl": 1.0}
    noisy_runs = [[fitted(name, seed, steps=60, flip=0.3, **drop)[1] for name in ("hiddenkey", "lora")] for seed in range(5)]
    assert sum(ours < lora for ours, lora in noisy_runs) >= 4, noisy_runs
    short_runs = [[fitted(name, seed, steps=8, flip=0.0, **drop)[0] for name in ("hiddenkey", "lora")] for seed in range(5)]
    assert sum(ours > lora for ours, lora in short_runs) >= 4, "what regularizes fits more slowly"
