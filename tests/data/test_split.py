import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.core.errors import DataError
from lorakit.data.split import check_split, hash_split, position

words = st.lists(st.text(max_size=4), min_size=2, max_size=60)


def split(items, side, **options):
    return hash_split(items, side, key=str, **{"fraction": 0.2, **options})


@given(words, st.floats(0.01, 0.99), st.integers(0, 3))
def test_both_sides_are_a_partition_without_a_shared_key(items, fraction, seed):
    if len(set(items)) < 2:
        return
    train, valid = (split(items, side, fraction=fraction, seed=seed) for side in ("train", "valid"))
    assert train
    assert valid
    assert not set(train) & set(valid)
    assert sorted(train + valid) == sorted(items)


@given(st.lists(st.integers(0, 999), min_size=20, max_size=40, unique=True), st.lists(st.integers(0, 999), max_size=5))
def test_added_rows_do_not_move_the_others(items, more):
    before, after = set(split(items, "valid")), set(split(items + more, "valid"))
    if len(before) > 1:  # away from the rule that no side is empty
        assert before == after & set(items)


def test_the_fraction_is_about_what_was_asked_and_the_seed_matters():
    items = [str(i) for i in range(4000)]
    valid = split(items, "valid", fraction=0.1)
    assert 340 < len(valid) < 460
    assert valid != split(items, "valid", fraction=0.1, seed=1)


def test_what_cannot_be_split_is_refused():
    with pytest.raises(DataError, match="^2 rows that are all the same cannot be divided .*; add others, or give eval_data"):
        split(["a", "a"], "train")
    with pytest.raises(DataError, match=r"fraction is 1\.5; expected a number between 0 and 1"):
        split(["a", "b"], "train", fraction=1.5)
    with pytest.raises(DataError, match="no split is called 'test'; choose 'train' or 'valid'"):
        check_split("test")


def as_it_was(items, side, fraction, seed):
    """The split of the first releases, which held every key: what runs were split by stays what they are split by."""
    places = {k: position(k, seed=seed) for k in items}
    in_order = sorted(places, key=lambda k: (places[k], k))
    count = sum(place < fraction for place in places.values())
    valid = set(in_order[: min(max(count, 1), len(in_order) - 1)])
    return [item for item in items if (item in valid) == (side == "valid")]


@given(words, st.floats(1e-6, 1 - 1e-6), st.integers(0, 3))
def test_hashes_alone_split_as_keys_did(items, fraction, seed):
    if len(set(items)) < 2:
        return
    for side in ("train", "valid"):
        assert split(items, side, fraction=fraction, seed=seed) == as_it_was(items, side, fraction, seed)


@given(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=12), st.floats(0.01, 0.99), st.integers(1, 3))
def test_keys_whose_hashes_collide_are_still_told_apart(items, fraction, different):
    if len(set(items)) < 2:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorakit.data.split.hashed", lambda key, *, seed: (ord(key) % different) << 46)
        for side in ("train", "valid"):
            assert split(items, side, fraction=fraction, seed=0) == as_it_was(items, side, fraction, 0)
