"""The kind of a sample, from the row to each token of a batch and into the context of a forward."""

import pytest
import torch

from lorakit import attach, get_method
from lorakit.data.encoded import Encoded, Labeled
from lorakit.data.pack import collate, pack
from lorakit.data.pad import pad
from lorakit.data.row import kind_of
from lorakit.data.tiny import tiny_model, tiny_tokenizer
from lorakit.data.tokenize import tokenize_classes, tokenize_rows
from lorakit.train.kinds import samples_of, told
from lorakit.train.metrics import forward_loss

CHAT = [{"role": "user", "content": "a b c"}, {"role": "assistant", "content": "d e f"}]


@pytest.mark.parametrize(("kind", "want"), [(0, 0), (3, 3), (-1, None), (True, None), ("code", None), (None, None)])
def test_only_a_number_from_0_on_is_a_kind(kind: object, want: int | None) -> None:
    assert kind_of({"text": "x", "kind": kind}) == want


def test_every_shape_of_row_carries_its_kind_through_cutting() -> None:
    tokenizer = tiny_tokenizer()
    texts = tokenize_rows(tokenizer, [{"text": "abcdefghij" * 3, "kind": 1}, {"text": "xyz", "kind": 0}], max_length=8)
    assert texts.chunked == 1
    assert [s.kind for s in texts.samples] == [1] * (len(texts.samples) - 1) + [0]
    for row in ({"messages": CHAT, "kind": 2}, {"prompt": "abc", "completion": "defghijklmn", "kind": 2}):
        assert [s.kind for s in tokenize_rows(tokenizer, [row], max_length=40).samples] == [2]
    assert [
        s.kind for s in tokenize_rows(tokenizer, [{"prompt": "abc", "completion": "defghijklmn", "kind": 2}], max_length=6).samples
    ] == [2]
    assert tokenize_classes(tokenizer, [{"text": "abc", "label": "x", "kind": 4}], ["x"], max_length=8).samples[0].kind == 4
    assert tokenize_rows(tokenizer, [{"text": "abc"}], max_length=8).samples[0].kind is None


def test_tokens_have_their_samples_kind_and_padding_minus_one() -> None:
    three = [Encoded([5, 6, 7], [5, 6, 7], 1), Encoded([8, 9], [8, 9], 0), Encoded([4], [4], 1)]
    packed = collate(pack(three, 6), length=8)
    assert packed["kinds"].tolist() == [[1, 1, 1, 0, 0, 1, -1, -1]]
    assert samples_of(packed["kinds"], packed["position_ids"]).tolist()[0][:6] == [0, 0, 0, 1, 1, 2]
    two = collate(pack(three, 3))
    assert samples_of(two["kinds"], two["position_ids"]).tolist() == [[0, 0, 0], [1, 1, 2]]  # numbered over the batch, not over a window
    padded = pad(three, 0)
    assert padded["kinds"].tolist() == [[1, 1, 1], [0, 0, -1], [1, -1, -1]]
    assert samples_of(padded["kinds"], None).tolist() == [[0] * 3, [1] * 3, [2] * 3]
    assert pad([Labeled([5, 6], 0, 3)], 0)["kinds"].tolist() == [[3, 3]]


def test_a_batch_without_kinds_is_as_it_was() -> None:
    for some in ([Encoded([5, 6], [5, 6]), Encoded([7], [7])], [Encoded([5, 6], [5, 6], 1), Encoded([7], [7])]):
        assert "kinds" not in pad(some, 0)
        assert "kinds" not in collate(pack(some, 4))


def test_the_context_knows_them_and_the_model_does_not() -> None:
    batch = pad([Encoded([5, 6, 7], [5, 6, 7], 1), Encoded([8, 9], [8, 9], 0)], 0)
    adapted = attach(tiny_model("llama"), get_method("lora", r=2))
    with told(adapted.model, batch) as inputs:
        assert "kinds" not in inputs
        assert adapted.context.kinds is batch["kinds"]
        with adapted.given(step=3):
            assert adapted.context.kinds is batch["kinds"]
            assert adapted.context.key.tolist() == [0, 3]
    assert adapted.context.kinds is None
    with torch.no_grad():
        plain = {k: v for k, v in batch.items() if k != "kinds"}
        assert torch.equal(forward_loss(adapted.model, batch)[0], forward_loss(adapted.model, plain)[0])
    with told(tiny_model("llama"), batch) as inputs:  # a model without adapters has nothing to tell
        assert "kinds" not in inputs
