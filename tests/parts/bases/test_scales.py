"""Double quantization beside bitsandbytes'."""

import pytest
import torch
from torch import Tensor

from lorakit.parts.bases import nf4, scales
from lorakit.parts.bases.scales import BLOCK, MAP, dequantize_scales, quantize_scales
from tests.parts.bases.oracle import bitsandbytes, decodes, weight

SHAPES = ((128, 256), (1000, 64), (512, 512), (96, 130), (64, 96))


def test_the_map_is_that_of_bitsandbytes() -> None:
    assert torch.equal(bitsandbytes().functional.create_dynamic_map(), torch.tensor(MAP))
    assert len(MAP) == 256
    assert MAP[127] == 0
    assert MAP[0] == pytest.approx(-0.99297, abs=1e-5)
    assert MAP[-1] == 1
    assert min(v for v in MAP if v > 0) == pytest.approx(5.5e-7)


def on_the_grid(absmax: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
    """The codes of bitsandbytes' CPU rule: round to a grid of 65536 first, then take the nearest."""
    unit = (absmax - offset) / nested.repeat_interleave(BLOCK)[: len(absmax)]
    grid = torch.floor((unit + 1) / 2 * 65535 + 0.5) / 65535 * 2 - 1
    table = torch.tensor(MAP)
    return torch.bucketize(grid, (table[:-1] + table[1:]) / 2).to(torch.uint8)


def check_scales(shape: tuple[int, int], blocksize: int = 64) -> None:
    W = weight(*shape)
    _, state = bitsandbytes().functional.quantize_4bit(W, blocksize=blocksize, quant_type="nf4", compress_statistics=True)
    _, absmax = nf4.quantize(W, blocksize=blocksize)
    codes, nested, offset = quantize_scales(absmax)
    assert torch.equal(offset, state.offset)
    assert torch.equal(nested, state.state2.absmax)
    assert torch.equal(on_the_grid(absmax, nested, offset), state.absmax)
    ours, theirs = (dequantize_scales(c, nested, offset) for c in (codes, state.absmax))
    assert (codes != state.absmax).float().mean() < 0.02
    assert (ours - absmax).abs().sum() <= (theirs - absmax).abs().sum(), "the nearest is at least as near"


@pytest.mark.parametrize("shape", SHAPES)
def test_offset_and_nested_scales_are_those_of_bitsandbytes_and_codes_but_for_its_grid(shape: tuple[int, int]) -> None:
    check_scales(shape)


def test_mutants_of_the_scales_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = quantize_scales
    for wrong in (
        lambda s: (lambda c, n, o: (c, n, s.median()))(*real(s)),
        lambda s: (lambda c, n, o: (c, n * 1.001, o))(*real(s)),
        lambda s: (lambda c, n, o: (c + 1, n, o))(*real(s)),
    ):
        monkeypatch.setitem(globals(), "quantize_scales", wrong)
        with pytest.raises(AssertionError):
            check_scales((512, 512))


@pytest.mark.parametrize("shape", [s for s in SHAPES if decodes(s, 64)])
def test_given_the_codes_the_decoded_weight_is_that_of_bitsandbytes(shape: tuple[int, int]) -> None:
    functional = bitsandbytes().functional
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        W = weight(*shape, dtype=dtype)
        packed, state = functional.quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=True)
        scale = dequantize_scales(state.absmax, state.state2.absmax, state.offset)
        ours = nf4.dequantize(nf4.unpack(packed, W.numel()), scale).to(dtype).view(shape)
        assert torch.equal(ours, functional.dequantize_4bit(packed, state))


def test_a_part_of_the_codes_decodes_as_in_the_whole() -> None:
    _, absmax = nf4.quantize(weight(700, 64))
    codes, nested, offset = quantize_scales(absmax)
    whole = dequantize_scales(codes, nested, offset)
    assert torch.equal(dequantize_scales(codes[300:600], nested, offset, first=300), whole[300:600])
    assert (whole - absmax).abs().max() < 0.01 * absmax.max()


def test_equal_scales_are_kept_exactly() -> None:
    codes, nested, offset = quantize_scales(torch.full((5,), 0.3))
    assert not nested.any()
    assert torch.equal(dequantize_scales(codes, nested, offset), torch.full((5,), 0.3).mean().expand(5))
    assert scales.BLOCK == 256
