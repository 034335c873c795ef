import random
from itertools import islice, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.core.errors import CheckpointError, DataError
from lorakit.core.random import generator
from lorakit.data.sampler import SORTED, Batches, grouped, permutation

sizes = st.integers(1, 40)
lengths = st.lists(st.integers(1, 60), min_size=1, max_size=60)
seeds = st.integers(0, 2**40)


def take(batches, n):
    return list(islice(batches, n))


@given(sizes, sizes, seeds)
def test_every_epoch_holds_every_item_once_in_its_own_order(n, batch, seed):
    stream = [item for b in take(Batches(n, batch, seed=seed), 3 * n) for item in b]
    epochs = [stream[i : i + n] for i in range(0, len(stream) - n + 1, n)]
    assert len(epochs) >= 3
    assert all(sorted(e) == list(range(n)) for e in epochs)
    assert epochs[1] == permutation(n, seed, 1)


def test_epochs_and_seeds_differ():
    assert permutation(50, 0, 0) != permutation(50, 0, 1) != permutation(50, 1, 1)
    assert permutation(6, 0, 0) == [2, 1, 0, 4, 5, 3]  # the same on every machine


@given(sizes, sizes, seeds, st.integers(0, 20))
def test_resuming_equals_never_stopping(n, batch, seed, done):
    whole = take(Batches(n, batch, seed=seed), done + 5)
    first = Batches(n, batch, seed=seed)
    take(first, done)
    second = Batches(n, batch, seed=seed)
    second.load_state_dict(first.state_dict())
    assert second.epoch == first.epoch == done * batch / n
    assert take(second, 5) == whole[done:]


@given(sizes, st.integers(1, 5), st.integers(1, 4), seeds)
def test_the_union_over_ranks_is_the_single_process_batch_in_order(n, per_rank, world, seed):
    single = take(Batches(n, per_rank * world, seed=seed), 6)
    ranks = [take(Batches(n, per_rank * world, seed=seed, rank=r, world=world), 6) for r in range(world)]
    for step, batch in enumerate(single):
        assert [item for group in zip(*(rank[step] for rank in ranks), strict=True) for item in group] == batch


def test_the_world_may_change_on_resuming():
    whole = take(Batches(10, 4, seed=3), 6)
    first = Batches(10, 4, seed=3, rank=1, world=2)
    take(first, 2)
    second = Batches(10, 4, seed=3)
    second.load_state_dict(first.state_dict())
    assert take(second, 4) == whole[2:]


def test_state_is_plain_integers_and_another_stream_is_refused():
    batches = Batches(10, 4, seed=3)
    next(batches)
    state = batches.state_dict()
    assert state == {"position": 4, "n_items": 10, "seed": 3, "group": 0}
    with pytest.raises(CheckpointError, match="saved with n_items=10 but this run has n_items=11"):
        Batches(11, 4, seed=3).load_state_dict(state)
    with pytest.raises(CheckpointError, match="seed=3 but this run has seed=4"):
        Batches(10, 4, seed=4).load_state_dict(state)


@pytest.mark.parametrize(
    "kwargs",
    [{"n_items": 0}, {"batch_size": 0}, {"batch_size": 3, "world": 2}, {"rank": 2, "world": 2}, {"rank": -1, "world": 2}, {"lengths": [1]}],
)
def test_impossible_settings_are_refused(kwargs):
    with pytest.raises(DataError):
        Batches(**{"n_items": 4, "batch_size": 2, **kwargs})


# --- grouped by length ----------------------------------------------------------------------------------------------------------


def ragged(n, seed=0):
    """Lengths as chats have them: most are short, some are very long."""
    draw = random.Random(seed)
    return [1 + int(draw.lognormvariate(4, 0.8)) for _ in range(n)]


def padding(batches, lengths):
    """The share of a batch's places, filled to its longest item, that hold no token."""
    held = sum(lengths[i] for b in batches for i in b)
    return 1 - held / sum(max(lengths[i] for i in b) * len(b) for b in batches)


@given(lengths, sizes, seeds)
def test_every_epoch_holds_every_item_once_when_grouped(lengths, batch, seed):
    n = len(lengths)
    epochs = [grouped(lengths, batch, seed, e) for e in range(3)]
    assert all(sorted(e) == list(range(n)) for e in epochs)
    given_out = [item for b in take(Batches(n, batch, lengths=lengths, seed=seed), n) for item in b]
    assert sorted(given_out) == sorted(list(range(n)) * batch)


@given(lengths, sizes, seeds, st.integers(0, 20), st.integers(1, 12))
def test_resuming_equals_never_stopping_when_grouped(lengths, batch, seed, done, other):
    n = len(lengths)
    whole = take(Batches(n, batch, lengths=lengths, seed=seed), done + 5)
    first = Batches(n, batch, lengths=lengths, seed=seed)
    take(first, done)
    second = Batches(n, batch, lengths=lengths, seed=seed)
    second.load_state_dict(first.state_dict())
    assert take(second, 5) == whole[done:]
    third = Batches(n, other, lengths=lengths, seed=seed)  # another batch size cuts the same stream elsewhere
    third.load_state_dict(first.state_dict())
    stream = [item for e in range((done * batch + 5 * other) // n + 1) for item in grouped(lengths, batch, seed, e)]
    start = done * batch
    assert [sorted(b) for b in take(third, 5)] == [sorted(stream[start + i * other : start + (i + 1) * other]) for i in range(5)]


@given(lengths, st.integers(1, 5), st.integers(1, 4), seeds)
def test_the_union_over_ranks_is_the_single_process_batch_when_grouped(lengths, per_rank, world, seed):
    n, batch = len(lengths), per_rank * world
    single = take(Batches(n, batch, lengths=lengths, seed=seed), 6)
    ranks = [take(Batches(n, batch, lengths=lengths, seed=seed, rank=r, world=world), 6) for r in range(world)]
    for step, together in enumerate(single):
        assert [item for group in zip(*(rank[step] for rank in ranks), strict=True) for item in group] == together
        assert [lengths[i] for i in together] == sorted((lengths[i] for i in together), reverse=True)


def test_grouped_batches_pad_little_over_many_epochs():
    sizes = ragged(1003)  # no multiple of the batch: every epoch starts in the middle of one
    blind, near = (take(Batches(1003, 8, lengths=which), 1000) for which in (None, sizes))
    assert padding(blind, sizes) > 0.4
    assert padding(near, sizes) < 0.12
    epochs = [near[i : i + 125] for i in range(0, 1000, 125)]
    assert all(padding(epoch, sizes) < 0.15 for epoch in epochs), "the first epoch as well as the eighth"


def test_a_batch_across_two_epochs_takes_both_parts_from_one_place():
    sizes = list(range(1, 1004))
    spans = [b for b in take(Batches(1003, 8, lengths=sizes), 1000) if max(sizes[i] for i in b) - min(sizes[i] for i in b) > 300]
    assert not spans


def test_batches_of_any_length_come_at_any_time_and_with_other_members():
    sizes = ragged(800)
    batches = take(Batches(800, 8, lengths=sizes), 200)
    longest = [sizes[b[0]] for b in batches]
    ranks = [sorted(longest[:100]).index(x) for x in longest[:100]]
    early, late = ranks[:50], ranks[50:]
    assert abs(sum(early) - sum(late)) / 50 < 20, "neither the short nor the long ones come first"
    assert sum(abs(a - b) for a, b in pairwise(ranks)) / 99 > 15, "and they are not sorted"
    first, second = ({frozenset(b) for b in batches[i : i + 100]} for i in (0, 100))
    assert len(first & second) < 5


def test_grouped_is_the_same_on_every_machine():
    sizes = [5, 1, 4, 2, 8, 3, 7, 6]
    assert grouped(sizes, 2, 0, 0) == [1, 3, 5, 2, 6, 4, 0, 7]
    assert grouped(sizes, 2, 0, 1) != grouped(sizes, 2, 0, 0) != grouped(sizes, 2, 1, 0)


def test_grouping_may_not_be_switched_on_resuming():
    plain, near = Batches(8, 2), Batches(8, 2, lengths=[1] * 8)
    for a, b in ((plain, near), (near, plain)):
        with pytest.raises(CheckpointError, match="group_by_length"):
            a.load_state_dict(b.state_dict())


def by_lists(lengths, size, seed, epoch):
    """`grouped` as it was written before it took arrays."""
    n, order = len(lengths), permutation(len(lengths), seed, epoch)
    if n < 2 * size:
        return order

    def near(items, count, border):
        start = round(torch.rand((), generator=generator(seed, f"border:{border}")).item() * (len(items) - count))
        chosen = sorted(items, key=lengths.__getitem__)[start : start + count]
        return chosen, [item for item in items if item not in set(chosen)]

    head = -epoch * n % size
    first, rest = near(order, head, epoch)
    last, rest = near(rest, (n - head) % size, epoch + 1)
    part = size * max(1, min(SORTED, n // (2 * size)))
    parts = [sorted(rest[i : i + part], key=lengths.__getitem__) for i in range(0, len(rest), part)]
    batches = [items[i : i + size] for items in parts for i in range(0, len(items), size)]
    shuffled = torch.randperm(len(batches), generator=generator(seed, f"batches:{epoch}")).tolist()
    return [*first, *(item for k in shuffled for item in batches[k]), *last]


@pytest.mark.parametrize("n", [1, 9, 40, 301])
@pytest.mark.parametrize("size", [1, 4, 7])
def test_the_order_is_what_it_was_before_there_were_arrays(n, size):
    for seed in range(5):
        lengths = random.Random(seed).choices(range(1, 30), k=n)
        for epoch in range(4):
            assert grouped(lengths, size, seed, epoch) == by_lists(lengths, size, seed, epoch)
