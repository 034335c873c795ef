"""Constructed tasks: data whose truth is known, so that a method's result can be held against the best possible one.

planted_teacher        X whitened, Y = X (W + ΔW*)ᵀ + noise with rank ΔW* = r*. With whitened inputs the loss of a student ΔW is
                       ‖ΔW − ΔŴ‖²_F + const, so the best rank-r student is the truncated SVD of ΔŴ (Eckart-Young) and its loss is
                       the floor Σ_{i>r} σᵢ² + const.
contradictory_domains  two domains that answer every prompt oppositely: what one adapter cannot hold and two can.
key_value_facts        random facts of known entropy: how many bits an adapter stores (after arXiv:2404.05405).
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.core.errors import DataError
from lorakit.core.random import generator
from lorakit.data.row import Row

# -- planted teacher ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlantedTeacher:
    """inputs [n, d_in], targets [n, d_out], weight W and delta ΔW* [d_out, d_in], floors [min(d_in, d_out) + 1] by rank."""

    inputs: Tensor
    targets: Tensor
    weight: Tensor
    delta: Tensor
    floors: Tensor

    def loss(self, delta: Tensor) -> Tensor:
        """The squared error of the student W + delta, summed over outputs and averaged over rows: what `floors` bounds."""
        residual = self.targets - self.inputs @ (self.weight + delta).T  # [n, d_out]
        loss: Tensor = residual.square().sum(1).mean()
        return loss


def planted_teacher(
    d_in: int, d_out: int, rank: int, n: int, *, seed: int, noise: float = 0.0, dtype: torch.dtype = torch.float64
) -> PlantedTeacher:
    """A linear teacher whose update has exactly `rank`; XᵀX = n·I holds exactly, so it needs n >= d_in.

    `floors[r]` is the least loss that any student of rank at most r reaches on these very rows; without noise it is 0 from `rank` on.
    Singular values of ΔW* fall linearly from 1 to 1/rank.
    """
    _check_sizes(d_in, d_out, rank, n)
    draw = generator(seed, "planted_teacher")
    inputs = _orthonormal(n, d_in, draw) * math.sqrt(n)  # [n, d_in]
    weight = torch.randn(d_out, d_in, generator=draw, dtype=torch.float64) / math.sqrt(d_in)
    sigma = torch.arange(rank, 0, -1, dtype=torch.float64) / rank
    delta = (_orthonormal(d_out, rank, draw) * sigma) @ _orthonormal(d_in, rank, draw).T  # [d_out, d_in]
    change = inputs @ delta.T + noise * torch.randn(n, d_out, generator=draw, dtype=torch.float64)  # [n, d_out]
    tensors = (inputs, inputs @ weight.T + change, weight, delta, _floors(inputs, change))
    return PlantedTeacher(*(t.to(dtype) for t in tensors))


def _floors(inputs: Tensor, change: Tensor) -> Tensor:
    best = change.T @ inputs / len(inputs)  # [d_out, d_in], least squares, as the inputs are whitened
    energy = torch.linalg.svdvals(best).square()
    tails = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
    unreachable = (change - inputs @ best.T).square().sum(1).mean()
    return tails + unreachable


def _orthonormal(rows: int, columns: int, draw: torch.Generator) -> Tensor:
    q: Tensor = torch.linalg.qr(torch.randn(rows, columns, generator=draw, dtype=torch.float64)).Q
    return q


def _check_sizes(d_in: int, d_out: int, rank: int, n: int) -> None:
    if not 1 <= rank <= min(d_in, d_out):
        raise DataError(f"a planted update of {d_out}x{d_in} cannot have rank {rank}; choose 1 to {min(d_in, d_out)}")
    if n < d_in:
        raise DataError(f"{n} rows of {d_in} features cannot be whitened; choose n >= {d_in}")


# -- contradictory domains ----------------------------------------------------------------------------------------------------

_SUBJECTS = ("lamp", "river", "stone", "garden", "window", "engine", "letter", "market", "bridge", "violin", "forest", "ladder")
_PROPERTIES = ("heavy", "green", "quiet", "broken", "expensive", "ancient", "round", "warm", "hidden", "famous", "narrow", "empty")


def contradictory_domains(n: int = 64, *, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Two lists of n {"prompt", "completion"} rows: the same prompts in the same order, and opposite yes/no answers."""
    most = len(_SUBJECTS) * len(_PROPERTIES)
    if not 1 <= n <= most:
        raise DataError(f"contradictory_domains has {most} distinct prompts; {n} were asked for")
    draw = random.Random(seed)
    pairs = draw.sample([(s, p) for s in _SUBJECTS for p in _PROPERTIES], n)
    answers = [draw.random() < 0.5 for _ in pairs]
    return _answered(pairs, answers), _answered(pairs, [not answer for answer in answers])


def _answered(pairs: Sequence[tuple[str, str]], answers: Sequence[bool]) -> list[Row]:
    return [{"prompt": f"Is the {s} {p}?", "completion": " yes" if yes else " no"} for (s, p), yes in zip(pairs, answers, strict=True)]


# -- key-value facts ----------------------------------------------------------------------------------------------------------

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def key_value_facts(n: int, key_len: int, value_len: int, *, seed: int) -> list[Row]:
    """n facts {"prompt": "<key>=", "completion": "<value>"}: distinct random keys, independent random values."""
    if n > len(ALPHABET) ** key_len:
        raise DataError(f"{n} distinct keys do not fit in {key_len} letters; choose a longer key_len")
    if min(n, key_len, value_len) < 1:
        raise DataError(f"n={n}, key_len={key_len}, value_len={value_len}: all must be at least 1")
    draw = random.Random(seed)
    keys: dict[str, None] = {}
    while len(keys) < n:
        keys[_word(draw, key_len)] = None
    return [{"prompt": f"{key}=", "completion": _word(draw, value_len)} for key in keys]


def _word(draw: random.Random, length: int) -> str:
    return "".join(draw.choices(ALPHABET, k=length))


def capacity_bits(rows: Sequence[Row], correct: Sequence[bool]) -> float:
    """Bits stored: the entropy of the values that were recalled exactly. A lower bound, since a near miss counts nothing."""
    if len(rows) != len(correct):
        raise DataError(f"{len(rows)} facts but {len(correct)} verdicts; give one verdict per fact")
    letters = sum(len(row["completion"]) for row, right in zip(rows, correct, strict=True) if right)
    return letters * math.log2(len(ALPHABET))


def bits_per_parameter(rows: Sequence[Row], correct: Sequence[bool], parameters: int) -> float:
    """`capacity_bits` divided by the number of trainable parameters."""
    return capacity_bits(rows, correct) / parameters
