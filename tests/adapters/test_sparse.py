"""Coded tensors come back bit by bit; coded bytes that were not written so are refused before they cost anything."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.adapters import sparse
from lorakit.adapters.sparse import INDEX, STREAM, Coded, decode, encode
from lorakit.adapters.weights import DTYPES, pack, unpack
from lorakit.core.errors import CheckpointError
from tests.laws.subject import same_bits

HERE = Path("adapter.safetensors")


def ternary(k: float, *shape: int, c: float = 0.37, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=rng) < k
    signs = torch.randint(0, 2, shape, generator=rng) * 2 - 1
    return (kept * signs).to(dtype) * torch.tensor(c, dtype=dtype)


SMALL = {
    "a.A": ternary(0.2, 6, 11),
    "a.B": ternary(0.7, 5, 3, dtype=torch.bfloat16),
    "b.m": torch.randn(9, generator=torch.Generator().manual_seed(1)),
    "b.none": torch.zeros(4, 0),
    "b.zeros": torch.zeros(70),
}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    """In every bit, numbers without dimensions and tensors without numbers included."""
    pairs = [(found[name], wanted[name]) for name in wanted] if found.keys() == wanted.keys() else []
    alike = len(pairs) == len(found) == len(wanted) and all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs)
    return alike and all(same_bits(a.reshape(-1), b.reshape(-1)) for a, b in pairs if a.numel())


def nbytes(coded: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: entry.nbytes for name, entry in Coded(coded, HERE).entries.items()}


# ----------------------------------------------------------------------------------------------------------------- round trips
@given(st.data())
def test_any_bits_of_any_dtype_come_back(data):
    """Also NaN, −0.0 and numbers below the normal ones: the code looks at patterns, not at numbers."""
    dtype = data.draw(st.sampled_from(sorted(DTYPES.values(), key=str)))
    shape = data.draw(st.lists(st.integers(0, 7), max_size=3))
    size = math.prod(shape)
    words = data.draw(st.lists(st.sampled_from([0, 0, 0, 1, 1 << (8 * dtype.itemsize - 1), 5, 0x7F]), min_size=size, max_size=size))
    words = [word % 2 if dtype == torch.bool else word for word in words]
    tensor = torch.from_numpy(np.array(words, f"u{dtype.itemsize}")).view(dtype).reshape(shape)
    assert same(decode(encode({"x.y": tensor}), HERE), {"x.y": tensor})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [0.0, 0.003, 0.2, 0.5, 0.7, 1.0])
def test_ternary_tensors_come_back(k, dtype):
    tensors = {f"{d}.A": ternary(k, *shape, dtype=dtype) for d, shape in enumerate([(), (0,), (1,), (2,), (13, 17), (2, 3, 40)])}
    assert same(decode(encode(tensors), HERE), tensors)


def test_all_at_once_and_in_any_order():
    coded = encode(SMALL)
    assert same(decode(coded, HERE), SMALL)
    assert same(encode(dict(reversed(SMALL.items()))), coded)
    assert same(encode(decode(coded, HERE)), coded)
    assert same(decode(encode({}), HERE), {})
    assert sum(nbytes(coded).values()) == len(coded[STREAM])


def test_decoded_tensors_have_memory_of_their_own():
    """So that one may be trained in place."""
    found = decode(encode(SMALL), HERE)
    for tensor in found.values():
        tensor.add_(1)
    assert same(found, {name: t + 1 for name, t in SMALL.items()})  # it is kept
    storages = [t.untyped_storage() for t in found.values() if t.numel()]
    assert len({s.data_ptr() for s in storages}) == len(storages)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in found.values())


def test_views_are_stored_whole():
    whole = ternary(0.3, 8, 8)
    assert same(decode(encode({"a.A": whole[::2].T}), HERE), {"a.A": whole[::2].T.contiguous()})


def test_lazily_each_is_decoded_when_it_is_asked_for(monkeypatch):
    asked = []
    real = sparse._decoded
    monkeypatch.setattr(sparse, "_decoded", lambda entry, data: asked.append(entry.name) or real(entry, data))
    found = decode(encode(SMALL), HERE, lazily=True)
    assert (list(found), len(found), asked) == (sorted(SMALL), len(SMALL), [])
    assert same({"b.m": found["b.m"]}, {"b.m": SMALL["b.m"]})
    assert asked == ["b.m"]
    assert same(dict(found), SMALL)
    with pytest.raises(KeyError):
        found["x"]


def test_other_tensors_pass():
    assert decode(SMALL, HERE) is decode(SMALL, HERE, lazily=True) is SMALL


# ----------------------------------------------------------------------------------------------------------------------- sizes
@pytest.mark.parametrize(
    ("k", "over"), [(0.01, 0.01), (0.05, 0.01), (0.1, 0.01), (0.2, 0.01), (0.3, 0.01), (0.4, 0.025), (0.5, 0.01), (0.8, 0.01)]
)
def test_the_stream_of_a_ternary_tensor_is_close_to_its_entropy(k, over):
    tensor = ternary(k, 1000, 500)
    share = tensor.count_nonzero().item() / tensor.numel()
    entropy = -(1 - share) * math.log2(1 - share) - share * math.log2(share / 2)
    assert 0.999 < 8 * nbytes(encode({"a.A": tensor}))["a.A"] / (entropy * tensor.numel()) < 1 + over


def test_what_is_not_sparse_costs_no_more_than_a_part_of_a_bit_an_entry():
    tensor = torch.randn(1000, 50)
    assert nbytes(encode({"a.A": tensor}))["a.A"] <= tensor.nbytes + tensor.numel() / sparse.golomb.LARGEST / 8 + 2


def test_the_index_of_many_tensors_is_small():
    names = [f"model.layers.{i}.{block}.{k}" for i in range(32) for block in ("self_attn.q_proj", "mlp.up_proj") for k in "AB"]
    coded = encode({name: ternary(0.2, 16, 64, seed=i) for i, name in enumerate(names)})
    assert len(coded[INDEX]) < 20 * len(names)


# ------------------------------------------------------------------------------------------------------------- what is no code
def refused(data: bytes) -> bool:
    """Whether a file's bytes are refused; else they must mean what was written."""
    try:
        found = decode(unpack(data, HERE), HERE)
    except CheckpointError as error:
        message = str(error)
    else:
        assert same(found, SMALL)
        return False
    assert "\n" not in message
    assert len(message) < 500
    return True


def test_a_file_cut_off_anywhere_is_refused():
    data = pack(encode(SMALL))
    assert all(refused(data[:end]) for end in range(len(data)))
    assert refused(data + b"\0")


def test_no_changed_byte_goes_unseen():
    """What is not refused means what was written; of the stream, everything is refused."""
    data, stream, rng = pack(encode(SMALL)), len(encode(SMALL)[STREAM]), np.random.default_rng(0)
    for place in range(len(data)):
        for flip in {1 << int(bit) for bit in rng.integers(0, 8, 3)} | {int(rng.integers(1, 256))}:
            seen = refused(data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])
            assert seen or place < len(data) - stream


def resealed(change, stream: bytes | None = None) -> dict[str, torch.Tensor]:
    """The small tensors' code by somebody who knows the checksums."""
    coded = encode(SMALL)
    data = coded[STREAM].numpy().tobytes() if stream is None else stream
    index = json.loads(zlib.decompress(coded[INDEX].numpy().tobytes()))
    index["crc32"] = zlib.crc32(data)
    change(index)
    text = json.dumps(index).encode()
    return {INDEX: torch.tensor(list(zlib.compress(text)), dtype=torch.uint8), STREAM: torch.tensor(list(data), dtype=torch.uint8)}


def entry(**fields):
    """A change of the first tensor's entry (a.A, of 6 × 11 float32)."""
    return lambda index: index["tensors"][0].update(fields)


HOSTILE = {
    "another version": (lambda index: index.update(version=2), "version 2; this lorakit reads 1: upgrade"),
    "another version of more": (lambda index: index.update(version=2, more=1), "version 2; this lorakit reads 1: upgrade"),
    "a field too many": (lambda index: index.update(more=1), "Extra inputs"),
    "a shape of a petabyte": (entry(shape=[2**20, 2**30]), "bytes cannot hold"),
    "just too large a shape": (entry(shape=[8 * 256, 10**3]), "bytes cannot hold"),
    "a shape without end": (entry(shape=[2**40] * 8), "bytes cannot hold"),
    "a shape of nothing, times much": (entry(shape=[0, 2**40, 2**40], count=0), "the gaps make a row"),
    "more dimensions": (entry(shape=[1] * 9), "at most 8"),
    "a negative side": (entry(shape=[-6, -11]), "bytes cannot hold"),
    "a side of text": (entry(shape=["6", 11]), "valid integer"),
    "another shape": (entry(shape=[6, 12]), "the gaps make a row"),
    "more places than entries": (entry(count=67), "bytes cannot hold"),
    "negative places": (entry(count=-1), "greater than or equal to 0"),
    "other places": (entry(count=3), "the gaps make a row|bits"),
    "m of zero": (entry(m=0), "greater than or equal to 1"),
    "m beyond": (entry(m=257), "less than or equal to 256"),
    "another m": (entry(m=9), "the gaps make a row|bits|gaps are there"),
    "the zeros' places": (entry(coded="zeros"), "ends within the sizes|bits"),
    "sizes of its own": (entry(sizes="own"), "ends within the sizes|gaps|bits"),
    "an unknown code": (entry(coded="else"), "Input should be 'kept' or 'zeros'"),
    "an unknown dtype": (entry(dtype="F8"), "Input should be"),
    "wider numbers": (entry(dtype="F64"), "gaps|bits|row"),
    "bytes of another": (entry(nbytes=10), "bytes are not the"),
    "a name twice": (lambda index: index["tensors"][1].update(name="a.A"), "names twice"),
    "no tensor": (lambda index: index.update(tensors=[]), "are not the"),
    "text for tensors": (lambda index: index.update(tensors="x"), "valid array"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_an_index_that_does_not_hold(what):
    change, message = HOSTILE[what]
    with pytest.raises(CheckpointError, match=message):
        decode(resealed(change), HERE)


def test_bits_behind_the_last_one_are_refused():
    """What says nothing could say something to somebody else, and would be lost."""
    coded = encode({"a.A": torch.tensor([0.0, 1.0, 0.0])})
    data = bytearray(coded[STREAM].numpy().tobytes())
    data[-1] |= 1
    index = json.loads(zlib.decompress(coded[INDEX].numpy().tobytes())) | {"crc32": zlib.crc32(data)}
    index["tensors"][0]["nbytes"] = len(data)
    packed = zlib.compress(json.dumps(index).encode())
    with pytest.raises(CheckpointError, match="a.A takes .* of .* bits"):
        decode({INDEX: torch.tensor(list(packed), dtype=torch.uint8), STREAM: torch.tensor(list(data), dtype=torch.uint8)}, HERE)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"version": ' + b"9" * 10_000 + b"}"])
def test_an_index_that_is_none(text):
    coded = encode(SMALL)
    for data in (text, zlib.compress(text)):
        with pytest.raises(CheckpointError, match="is damaged or cut off"):
            decode({**coded, INDEX: torch.tensor(list(data), dtype=torch.uint8)}, HERE)


def test_an_index_that_swells_is_not_inflated(monkeypatch):
    monkeypatch.setattr(sparse, "INDEX_LIMIT", 1000)
    bomb = zlib.compress(b" " * 10**6)
    with pytest.raises(CheckpointError, match="longer than 1000 bytes"):
        decode({**encode({}), INDEX: torch.tensor(list(bomb), dtype=torch.uint8)}, HERE)
    with pytest.raises(CheckpointError, match="at most 1000 are read"):
        encode({f"{i}.A": torch.zeros(1) for i in range(20)})


def test_one_of_the_two_alone_or_of_another_form():
    coded = encode(SMALL)
    others = [
        {INDEX: coded[INDEX]},
        {STREAM: coded[STREAM]},
        {**coded, "a.A": torch.zeros(1)},
        {**coded, STREAM: coded[STREAM].float()},
        {**coded, INDEX: coded[INDEX][None]},
    ]
    for tensors in others:
        with pytest.raises(CheckpointError, match="expected sparse_index and sparse_stream"):
            decode(tensors, HERE)
