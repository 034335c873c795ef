"""Mixing finished adapters into one: pure functions on adapters at rest, all of them defined on ΔW."""

from lorakit.adapters.mix.mix import mix, mix_into
from lorakit.adapters.mix.mixers import MIXERS

__all__ = ["MIXERS", "mix", "mix_into"]
