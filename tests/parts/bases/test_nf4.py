"""The NF4 format: its levels from their derivation, its bits from bitsandbytes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit import BadParameter
from lorakit.parts.bases import nf4
from tests.parts.bases.oracle import bitsandbytes, weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((128, 256), (33, 65), (7, 13), (1000, 64))
SIZES = (32, 64, 128, 4096)


def test_the_levels_follow_from_their_derivation() -> None:
    assert torch.equal(nf4.normal_float(4), torch.tensor(nf4.LEVELS))
    levels = nf4.normal_float(4)
    assert (levels[0], levels[7], levels[-1]) == (-1, 0, 1)
    assert (levels < 0).sum() == 7
    assert (levels > 0).sum() == 8
    assert levels.equal(levels.sort().values)


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_other_widths_have_as_many_levels_and_an_exact_zero(bits: int) -> None:
    levels = nf4.normal_float(bits)
    assert len(levels) == len(levels.unique()) == 2**bits
    assert levels[2 ** (bits - 1) - 1] == 0
    assert levels.abs().max() == levels[-1] == 1


def test_its_levels_are_those_of_bitsandbytes() -> None:
    theirs = bitsandbytes().functional.get_4bit_type("nf4", device="cpu")
    assert torch.equal(theirs, torch.tensor(nf4.LEVELS))


def tied(dtype: torch.dtype = torch.float32) -> Tensor:
    """Blocks of 64 that hold every midpoint of two levels exactly, and their neighbors."""
    levels = torch.tensor(nf4.LEVELS)
    middle = (levels[:-1] + levels[1:]) / 2
    near = torch.cat([middle, middle.nextafter(torch.tensor(-2.0)), middle.nextafter(torch.tensor(2.0)), torch.ones(1)])
    return torch.cat([near, torch.zeros(64 - len(near))]).expand(8, 64).to(dtype)


def theirs(W: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Packed codes and scales."""
    packed, state = bitsandbytes().functional.quantize_4bit(W, blocksize=blocksize, quant_type="nf4", compress_statistics=False)
    return packed, state.absmax


def check_bits(W: Tensor, blocksize: int, want: tuple[Tensor, Tensor]) -> None:
    codes, scales = nf4.quantize(W, blocksize=blocksize)
    assert torch.equal(nf4.pack(codes), want[0])
    assert torch.equal(scales, want[1])


def check_all(cases: list[tuple[Tensor, tuple[Tensor, Tensor]]]) -> None:
    for W, want in cases:
        check_bits(W, 64, want)


@pytest.mark.parametrize("blocksize", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_and_scales_are_those_of_bitsandbytes(dtype: torch.dtype, shape: tuple[int, int], blocksize: int) -> None:
    W = weight(*shape, dtype=dtype)
    check_bits(W, blocksize, theirs(W, blocksize))


def test_ties_and_blocks_of_zeros_are_those_of_bitsandbytes() -> None:
    zeros = torch.zeros(3, 64)
    for W in (tied(), zeros):
        check_bits(W, 64, theirs(W, 64))
    codes, scales = nf4.quantize(zeros)
    assert (nf4.pack(codes) == 0x77).all()
    assert not scales.any()
    assert not nf4.dequantize(codes, scales).any()


def after(m: pytest.MonkeyPatch, name: str, then: Callable[..., Any]) -> None:
    original = getattr(nf4, name)
    m.setattr(nf4, name, lambda *args, **kwargs: then(original(*args, **kwargs)))


MUTANTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the low half first": lambda m: m.setattr(nf4, "pack", lambda c: (c[0::2] | c[1::2] << 4)[:, None]),
    "scales rounded to bf16": lambda m: after(m, "quantize", lambda out: (out[0], out[1].bfloat16().float())),
    "blocks by rows": lambda m: m.setattr(nf4, "_blocks", lambda flat, size: flat[: flat.numel() // size * size].view(-1, size)),
    "levels rounded to four decimals": lambda m: m.setattr(nf4, "LEVELS", tuple(round(v, 4) for v in nf4.LEVELS)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_of_the_bits_are_seen(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [weight(*shape, dtype=dtype) for dtype in DTYPES for shape in ((34, 65), (128, 256))]
    cases = [(W, theirs(W, 64)) for W in weights]
    check_all(cases)
    MUTANTS[mutant](monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check_all(cases)


def test_a_tie_that_takes_the_upper_level_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real, want = torch.bucketize, theirs(tied(), 64)
    monkeypatch.setattr(torch, "bucketize", lambda *args, **kwargs: real(*args, **kwargs, right=True))
    with pytest.raises(AssertionError):
        check_bits(tied(), 64, want)


@pytest.mark.parametrize("n", [1, 2, 7, 64, 65, 127])
def test_what_is_decoded_is_on_the_grid_and_near(n: int) -> None:
    x = weight(n, std=1.0)
    codes, scales = nf4.quantize(x)
    y = nf4.dequantize(codes, scales)
    assert torch.equal(nf4.unpack(nf4.pack(codes), n), codes)
    gap = torch.tensor(nf4.LEVELS).diff().max() / 2
    assert ((x - y).abs() <= gap * scales.repeat_interleave(64)[:n] * (1 + 1e-6)).all()
    again, same = nf4.quantize(y)
    assert torch.equal(again, codes)
    assert torch.equal(same, scales)


def test_other_levels_can_be_given() -> None:
    x = weight(300, std=1.0)
    levels = nf4.normal_float(2)
    codes, scales = nf4.quantize(x, levels=levels)
    assert codes.max() == 3
    best = (x[:, None] - scales.repeat_interleave(64)[:300, None] * levels).abs().amin(1)
    torch.testing.assert_close((x - nf4.dequantize(codes, scales, levels=levels)).abs(), best)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    x = torch.zeros(100)
    x[70] = bad
    with pytest.raises(BadParameter, match="NaN or infinite"):
        nf4.quantize(x)
