"""Which module reads the input of the block that a site ends."""

import pytest

from lorakit import Incompatible, Site
from lorakit.core.site import _layer, _role
from lorakit.parts.deltas.entrances import Entrances


def named(*names: str) -> list[Site]:
    return [Site(n, "linear", 6, 12 if _role(n) in ("up", "gate") else 6, _layer(n), _role(n)) for n in names]


def test_the_entrance_is_the_nearest_module_that_reads_the_blocks_input():
    every = named(
        "encoder.block.0.layer.0.SelfAttention.q", "encoder.block.0.layer.0.SelfAttention.o",
        "encoder.block.0.layer.1.DenseReluDense.wi_0", "encoder.block.0.layer.1.DenseReluDense.wi_1",
        "decoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.o",
        "decoder.block.0.layer.1.EncDecAttention.q", "decoder.block.0.layer.1.EncDecAttention.o",
        "decoder.block.0.layer.2.DenseReluDense.wi_0", "decoder.block.1.layer.1.EncDecAttention.q",
    )  # fmt: skip
    every += [Site(f"{s}.DenseReluDense.wo", "linear", 12, 6, 0, "down") for s in ("encoder.block.0.layer.1", "decoder.block.0.layer.2")]
    ends = [s for s in every if s.role in ("o", "down")]
    found = Entrances.find(ends, every)
    assert {s.name: found.of(s)[0] for s in ends} == {
        "encoder.block.0.layer.0.SelfAttention.o": "encoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.0.SelfAttention.o": "decoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.o": "decoder.block.0.layer.1.EncDecAttention.q",
        "encoder.block.0.layer.1.DenseReluDense.wo": "encoder.block.0.layer.1.DenseReluDense.wi_1",
        "decoder.block.0.layer.2.DenseReluDense.wo": "decoder.block.0.layer.2.DenseReluDense.wi_0",
    }
    assert found.of(every[0]) == (), "a site of another role reads its own input"


def test_a_block_without_an_entrance_is_an_error():
    every = named("layers.0.down_proj", "layers.1.up_proj", "layers.0.other")
    with pytest.raises(Incompatible, match=r"layers\.0\.down_proj.*up or gate or gate_up"):
        Entrances.find(every[:1], every)
    assert Entrances.find(every[:1], every[:1]).paths == {}, "at rest nothing can be said"
