"""Which adapted modules read the same input: a pass over an attached model that no method sees."""

from collections.abc import Iterable

from lorakit.core.layer import Branch, Slot

SHARED = {"q": "attention", "k": "attention", "v": "attention", "gate": "mlp", "up": "mlp"}
"""Roles whose modules read one input where they have one parent. One that is given another computes alone, and the others in vain."""
ACROSS = ("cross", "encdec", "encoder_attn")
"""What the parent's name says where keys and values come from elsewhere than queries."""


def group(slots: Iterable[Slot]) -> None:
    """Tell every slot which others usually read what it reads."""
    found: dict[tuple[str, str], list[Slot]] = {}
    for slot in slots:
        slot.group = ()
        branch = next(iter(slot.branches.values()), None)
        parent = slot.path.rpartition(".")[0]
        if isinstance(branch, Branch) and not any(word in parent.lower() for word in ACROSS) and (family := SHARED.get(branch.site.role)):
            found.setdefault((parent, family), []).append(slot)
    for members in found.values():
        for slot in members:
            slot.group = tuple(members)
