"""The loss against Transformers' own, the chunked sum against the plain one, scores against scikit-learn and hand counts."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lorakit.core.errors import DataError, Incompatible
from lorakit.data.tiny import ARCHITECTURES, tiny_model
from lorakit.train.metrics import (
    accuracy,
    bits_per_byte,
    cross_entropy_sum,
    exact_match,
    f1,
    forward_loss,
    macro_f1,
    micro_f1,
    perplexity,
)


def batch_of(b: int = 3, t: int = 10, *, ignored: int = 0, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, 128, (b, t), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    for row in range(b):
        labels[row, : ignored * row] = -100  # uneven: rows keep different numbers of tokens
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------------------------------ the loss
@pytest.mark.parametrize("ignored", [0, 3])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_causal_loss_is_the_models_own_mean_times_the_count(arch: str, ignored: int) -> None:
    model, batch = tiny_model(arch), batch_of(ignored=ignored)
    mine, n = forward_loss(model, batch)
    shift = 0 if arch == "t5" else 1
    assert n == (batch["labels"][:, shift:] != -100).sum()
    own = model(**batch).loss * n
    torch.testing.assert_close(mine, own)
    torch.testing.assert_close(gradients(model, mine), gradients(model, own), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["bert", "roberta"])
def test_masked_models_are_not_shifted(arch: str) -> None:
    model, batch = tiny_model(arch, task="masked-lm"), batch_of(ignored=2)
    mine, n = forward_loss(model, batch)
    assert n == (batch["labels"] != -100).sum()
    torch.testing.assert_close(mine, model(**batch).loss * n)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_classifiers(arch: str) -> None:
    model, batch = tiny_model(arch, task="sequence-classification"), batch_of() | {"labels": torch.tensor([0, 2, 1])}
    mine, n = forward_loss(model, batch)
    assert n == 3
    torch.testing.assert_close(mine, model(**batch).loss * 3)


@pytest.mark.parametrize(
    ("num_labels", "problem", "labels"),
    [
        (1, None, torch.tensor([0.5, -1.0, 2.0])),
        (2, "regression", torch.randn(3, 2)),
        (2, None, torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])),
    ],
)
def test_regression_and_several_labels_at_once(num_labels: int, problem: str | None, labels: Tensor) -> None:
    model = tiny_model("bert", task="sequence-classification", num_labels=num_labels, problem_type=problem)
    batch = batch_of() | {"labels": labels}
    mine, n = forward_loss(model, batch)
    assert n == labels.numel()
    torch.testing.assert_close(mine, model(**batch).loss * n)


def test_sums_over_uneven_micro_batches_add_up() -> None:
    model, batch = tiny_model("llama"), batch_of(b=4, t=12, ignored=3)
    whole, n = forward_loss(model, batch)
    wanted = gradients(model, whole / n)
    parts = [forward_loss(model, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(4)]
    assert sum(count for _, count in parts) == n
    torch.testing.assert_close(gradients(model, sum(loss for loss, _ in parts) / n), wanted)


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox"])
def test_ignored_tokens_never_reach_the_head(arch: str) -> None:
    model, batch = tiny_model(arch), batch_of(b=3, t=10, ignored=4)
    seen: list[int] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:-1].numel()))
    _, n = forward_loss(model, batch)
    handle.remove()
    assert seen == [n]
    assert n < 3 * 9


def test_a_batch_without_a_supervised_token_costs_nothing_and_breaks_nothing() -> None:
    model, batch = tiny_model("llama"), batch_of()
    loss, n = forward_loss(model, batch | {"labels": torch.full_like(batch["labels"], -100)})
    assert (loss.item(), n) == (0.0, 0)
    assert all((g == 0).all() for g in gradients(model, loss).values())


def test_the_batch_is_left_alone_and_nothing_is_cached() -> None:
    model, batch = tiny_model("llama"), batch_of()
    calls: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    forward_loss(model, batch)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert calls[0]["use_cache"] is False
    assert "labels" not in calls[0]


def test_the_sum_is_in_float32_under_a_bfloat16_model() -> None:
    loss, _ = forward_loss(tiny_model("llama").to(torch.bfloat16), batch_of())
    assert loss.dtype == torch.float32


def test_logits_that_do_not_fit_the_labels_are_refused() -> None:
    class Short(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model("bert", task="masked-lm")
            self.config = self.inner.config
            self.can_generate = self.inner.can_generate

        def forward(self, **inputs: Any) -> Any:
            out = self.inner(**inputs)
            out.logits = out.logits[:, :-2]
            return out

    with pytest.raises(Incompatible, match=r"logits for \(3, 8\) positions, its labels are \(3, 10\)"):
        forward_loss(Short(), batch_of())


# -------------------------------------------------------------------------------------------------------------- the chunked sum
@pytest.mark.parametrize("chunk", [1, 7 * 13, 10**9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunks_change_neither_the_sum_nor_the_gradient(chunk: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(20, 13, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 13, (20,)).index_fill(0, torch.tensor([3, 19]), -100)
    wide = logits if dtype == torch.float64 else logits.float()
    wanted = F.cross_entropy(wide, targets, ignore_index=-100, reduction="sum")
    found = cross_entropy_sum(logits, targets, chunk=chunk)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, logits), torch.autograd.grad(wanted, logits))


def test_second_derivatives_go_through_chunks() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.randn(6, 4, dtype=torch.float64)
    targets = torch.arange(6) % 5

    def curvature(chunk: int) -> Tensor:
        (g,) = torch.autograd.grad(cross_entropy_sum(x @ weight.T, targets, chunk=chunk), weight, create_graph=True)
        return torch.autograd.grad(g.square().sum(), weight)[0]

    torch.testing.assert_close(curvature(5), curvature(10**9))


# ---------------------------------------------------------------------------------------------------------------- the scores
def test_bits_per_byte_and_perplexity_of_a_fair_coin() -> None:
    nats = 8 * math.log(2)  # eight fair bits
    assert bits_per_byte(nats, 1) == pytest.approx(8)
    assert bits_per_byte(nats, 4) == pytest.approx(2)
    assert perplexity(nats, 8) == pytest.approx(2)
    assert perplexity(1e6, 1) == math.inf


def test_scores_of_a_small_table() -> None:
    predictions, labels = [0, 0, 1, 1, 2], [0, 1, 1, 1, 0]
    assert accuracy(predictions, labels) == micro_f1(predictions, labels) == pytest.approx(3 / 5)
    assert f1(predictions, labels) == pytest.approx(2 * 2 / (2 + 3))
    assert macro_f1(predictions, labels) == pytest.approx((1 / 2 + 4 / 5 + 0) / 3)
    assert f1([0, 0], [0, 0]) == 0.0


def test_exact_match_ignores_outer_white_space_only() -> None:
    assert exact_match([" a b\n", "A", "c"], ["a b", "a", "c"]) == pytest.approx(2 / 3)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_scores_equal_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    p, y = [a for a, _ in pairs], [b for _, b in pairs]
    for mine, average in ((macro_f1, "macro"), (micro_f1, "micro")):
        assert mine(torch.tensor(p), y) == pytest.approx(metrics.f1_score(y, p, average=average, zero_division=0.0))
    assert f1(p, y) == pytest.approx(metrics.f1_score(y, p, labels=[1], average="macro", zero_division=0.0))


@pytest.mark.parametrize(
    "score",
    [
        lambda: accuracy([], []),
        lambda: macro_f1([1], [1, 2]),
        lambda: exact_match(["a"], []),
        lambda: exact_match([], []),
        lambda: bits_per_byte(1.0, 0),
        lambda: perplexity(1.0, 0),
    ],
)
def test_scores_over_nothing_or_over_unequal_lists_are_refused(score: Any) -> None:
    with pytest.raises(DataError):
        score()
