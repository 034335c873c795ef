"""One mean over all labels, however the examples are batched."""

import pytest
import torch
import torch.nn.functional as F

from lorakit.core.errors import DataError
from lorakit.data.tiny import tiny_model, tiny_tokenizer
from lorakit.train.weights.objective import few_shots, gradient, mean_loss
from lorakit.train.weights.weighed import together
from tests.train.weights.world import some

ROWS = [
    {"prompt": "2 + 2 =", "completion": " 4"},
    {"prompt": "the capital of France is", "completion": " Paris, on the Seine"},
    {"prompt": "", "completion": "once upon a time"},
]


def by_hand(model, tokenizer, rows) -> float:
    nats, n = 0.0, 0
    for row in rows:
        start, answer = (tokenizer(row[k], add_special_tokens=k == "prompt")["input_ids"] for k in ("prompt", "completion"))
        ids = [*start, *answer, tokenizer.eos_token_id]
        with torch.no_grad():
            z = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        wanted = range(max(1, len(start)), len(ids))
        nats, n = nats - sum(z[i - 1, ids[i]].item() for i in wanted), n + len(wanted)
    return nats / n


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_loss_is_the_mean_over_all_labels(batch_size: int) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    objective = few_shots(model, tokenizer, ROWS, batch_size=batch_size)
    assert mean_loss(objective, model) == pytest.approx(by_hand(model, tokenizer, ROWS), rel=1e-4)


def test_gradients_do_not_depend_on_the_batches() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    adapters = some(n=2, sites="attention")
    with together(model, adapters, force=True) as here:
        here.set_([[0.4, -0.3]])
        found = []
        for size in (1, 2, 3):
            gradient(few_shots(model, tokenizer, ROWS, batch_size=size), model, here.v)
            found.append(here.v.grad.clone())
    assert torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-7) and torch.allclose(found[0], found[2], rtol=1e-4, atol=1e-7)
    assert found[0].abs().max() > 1e-3


def test_a_models_mode_is_given_back_and_its_dropout_is_off() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model("gpt2", vocab_size=len(tokenizer), resid_pdrop=0.5).train()
    objective = few_shots(model, tokenizer, ROWS)
    assert mean_loss(objective, model) == mean_loss(objective, model)
    assert model.training


def test_classes_are_examples_too() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", task="sequence-classification", vocab_size=len(tokenizer))
    rows = [{"text": "aaa", "label": "a"}, {"text": "zzz zzz", "label": "z"}]
    objective = few_shots(model, tokenizer, rows, labels=["z", "a", "b"])
    with torch.no_grad():
        z = [model(input_ids=torch.tensor([tokenizer(row["text"])["input_ids"]])).logits[0] for row in rows]
    wanted = sum(F.cross_entropy(one, torch.tensor(label)).item() for one, label in zip(z, (1, 0), strict=True)) / 2
    assert mean_loss(objective, model) == pytest.approx(wanted, rel=1e-4)


def test_no_label_at_all() -> None:
    with pytest.raises(DataError, match="no label to predict"):
        mean_loss(lambda model: [], tiny_model("llama"))
