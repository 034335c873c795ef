import pytest
import torch

from lorakit.data.encoded import IGNORED, Encoded, Labeled
from lorakit.data.pad import pad
from lorakit.data.tiny import tiny_model

A, B = Encoded([5, 6, 7], [IGNORED, 6, 7]), Encoded([8, 9], [8, 9])


def test_rows_are_filled_on_the_right():
    batch = pad([A, B], 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, 9, IGNORED]]
    assert all(t.dtype == torch.long for t in batch.values())


def test_targets_of_another_length_and_classes():
    batch = pad([Encoded([5, 6], [7]), Encoded([8], [9, 9, 1])], 0)
    assert batch["input_ids"].shape == (2, 2)
    assert batch["labels"].tolist() == [[7, IGNORED, IGNORED], [9, 9, 1]]
    assert pad([Labeled([5, 6], 2), Labeled([7], 0)], 0)["labels"].tolist() == [2, 0]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "t5"])
def test_padding_does_not_change_the_loss(arch):
    model = tiny_model(arch).double()
    scored = (2, 2) if arch == "t5" else (2, 1)  # decoders do not score the first token
    apart = sum(model(**pad([s], 0)).loss.item() * n for s, n in zip((A, B), scored, strict=True))
    assert model(**pad([A, B], 0)).loss.item() == pytest.approx(apart / sum(scored), rel=1e-6)  # losses are float32


def test_a_classifier_takes_the_batch():
    model = tiny_model("bert", task="sequence-classification")
    assert model(**pad([Labeled([5, 6], 2), Labeled([7], 0)], 0)).loss.isfinite()
