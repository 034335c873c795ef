"""Samples are the sequence that they were made of, whatever the layout, in memory or joined of parts."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.encoded import IGNORED, Encoded, Labeled
from lorakit.data.samples import Samples

ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6)
kinds = st.none() | st.integers(0, 5)
tokens = st.lists(st.builds(lambda i, k: Encoded(i, [IGNORED, *i[1:]], k), ids, kinds), max_size=8)
targets = st.lists(st.builds(Encoded, ids, ids, kinds), max_size=8)
classes = st.lists(st.builds(Labeled, ids, st.integers(0, 9), kinds), max_size=8)
some = st.one_of(*(st.tuples(st.just(layout), s, s) for layout, s in (("token", tokens), ("target", targets), ("class", classes))))


@given(some)
def test_samples_are_what_they_were_made_of(drawn):
    layout, made, more = drawn
    samples = Samples.of(made, layout)
    assert list(samples) == made
    assert samples[:] == made
    assert samples[::-1] == made[::-1]
    assert samples[1:3] == made[1:3]
    assert [samples[-i - 1] for i in range(len(made))] == made[::-1]
    assert list(pickle.loads(pickle.dumps(samples))) == made
    assert list(Samples.joined([samples, Samples.of([], layout), Samples.of(more, layout)])) == made + more
    with pytest.raises(IndexError):
        samples[len(made)]


@given(some)
def test_lengths_are_what_an_item_counts_in_a_batch(drawn):
    layout, made, _ = drawn
    both = [len(s.input_ids) + (len(s.labels) if layout == "target" else 0) for s in made]
    assert Samples.of(made, layout).lengths.tolist() == both
