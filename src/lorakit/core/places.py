"""Where the adapters of a model are: its slots by path, each adapter's branches. What is done with one adapter never visits the others'.

The modules stay the truth; this only says where to look.
"""

from collections.abc import Iterable

from torch import nn

from lorakit.core.context import Cell
from lorakit.core.fresh import key_of
from lorakit.core.group import Hung, group
from lorakit.core.layer import Branch, Slot, adapt, restore, slots_of
from lorakit.core.site import Site


class Places:
    """`slots`: every slot of the model, by the path of its weight's site."""

    def __init__(self, model: nn.Module, cell: Cell) -> None:
        self.model, self.cell = model, cell
        self.slots: dict[str, Slot] = {}
        self._of: dict[str, list[tuple[Slot, str]]] = {}
        self._reads: dict[str, frozenset[str]] = {}
        self._hung: list[Hung] = []

    def slot(self, site: Site) -> Slot:
        """The slot of a site, whose module is adapted if need be."""
        if site.whole not in self.slots:
            self._adapt(site.module)
        return self.slots[site.whole]

    def put(self, name: str, site: Site, branch: Branch) -> None:
        """Hang an adapter's branch in its slot. Sites come in model order."""
        slot, key = self.slot(site), key_of(name, site)
        slot.branches[key] = branch
        self._of.setdefault(name, []).append((slot, key))

    def complete(self, name: str) -> None:
        """After an adapter's last branch: slots where its deltas read, none where nothing is, and what the new ones are grouped with."""
        self._reads[name] = frozenset(path for branch in self.branches(name) for path in branch.delta.reads)
        for path in self._reads[name]:
            self._adapt(path)
        self._restore_unused()
        if any(len(slot.branches) == 1 for slot in self.of(name)):  # with an earlier adapter it was grouped already
            self._group()

    def branches(self, *names: str) -> list[Branch]:
        """The branches of these adapters, one adapter after the other, each in model order."""
        return [slot.branches[key] for slot, key in self._at(names)]  # type: ignore[misc]

    def of(self, *names: str) -> list[Slot]:
        """The slots where these adapters have branches."""
        return list(dict.fromkeys(slot for slot, _ in self._at(names)))

    def reads(self, *names: str) -> frozenset[str]:
        """Paths of the modules whose input these adapters' deltas want."""
        return frozenset().union(*(self._reads.get(name, ()) for name in names))

    def show(self, before: Iterable[str], now: Iterable[str]) -> None:
        """Make these adapters the active ones of their slots, instead of those before."""
        for slot in self.of(*before):
            slot.active = ()
        for slot, key in self._at(now):
            slot.active += (key,)

    def drop(self, *names: str) -> None:
        """Remove these adapters' branches, and the slots that nobody needs any more."""
        for slot, key in self._at(names):
            del slot.branches[key]
        for name in names:
            self._of.pop(name, None)
            self._reads.pop(name, None)
        self._restore_unused()

    def _at(self, names: Iterable[str]) -> list[tuple[Slot, str]]:
        return [place for name in names for place in self._of.get(name, ())]

    def _adapt(self, path: str) -> None:
        module = self.model.get_submodule(path)
        if not slots_of(module):
            adapt(module, path, self.cell)
        self.slots |= {slot.path: slot for slot in slots_of(module)}

    def _restore_unused(self) -> None:
        """Swap back the class of every module that no adapter changes or reads."""
        unused = [slot for slot in self.slots.values() if not slot.branches]
        read = self.reads(*self._reads) if unused else frozenset()
        for module in dict.fromkeys(slot.base.module for slot in unused):
            mates = slots_of(module)
            if not any(slot.branches or slot.path in read for slot in mates):
                restore(module)
                for slot in mates:
                    del self.slots[slot.path]
        if unused:
            self._group()

    def _group(self) -> None:
        while self._hung:
            self._hung.pop().remove()
        self._hung = group(self.model, self.slots.values())
