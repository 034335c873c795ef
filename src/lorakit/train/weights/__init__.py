"""Weights of a mixture that are searched or learned, on a few examples of a task."""

from lorakit.train.weights.compose import learned_composition
from lorakit.train.weights.descent import first_order
from lorakit.train.weights.distill import distill_prompt
from lorakit.train.weights.finder import FINDERS
from lorakit.train.weights.found import Found
from lorakit.train.weights.grid import control_pe
from lorakit.train.weights.objective import Objective, few_shots
from lorakit.train.weights.search import lorahub
from lorakit.train.weights.start import Start, init_from_mixture

__all__ = [
    "FINDERS",
    "Found",
    "Objective",
    "Start",
    "control_pe",
    "distill_prompt",
    "few_shots",
    "first_order",
    "init_from_mixture",
    "learned_composition",
    "lorahub",
]
