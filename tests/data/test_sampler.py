from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.core.errors import CheckpointError, DataError
from lorakit.data.sampler import Batches, permutation

sizes = st.integers(1, 40)
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
    assert state == {"position": 4, "n_items": 10, "seed": 3}
    with pytest.raises(CheckpointError, match="saved with n_items=10 but this run has n_items=11"):
        Batches(11, 4, seed=3).load_state_dict(state)
    with pytest.raises(CheckpointError, match="seed=3 but this run has seed=4"):
        Batches(10, 4, seed=4).load_state_dict(state)


@pytest.mark.parametrize(
    "kwargs", [{"n_items": 0}, {"batch_size": 0}, {"batch_size": 3, "world": 2}, {"rank": 2, "world": 2}, {"rank": -1, "world": 2}]
)
def test_impossible_settings_are_refused(kwargs):
    with pytest.raises(DataError):
        Batches(**{"n_items": 4, "batch_size": 2, **kwargs})
