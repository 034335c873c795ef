"""The encoder that tells tasks apart: its loss, what is trained, and that it serves tasks it never saw."""

import math

import pytest
import torch
import torch.nn.functional as F

from lorakit.core.errors import DataError, Incompatible
from lorakit.data.tiny import tiny_model, tiny_tokenizer
from lorakit.serve.encoder import HiddenMean, Tuned
from lorakit.train.retriever import META, contrast, encoded, train_encoder
from tests.laws.subject import same_bits
from tests.serve.values import far, made

LETTERS = "abcdefgh"


def task(letter: str, n: int = 6) -> list[str]:
    """Words of one letter among noise that all tasks share."""
    draw = torch.Generator().manual_seed(ord(letter))
    noise = ["".join(chr(105 + int(i)) for i in torch.randint(0, 12, (6,), generator=draw)) for _ in range(n)]
    return [f"{word} {letter * 3} {word[::-1]}" for word in noise]


def accuracy(encoder: HiddenMean, letters: str) -> float:
    """How often the nearest of the tasks' mean vectors is the own, of inputs that are in no mean."""
    tasks = [encoder.encode(task(letter)) for letter in letters]
    means = torch.stack([e[:3].mean(0) for e in tasks])
    hits = [int(F.cosine_similarity(x[None], means).argmax()) == i for i, e in enumerate(tasks) for x in e[3:]]
    return sum(hits) / len(hits)


def test_the_loss_by_hand() -> None:
    a, b = torch.eye(3), torch.eye(3)
    assert contrast(a, b, 1.0).item() == pytest.approx(math.log(math.e + 2) - 1)
    assert contrast(a, b.roll(1, 0), 1.0).item() == pytest.approx(math.log(math.e + 2))
    assert contrast(a, b, 0.01).item() == pytest.approx(0.0, abs=1e-6)
    one, other = F.normalize(torch.randn(4, 5), dim=1), F.normalize(torch.randn(4, 5), dim=1)
    assert contrast(one, other, 0.3).item() == pytest.approx(contrast(other, one, 0.3).item())


def test_padding_changes_nothing() -> None:
    model = tiny_model("llama")
    rows = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3]]
    with torch.no_grad():
        together = encoded(model, rows)
        assert all(far(encoded(model, [row])[0], e) < 1e-5 for row, e in zip(rows, together, strict=True))


def test_it_learns_what_tells_tasks_apart_and_serves_others() -> None:
    """Trained on five tasks: the three that it never saw are found better than by the base."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    plain = HiddenMean(tiny_model("llama"), tokenizer)
    adapter = train_encoder(model, tokenizer, {letter: task(letter) for letter in LETTERS[:5]}, steps=60, lr=5e-3)
    assert model.state_dict().keys() == before.keys()
    assert all(same_bits(tensor, before[key]) for key, tensor in model.state_dict().items()), "the model is as it was"
    tuned = Tuned(model, tokenizer, adapter)
    assert accuracy(tuned, LETTERS[:5]) >= 0.9 > accuracy(plain, LETTERS[:5])
    assert accuracy(tuned, LETTERS[5:]) > accuracy(plain, LETTERS[5:])
    assert adapter.meta[META]["tasks"] == list(LETTERS[:5])


def test_vectors_have_unit_length_and_the_name_tells_encoders_apart() -> None:
    tokenizer, tasks = tiny_tokenizer(), {letter: task(letter) for letter in "ab"}
    some = [train_encoder(tiny_model("llama"), tokenizer, tasks, steps=2, seed=seed) for seed in (0, 0, 1)]
    encoders = [Tuned(tiny_model("llama"), tokenizer, adapter) for adapter in some]
    assert torch.allclose(encoders[0].encode(["x", "a longer one"]).norm(dim=1), torch.ones(2))
    assert encoders[0].name == encoders[1].name != encoders[2].name
    assert encoders[0].name != HiddenMean(tiny_model("llama"), tokenizer).name


def test_what_cannot_be_trained_or_is_no_encoder() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with pytest.raises(DataError, match="at least two tasks.*; 1 tasks were given"):
        train_encoder(model, tokenizer, {"a": task("a")})
    with pytest.raises(DataError, match="'b' has 1"):
        train_encoder(model, tokenizer, {"a": task("a"), "b": ["one"]})
    with pytest.raises(Incompatible, match="was not trained to encode inputs"):
        Tuned(model, tokenizer, made(1))
