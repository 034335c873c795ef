"""Which laws there are, and to which methods each applies. A law's checks are the functions `check_L<id>*` of its module."""

from collections.abc import Callable
from dataclasses import dataclass

from lorakit import describe, list_methods
from lorakit.core.method import Entry
from tests.laws.subject import small


def every(entry: Entry) -> bool:
    return True


def linear(entry: Entry) -> bool:
    """A method whose deltas are changes of weights."""
    method = small(entry.name)
    return method.delta is not None and method.delta.linear


def no_modules(entry: Entry) -> bool:
    """A method whose deltas, where it has any, are changes of weights."""
    method = small(entry.name)
    return method.delta is None or method.delta.linear


@dataclass(frozen=True)
class Law:
    """`applies` says for which entries of the registry it is tested."""

    title: str
    applies: Callable[[Entry], bool] = every


LAWS = {
    "L0": Law("detach after attach is the identity, same objects and bits"),
    "L1": Law("output unchanged at init, unless the recipe declares otherwise"),
    "L2": Law("the delta's part of the output equals x·weight()ᵀ", linear),
    "L3": Law("weight() equals s·B·A of factors()", linear),
    "L4": Law("merge then unmerge is bit-exact; merged equals unmerged"),
    "L5": Law("save and load; what exports to PEFT loads in the real PEFT with equal logits"),
    "L6": Law("trainable count equals the recipe's closed form"),
    "L7": Law("every tensor declared trainable moves, every frozen one keeps its bits"),
    "L8": Law("rank(ΔW) is at most the declared bound", linear),
    "L9": Law("outputs and gradients equal an oracle that forms W + weight()", no_modules),
    "L10": Law("works over every base"),
    "L11": Law("compiled equals eager, no graph break, no recompile"),
    "L12": Law("same seed, same bits"),
    "L13": Law("4 steps = 2 + checkpoint + 2"),
    "L14": Law("equal under activation checkpointing"),
    "L15": Law("saved-activation bytes at most as declared"),
    "L16": Law("two processes under FSDP2 equal one"),
    "L17": Law("every parameter is a documented flag"),
    "L18": Law("two attaches of one Method share nothing"),
    "L19": Law("NaN stays in its row; non-finite adapters are refused"),
    "L20": Law("plain from_pretrained of a saved adapted model's folder is the base"),
}


def under(law: str) -> list[str]:
    """The methods that a law is tested on."""
    return [name for name in list_methods() if LAWS[law].applies(describe(name))]


def product() -> set[tuple[str, str]]:
    """Every (law, method) that must be tested."""
    return {(law, name) for law in LAWS for name in under(law)}
