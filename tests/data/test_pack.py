"""The central claim: a packed window's logits and gradients are those of its documents alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lorakit.core.errors import DataError
from lorakit.data.builtin import load
from lorakit.data.encoded import IGNORED, Encoded
from lorakit.data.pack import Packed, collate, fill, pack
from lorakit.data.samples import Samples
from lorakit.data.tiny import tiny_model, tiny_tokenizer
from lorakit.data.tokenize import tokenize_rows

sequences = st.lists(st.lists(st.integers(5, 99), min_size=1, max_size=9), min_size=1, max_size=30)


def encoded(ids):
    return Encoded(list(ids), list(ids))


def split(window):
    starts = [i for i, position in enumerate(window.position_ids) if position == 0]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(window.input_ids)], strict=True)]


@given(sequences, st.integers(9, 20))
def test_every_document_lies_whole_in_one_window(documents, length):
    windows = pack([encoded(d) for d in documents], length)
    found = [(w.input_ids[s], w.position_ids[s], w.labels[s]) for w in windows for s in split(w)]
    assert sorted(ids for ids, _, _ in found) == sorted(documents)
    for ids, positions, labels in found:
        assert positions == list(range(len(ids)))
        assert labels == [IGNORED, *ids[1:]]
    assert all(1 <= len(w.input_ids) == len(w.labels) == len(w.position_ids) <= length for w in windows)
    assert sum(w.documents for w in windows) == len(documents)
    assert list(windows) == list(pack([encoded(d) for d in documents], length))


def copied(samples, length):
    """Windows as they were before they held indices: each a copy of its documents, found by the same best fit."""
    windows, rooms, since = [], [], {}
    for step, i in enumerate(sorted(range(len(samples)), key=lambda i: -len(samples[i].input_ids))):
        size = len(samples[i].input_ids)
        fitting = [w for w, room in enumerate(rooms) if room >= size]
        if not fitting:
            windows.append([]), rooms.append(length)
        # least room first; among equals, the one whose room became so first
        at = min(fitting, key=lambda w: (rooms[w], since[w])) if fitting else len(rooms) - 1
        windows[at].append(i)
        rooms[at] -= size
        since[at] = step
    made = []
    for members in windows:
        documents = [samples[i] for i in sorted(members)]
        made.append(
            Packed(
                [t for d in documents for t in d.input_ids],
                [t for d in documents for t in (IGNORED, *d.labels[1:])],
                [p for d in documents for p in range(len(d.input_ids))],
            )
        )
    return made


def test_windows_by_index_are_bit_equal_to_copies_on_real_data():
    """And to those of samples that are a list."""
    samples = tokenize_rows(tiny_tokenizer(), load("xml", "chat", "train"), max_length=512).samples
    assert isinstance(samples, Samples)
    windows, old = pack(samples, 512), copied(list(samples), 512)
    assert len(windows) == len(old) > 5
    assert list(windows) == list(pack(list(samples), 512)) == old
    ours, theirs = collate(windows[:4], pad_id=3), collate(old[:4], pad_id=3)
    assert all(torch.equal(ours[key], theirs[key]) for key in ("input_ids", "labels", "position_ids"))
    assert windows.lengths.tolist() == [len(w.input_ids) for w in old]
    assert windows[-1] == old[-1]
    assert windows[1:9:3] == old[1:9:3]


def test_a_window_holds_four_bytes_a_sample():
    lengths = np.full(10_000, 3)
    samples = Samples.of([encoded([7] * n) for n in lengths], "token")
    windows = pack(samples, 30)
    assert windows.samples is samples
    assert windows.members.nbytes == 4 * len(samples)
    assert windows.offsets.nbytes == 8 * (len(windows) + 1) == 8 * 1001


@given(sequences, st.integers(9, 20))
def test_the_fit_is_the_textbook_s_best_fit_decreasing(documents, length):
    rooms = []
    for size in sorted(map(len, documents), reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= size
        else:
            rooms.append(length - size)
    windows = pack([encoded(d) for d in documents], length)
    assert sorted(length - len(w.input_ids) for w in windows) == sorted(rooms)
    assert fill(windows, length) == pytest.approx(sum(map(len, documents)) / length / len(windows))


def test_a_window_keeps_the_order_of_the_samples():
    (window,) = pack([encoded([1]), encoded([2, 2, 2]), encoded([3, 3])], 6)
    assert window.input_ids == [1, 2, 2, 2, 3, 3]
    assert window.documents == 3


def test_among_equally_full_windows_the_oldest_takes_the_next():
    windows = pack([encoded([1] * 4), encoded([2] * 4), encoded([3])], 5)
    assert [w.input_ids for w in windows] == [[1, 1, 1, 1, 3], [2, 2, 2, 2]]


def test_what_does_not_fit_is_refused():
    with pytest.raises(DataError, match="sample 1 has 4 tokens and the window holds 3; tokenize with max_length=3"):
        pack([encoded([1]), encoded([1, 2, 3, 4])], 3)
    with pytest.raises(DataError, match="sample 0 has 0 tokens"):
        pack([encoded([])], 3)
    with pytest.raises(DataError, match="encoder-decoder samples cannot be packed"):
        pack([Encoded([1, 2], [1])], 3)
    with pytest.raises(DataError, match="a window has 3 tokens; the batch was asked to be 2 long"):
        collate(pack([encoded([1, 2, 3])], 3), length=2)


def test_collate_fills_with_documents_of_one_padding_token():
    batch = collate(pack([encoded([5, 6, 7]), encoded([8])], 3), length=5, pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9, 9], [8, 9, 9, 9, 9]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, IGNORED], [IGNORED] * 5]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0], [0] * 5]
    assert batch["use_cache"] is False
    assert "attention_mask" not in batch


# -- exactness ----------------------------------------------------------------------------------------------------------------

LENGTHS = (9, 5, 7, 3, 1, 11)  # some longer than the sliding windows
WINDOWED = {
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},  # one full layer, one sliding
    "qwen3": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gpt2", "gpt_neox")


def build(arch, attention, checkpointing=False):
    model = tiny_model(arch, attn_implementation=attention, **WINDOWED.get(arch, {})).double()
    if checkpointing:
        model.train()
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def documents():
    draw = torch.Generator().manual_seed(0)
    return [encoded(torch.randint(5, 128, (n,), generator=draw).tolist()) for n in LENGTHS]


def summed_loss(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


def gradients(model, loss):
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads


def alone(model):
    """Logits of every document by its tokens, and the gradients of the summed loss."""
    runs = [(d, model(input_ids=torch.tensor([d.input_ids]), use_cache=False).logits) for d in documents()]
    loss = sum(summed_loss(logits, torch.tensor([d.labels])) for d, logits in runs)
    return {tuple(d.input_ids): logits[0].detach() for d, logits in runs}, gradients(model, loss)


def packed(model, **change):
    """The same from one batch of packed windows, padding included; `change` makes mutants."""
    windows = pack(documents(), 16)
    batch = {**collate(windows, length=18), **change}
    labels = batch.pop("labels")
    logits = model(**batch).logits
    assert len(windows) > 1
    assert any(w.documents > 1 for w in windows)
    assert logits.isfinite().all()
    by_document = {tuple(w.input_ids[s]): logits[row, s].detach() for row, w in enumerate(windows) for s in split(w)}
    return by_document, gradients(model, summed_loss(logits, labels))


def error(left, right):
    assert left.keys() == right.keys()
    return max((left[key] - right[key]).abs().max().item() for key in left)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_equals_alone_in_logits_and_gradients(arch, attention, checkpointing):
    model = build(arch, attention, checkpointing)
    (logits, grads), (expected_logits, expected_grads) = packed(model), alone(model)
    tolerance = 1e-11 if attention == "sdpa" or arch == "gpt2" else 1e-4  # Transformers' eager softmax is float32
    assert error(logits, expected_logits) < tolerance
    assert error(grads, expected_grads) < tolerance
    assert max(g.abs().max() for g in expected_grads.values()) > 1


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_model_s_own_loss_over_labels_is_the_mean_of_the_same(arch):
    model = build(arch, "sdpa")
    batch = collate(pack(documents(), 16))
    scored = sum(LENGTHS) - len(LENGTHS)
    expected = sum(
        summed_loss(model(torch.tensor([d.input_ids])).logits, torch.tensor([d.labels])) for d in documents() if len(d.labels) > 1
    )
    assert model(**batch).loss.item() == pytest.approx(expected.item() / scored, rel=1e-6)  # that loss is computed in float32


def no_restart():
    return {"position_ids": torch.arange(18).expand(len(pack(documents(), 16)), 18)}


def mask():
    return {"attention_mask": torch.ones(len(pack(documents(), 16)), 18, dtype=torch.long)}


MUTANTS = {"no restart": no_restart, "with a cache": lambda: {"use_cache": True}, "with a 2-D mask": mask}


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_without_any_one_of_its_three_conditions_packing_is_wrong(arch, mutant):
    model = build(arch, "sdpa")
    (logits, grads), (expected_logits, expected_grads) = packed(model, **MUTANTS[mutant]()), alone(model)
    assert error(logits, expected_logits) > 0.1
    assert error(grads, expected_grads) > 0.1


def test_a_window_longer_than_the_position_table_is_fine_as_long_as_its_documents_are_not():
    model = tiny_model("gpt2", n_positions=12)
    batch = collate(pack(documents(), 40), length=64)
    assert model(**batch).logits.isfinite().all()
