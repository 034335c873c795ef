"""A packed weight: what it decodes to, tile by tile, and how many bits it takes."""

import pytest
import torch

from lorakit import BadParameter
from lorakit.parts.bases import nf4, packed
from lorakit.parts.bases.packed import Layout, Packed
from lorakit.parts.bases.scales import dequantize_scales, quantize_scales
from tests.parts.bases.oracle import weight

SHAPES = ((64, 96), (33, 65), (7, 13), (1, 1), (130, 1), (1, 130), (200, 64))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_decodes_to_levels_times_scales_whatever_the_tiles(
    shape: tuple[int, int], dtype: torch.dtype, double_quant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    W = weight(*shape, dtype=dtype)
    layout = Layout(*shape, dtype, 64, double_quant)
    held = Packed.of(W, layout)
    codes, scales = nf4.quantize(W)
    scales = dequantize_scales(*quantize_scales(scales)) if double_quant else scales
    want = nf4.dequantize(codes, scales).to(dtype).view(shape)
    for tile in (1, 300, 2**20):
        monkeypatch.setitem(packed.TILES, "cpu", tile)
        tiles = layout.tiles(W.device)
        assert [a for a, _ in tiles] == [0, *(b for _, b in tiles[:-1])]
        assert torch.equal(torch.cat([held.rows(layout, a, b) for a, b in tiles]), want)


def test_bits_a_parameter() -> None:
    """4 + 8/64 + 32/(64·256) under double quantization, 4 + 32/64 without."""
    W = weight(512, 1024)
    for double_quant, bits in ((True, 4.127), (False, 4.5)):
        held = Packed.of(W, Layout(512, 1024, W.dtype, 64, double_quant))
        assert 8 * held.nbytes() / W.numel() == pytest.approx(bits, abs=5e-4)


def test_a_weight_without_values_packs_to_one_of_the_same_size() -> None:
    for double_quant in (True, False):
        layout = Layout(100, 130, torch.float32, 64, double_quant)
        real, meta = Packed.of(weight(100, 130), layout), Packed.of(torch.empty(100, 130, device="meta"), layout)
        for a, b in zip(real, meta, strict=True):
            assert (a is None and b is None) or (a.shape, a.dtype) == (b.shape, b.dtype)


def test_an_unknown_block_size_is_refused() -> None:
    with pytest.raises(BadParameter, match="blocksize=48"):
        Layout(8, 8, torch.float32, 48)
