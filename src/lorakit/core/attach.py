"""Attach a method to a model. `Adapted` is a handle, not a module: `adapted.model` is the user's own object."""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.adapter import POOL, UNFROZEN, Adapter
from lorakit.core.base import BaseSpec, expand, hosts
from lorakit.core.calibrate import Calibration, observe
from lorakit.core.context import Cell, Ctx
from lorakit.core.delta import Delta
from lorakit.core.errors import AdapterMismatch, BadParameter, Incompatible, NotExportable, NotMergeable, did_you_mean
from lorakit.core.events import Assembled, Calibrated, Init
from lorakit.core.fingerprint import Fingerprint, fingerprint
from lorakit.core.fresh import branch_at, key_of, not_both, shared_of, sites_for
from lorakit.core.layer import Branch, Slot, adapt, restore, slots_of
from lorakit.core.method import Method
from lorakit.core.params import Param, ParamTable
from lorakit.core.prepare import Prepare, leave_context
from lorakit.core.shared import Patch, Shared, take_shapes
from lorakit.core.site import ROOT, Beyond, Site, Where, strange_stacks
from lorakit.core.unfreeze import Unfrozen, stop_casting, unfreeze


def attach(
    model: nn.Module,
    method: Method,
    *,
    name: str = "default",
    seed: int = 0,
    calibration: Calibration | Iterable[Mapping[str, Any]] | None = None,
) -> "Adapted":
    """Adapt `model` in place and return the handle.

    `calibration`: batches of training data, for methods whose init must see some (others ignore it).
    Everything but the method's own parameters is frozen; they are fp32 (fp64 on an fp64 base) whatever the base's dtype. The same seed
    gives the same initial tensors on any device. Raises NoSuchSite, BadParameter or Incompatible before anything is changed.
    """
    adapted = Adapted(model, seed=seed)
    try:
        return adapted.add(name, method, calibration=calibration)
    except BaseException:
        adapted.detach()
        raise


class Adapted:
    """A model with adapters. One or several may be active; `switch` chooses, `disabled` shows the base."""

    def __init__(self, model: nn.Module, *, seed: int = 0) -> None:
        if any(isinstance(m, Slot) for m in model.modules()):
            raise Incompatible("this model is already adapted; use its handle's .add(name, method), or .detach() it first")
        self.model, self.seed, self.cell = model, seed, Cell()
        self.fingerprint: Fingerprint = fingerprint(model)
        self.methods: dict[str, Method] = {}
        self.unfrozen: dict[str, list[Unfrozen]] = {}
        self._meta: dict[str, dict[str, Any]] = {}
        self.active: tuple[str, ...] = ()
        self.notes: list[str] = []
        self._merged = False
        self._stored: list[Callable[[], None]] = []
        self._installed: list[Patch] = []
        self._required = [(p, p.requires_grad) for p in model.parameters()]
        self._tied = getattr(getattr(model, "config", None), "tie_word_embeddings", None)
        self._hook = model.register_forward_pre_hook(Prepare(self.cell))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward."""
        return self.model(*args, **kwargs)

    # --- adapters by name -------------------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        what: Method | Adapter,
        *,
        seed: int | None = None,
        calibration: Calibration | Iterable[Mapping[str, Any]] | None = None,
    ) -> "Adapted":
        """Add a fresh method or a finished adapter under a name, and make it the active one. `calibration`: as in `attach`."""
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise BadParameter(f"adapter name {name!r}: use letters, digits, '_' and '-'")
        if name in dir(nn.ModuleDict):
            raise BadParameter(f"adapter name {name!r} is an attribute of torch's modules; choose another")
        if name in self.methods:
            raise BadParameter(f"an adapter called {name!r} is already attached; switch({name!r}) or choose another name")
        self._not_while_merged("add an adapter")
        before = self.active
        method = self._assembled(what) if isinstance(what, Method) else what.method()
        if method.base is not None:
            self._store(method.base)
        sites = sites_for(self.model, method, what)
        seed = self.seed if seed is None else seed
        try:
            self.methods[name], self.unfrozen[name] = method, []
            init = self._init(method, sites, calibration) if isinstance(what, Method) else None
            self.unfrozen[name] = self._unfreeze(method)
            if method.combine.full_rank():
                not_both(sites, self.unfrozen[name])
            shared = self._share(name, method, sites, seed)
            slots = self._slots([s.module for s in sites])
            for site in sites:
                slot = slots[site.whole]
                saved = what.of(site) if isinstance(what, Adapter) else {}
                branch = branch_at(site, slot.base, method, init, shared.get(POOL), seed, saved)
                idle = branch.delta.linear and branch.delta.bound() == 0 and branch.bias() is None
                if saved or not idle:  # an init may leave a site without rank: left out
                    slot.branches[key_of(name, site)] = branch
            self._slots([path for branch in self.branches(name) for path in branch.delta.reads])
            self._restore_unused()
            if isinstance(what, Adapter):
                self._fill(name, what)
        except BaseException:
            self._forget(name)
            self.switch(*before)
            raise
        self._note_ties(sites)
        self._note_stacks(method.sites)
        if any(s.kind == "embedding" or s.role == "head" for s in sites):
            self.model.__dict__["resize_token_embeddings"] = _refuse_resize
        return self.switch(name)

    def switch(self, *names: str) -> "Adapted":
        """Make these adapters the active ones; their updates add up, and only they are trainable. No name: the base alone."""
        self._not_while_merged("switch")
        for name in names:
            if name not in self.methods:
                raise BadParameter(f"no adapter is called {name!r}. {did_you_mean(name, self.methods)}")
        if sum(bool(self.unfrozen[n]) for n in names) > 1:
            raise Incompatible(f"{names} each train whole modules; only one of them can be active at a time")
        before, self.active = self.active, tuple(dict.fromkeys(names))
        try:
            self._apply()
        except BaseException:  # a patch that refuses this model, or another patch beside it
            self.active = before
            self._apply()
            raise
        return self

    def scale(self, name: str, w: float) -> "Adapted":
        """Multiply an adapter's change of the output by w (1 is as trained, 0 is the base, negative subtracts)."""
        if name not in self.methods:
            raise BadParameter(f"no adapter is called {name!r}. {did_you_mean(name, self.methods)}")
        if self.unfrozen[name]:
            raise Incompatible(f"{name!r} trains whole modules ({self.unfrozen[name][0].name}, …), which cannot be scaled")
        kept = next((patch.kept for patch in self.methods[name].patches if patch.kept), None)
        if kept is not None:
            raise Incompatible(f"{name!r} cannot be scaled: {kept}")
        self._not_while_merged("scale")
        for branch in self.branches(name):
            branch.expel()  # what the base holds of it would keep its size
            branch.w = float(w)
        return self

    @contextmanager
    def disabled(self) -> Iterator["Adapted"]:
        """The base alone, exactly, inside the block. Trainability is not touched."""
        self._not_while_merged("disable")
        names, self.active = self.active, ()
        self._install()
        try:
            yield self
        finally:
            self.active = names
            self._install()

    def detach(self) -> nn.Module:
        """Remove everything: the same module objects with the same bits as before attach. Returns the model."""
        self.unmerge()
        self._forget(*self.methods)
        while self._stored:
            self._stored.pop()()
        self._hook.remove()
        leave_context(self.model, self.cell)
        self.model.__dict__.pop("resize_token_embeddings", None)
        for p, required in self._required:
            p.requires_grad_(required)
        return self.model

    # --- what there is ----------------------------------------------------------------------------------------------------

    def branches(self, name: str | None = None) -> list[Branch]:
        """The branches of one adapter, or of all active ones, in model order."""
        names = (name,) if name else self.active
        found = [(s, k) for s in self._all_slots() for k in s.branches]
        return [s.branches[k] for s, k in found if k.split("[")[0] in names]  # type: ignore[misc]

    def params(self) -> ParamTable:
        """Every trainable parameter of the active adapters."""
        rows = []
        for branch in self.branches():
            for part in (branch.delta, branch.combine):
                roles = part.roles()
                rows += [Param(f"{branch.site.name}.{a}", part, a, roles[a], branch.site) for a in sorted(part.trains)]
        for child, module in [pair for name in self.active for pair in self.shared(name).items()]:
            roles = module.roles()
            rows += [Param(f"{ROOT}.{child}.{a}", module, a, roles[a], None) for a in sorted(module.trains)]
        for name in self.active:
            rows += [Param(UNFROZEN + u.name, u.module, u.attribute, "full", None) for u in self.unfrozen[name]]
        once = {id(row.tensor): row for row in reversed(rows)}  # tied weights trained together are one parameter
        return ParamTable(tuple(row for row in rows if once[id(row.tensor)] is row))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Every tensor of one adapter as it is in the model now, keyed as in Adapter."""
        found = {f"{b.site.name}.{k}": v for b in self.branches(name) for k, v in _tensors(b).items()}
        found |= {f"{ROOT}.{child}.{k}": v for child, module in self.shared(name).items() for k, v in module.state_dict().items()}
        return found | {UNFROZEN + u.name: u.trained.detach() for u in self.unfrozen[name]}

    def shared(self, name: str) -> dict[str, Shared]:
        """What one adapter's sites share, by child name: the pool, the patches."""
        roots = self.model._modules.get(ROOT)
        return dict(roots[name].items()) if roots is not None and name in roots else {}  # type: ignore[index, operator]

    def fit(self, name: str, values: Mapping[str, Tensor]) -> None:
        """Give an adapter's tensors the shapes of `values`, keyed as in Adapter, where its parts allow it. Raises AdapterMismatch."""
        parts: list[tuple[str, Delta | Shared]] = [(b.site.name, b.delta) for b in self.branches(name)]
        for path, part in [*parts, *((f"{ROOT}.{child}", module) for child, module in self.shared(name).items())]:
            take_shapes(part.fit, {k: values[f"{path}.{k}"].shape for k in part.state_dict() if f"{path}.{k}" in values}, path)

    @torch.no_grad()
    def load_tensors(self, name: str, values: Mapping[str, Tensor]) -> None:
        """Copy values into an adapter's tensors; every one must be there, in its shape."""
        for branch in self.branches(name):
            branch.expel()  # what the base may hold are the old ones
        for key, tensor in self.tensors(name).items():
            tensor.copy_(values[key])

    @contextmanager
    def given(self, *, step: int, seed: int | None = None) -> Iterator["Adapted"]:
        """Fix the context of the forwards inside: masks follow from (seed, step). What it says of the samples stays."""
        key = torch.tensor([self.seed if seed is None else seed, step], dtype=torch.int64)
        with self.cell.hold(replace(self.cell.value, key=key, memo={})):
            yield self

    @property
    def context(self) -> Ctx:
        """The current context."""
        return self.cell.value

    # --- merging ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Move the active adapters' changes into the base weights (computed at least in fp32) and return the model.

        A tied weight is untied first and `config.tie_word_embeddings` set to False, or the other module would change too.
        """
        self._not_while_merged("merge")
        for name in self.active:
            if (why := self.methods[name].beyond) is not None:
                raise NotMergeable(f"{name!r} cannot be merged: {why}; keep the adapter attached")
        for branch in self.branches():
            if branch.bias() is not None and branch.base.bias is None:
                raise NotMergeable(f"{branch.site.name} has no bias to merge the adapter's into; keep the adapter attached")
            branch.expel()
        tied = _tied_modules(self.model)
        for slot in self._all_slots():
            if slot.active:
                base = slot.base
                wide = torch.promote_types(base.dtype, torch.float32)
                changes = [slot.branches[k].weight().to(wide) for k in slot.active]  # type: ignore[operator]
                shifts = [b for k in slot.active if (b := slot.branches[k].bias()) is not None]  # type: ignore[operator]
                if shifts:
                    base.shift_(functools.reduce(torch.add, shifts))
                base.open_()
                base.assign_(base.dense(wide) + functools.reduce(torch.add, changes))
                slot.active = ()
                if id(base.module) in tied:
                    self._set_tied(False)
        weights = {id(m._parameters.get("weight")) for m in self.model.modules()}
        if any(id(u.original) in weights for n in self.active for u in self.unfrozen[n]):  # trained beside a frozen twin
            self._set_tied(False)
        self._merged = True
        return self.model

    def unmerge(self) -> nn.Module:
        """Undo `merge`, bit for bit."""
        if self._merged:
            for slot in self._all_slots():
                slot.base.restore_()
            self._merged = False
            self._set_tied(self._tied)
            self._install()
        return self.model

    def merge_and_unload(self) -> nn.Module:
        """`merge` for good: the plain model with the merged weights and the trained modules; the originals are gone."""
        self.merge()
        for slot in self._all_slots():
            slot.base.forget_()
        for entry in [u for name in self.active for u in self.unfrozen[name]]:
            entry.original = nn.Parameter(entry.trained.detach().to(entry.original.dtype), requires_grad=entry.original.requires_grad)
        self._merged = False
        self._forget(*self.methods)
        self._stored.clear()
        expand(self.model)
        return self.detach()

    # --- saving -----------------------------------------------------------------------------------------------------------

    @property
    def meta(self) -> dict[str, Any]:
        """What the active adapter's file will say about it (chat template, data hash, metrics): JSON values only."""
        return self._meta.setdefault(self._only_active(), {})

    @meta.setter
    def meta(self, values: dict[str, Any]) -> None:
        self._meta[self._only_active()] = values

    def state(self, name: str | None = None) -> Adapter:
        """The adapter at rest: CPU copies of its tensors."""
        name = name or self._only_active()
        method = self.methods[name]
        if method.recipe is None:
            raise NotExportable("this method was changed with .but() and has no recipe; register a function for it (lorakit new-method)")
        quantized = getattr(self.model, "quantized", None)  # lorakit.quantize left word of it
        storage = {} if quantized is None else {"quantized": quantized}
        meta = {"base": self.fingerprint.as_dict(), **storage, **self._meta.get(name, {})}
        copies = {k: v.to("cpu", copy=True).contiguous() for k, v in self.tensors(name).items()}
        return Adapter(method.recipe, tuple(b.site for b in self.branches(name)), copies, meta)

    def save(self, folder: str | Path, name: str | None = None) -> Path:
        """Write the adapter to a folder, atomically. Never touches the network."""
        from lorakit.adapters.io import save_adapter

        return save_adapter(self.state(name), folder)

    # --- inside -----------------------------------------------------------------------------------------------------------

    def _all_slots(self) -> list[Slot]:
        return [m for m in self.model.modules() if isinstance(m, Slot)]

    def _store(self, spec: BaseSpec) -> None:
        for module in hosts(self.model, spec.sites):
            if self.methods and getattr(type(module), "storage", None) is None:
                raise Incompatible(
                    f"{list(self.methods)} were attached to weights as they are, which {type(spec).__name__} would change under them; "
                    "quantize the model before the first adapter: lorakit.quantize(model, spec)"
                )
            self._stored.append(spec.store(module))

    def _assembled(self, method: Method) -> Method:
        """The method with the finished adapters that its init is made of, at their sites."""
        if not isinstance(method.init, Assembled):
            return method
        from lorakit.adapters.io import load_adapter

        adapters = [load_adapter(folder, model=self.model) for folder in method.init.folders]
        for adapter in adapters:
            check_base(adapter, self.fingerprint, force=False)
        names = dict.fromkeys(site.name for adapter in adapters for site in adapter.sites)
        init = method.init.fit([adapter.factors() for adapter in adapters])
        return replace(method, init=init, sites=tuple(f"re:{re.escape(name)}" for name in names))

    def _init(self, method: Method, sites: list[Site], calibration: Calibration | Iterable[Mapping[str, Any]] | None) -> Init | None:
        """The method's init, after it has seen the data it needs."""
        assert not isinstance(method.init, Assembled)  # `add` has assembled it
        if not isinstance(method.init, Calibrated):
            return method.init
        if calibration is None:
            raise BadParameter(
                f"{type(method.init).__name__} starts from data: give attach(model, method, calibration=batches), some "
                f"{method.init.batches} batches with labels; `lorakit train` takes them from the training data"
            )
        self.active = ()
        self._install()
        data = calibration if isinstance(calibration, Calibration) else Calibration(list(calibration))
        return method.init.fit(observe(self.model, sites, method.init.needs, data), sites)

    def _share(self, name: str, method: Method, sites: list[Site], seed: int) -> dict[str, Shared]:
        """Put what the sites share under the model's root."""
        shared = shared_of(self.model, method, sites, self.cell, seed)
        if shared:
            if ROOT not in self.model._modules:
                self.model.add_module(ROOT, nn.ModuleDict())
            self.model._modules[ROOT][name] = nn.ModuleDict(shared)  # type: ignore[index, operator]
        return shared

    def _slots(self, paths: Iterable[str]) -> dict[str, Slot]:
        """The slots of these modules, by the path of the weight's site."""
        out: dict[str, Slot] = {}
        for path in dict.fromkeys(paths):
            module = self.model.get_submodule(path)
            if not slots_of(module):
                adapt(module, path, self.cell)
            out |= {slot.path: slot for slot in slots_of(module)}
        return out

    def _unfreeze(self, method: Method) -> list[Unfrozen]:
        self.active = ()
        self._install()
        return unfreeze(self.model, method.unfreeze) if method.unfreeze else []

    def _fill(self, name: str, adapter: Adapter) -> None:
        """Copy a finished adapter's tensors in, after checking every one of them."""
        self.fit(name, adapter.tensors)
        adapter.check({k: v.shape for k, v in self.tensors(name).items()}, f"method {adapter.recipe.name!r} on this model")
        self.load_tensors(name, adapter.tensors)
        self._meta[name] = {k: v for k, v in adapter.meta.items() if k != "base"}
        here = getattr(self.model, "quantized", None)
        if adapter.meta.get("quantized") != here and self.methods[name].base is None:
            then, now = (f"quantized, {facts}" if facts else "not quantized" for facts in (adapter.meta.get("quantized"), here))
            self.notes.append(f"{name!r} was trained on a base that was {then}; this one is {now}")

    def _forget(self, *names: str) -> None:
        self.active = tuple(n for n in self.active if n not in names)
        self._install()  # patches removed, bases given back
        roots = self.model._modules.get(ROOT)
        for name in [n for n in names if roots is not None and n in roots]:  # type: ignore[operator]
            del roots[name]  # type: ignore[union-attr, operator]
        if roots is not None and not len(roots):  # type: ignore[arg-type]
            del self.model._modules[ROOT]
        for slot in self._all_slots():
            for key in [k for k in slot.branches if k.split("[")[0] in names]:
                del slot.branches[key]
        self._restore_unused()
        forgotten = [entry for name in names for entry in self.unfrozen.pop(name, [])]
        needed = {id(entry.module) for rest in self.unfrozen.values() for entry in rest}
        for entry in forgotten:  # after the slots: an adapted class may sit on a casting one
            entry.install(False)
            if id(entry.module) not in needed:
                stop_casting(entry.module)
        for name in names:
            self.methods.pop(name, None)
            self._meta.pop(name, None)

    def _restore_unused(self) -> None:
        """Swap back the class of every module that no adapter changes or reads."""
        read = {path for n in self.methods for branch in self.branches(n) for path in branch.delta.reads}
        for module in [m for m in self.model.modules() if slots_of(m)]:
            if not any(slot.branches or slot.path in read for slot in slots_of(module)):
                restore(module)

    def _apply(self) -> None:
        self.model.requires_grad_(False)
        self._install()
        for row in self.params():
            row.tensor.requires_grad_(True)

    def _install(self) -> None:
        for entries in self.unfrozen.values():
            for entry in entries:
                entry.install(False)
        for name in self.active:
            for entry in self.unfrozen[name]:
                entry.install(True)
        for slot in self._all_slots():
            slot.active = tuple(k for n in self.active for k in slot.branches if k.split("[")[0] == n)
            for key in set(slot.branches) - set(slot.active):
                slot.branches[key].expel()  # type: ignore[operator]
        while self._installed:
            self._installed.pop().remove()
        children = [module for name in self.active for module in self.shared(name).values()]
        for patch in [module for module in children if isinstance(module, Patch)]:
            patch.install()
            self._installed.append(patch)
        self.cell.draws = any(b.delta.draws for b in self.branches()) or any(module.draws for module in children)
        self.cell.reads = frozenset(path for b in self.branches() for path in b.delta.reads)

    def _only_active(self) -> str:
        if len(self.active) != 1:
            raise BadParameter(f"name the adapter: active are {list(self.active)}, attached are {list(self.methods)}")
        return self.active[0]

    def _not_while_merged(self, action: str) -> None:
        if self._merged:
            raise Incompatible(f"cannot {action} while merged; call unmerge() first")

    def _set_tied(self, value: bool | None) -> None:
        config = getattr(self.model, "config", None)
        if config is not None and value is not None:
            config.tie_word_embeddings = value

    def _note_ties(self, sites: list[Site]) -> None:
        tied = _tied_modules(self.model)
        for site in sites:
            if id(self.model.get_submodule(site.module)) in tied:
                self.notes.append(
                    f"{site.module} shares its weight with another module: the adapter changes this use only, and merging unties the two"
                )

    def _note_stacks(self, where: Where | Beyond) -> None:
        """A preset that means every layer says which weights it could not mean."""
        entries = (where,) if isinstance(where, str) else where if isinstance(where, Sequence) else ()
        strange = strange_stacks(self.model) if {"all-linear", "mlp"} & set(entries) else []
        if strange:
            self.notes.append(f"{len(strange)} weights of experts have a form that cannot be adapted and stay frozen: {strange[0]}, …")


def _refuse_resize(*args: Any, **kwargs: Any) -> None:
    raise Incompatible("an embedding or head of this model is adapted and cannot be resized: detach() first, resize, then attach again")


def _tensors(branch: Branch) -> dict[str, Tensor]:
    return {**branch.delta.state_dict(), **branch.combine.state_dict()}


def _tied_modules(model: nn.Module) -> set[int]:
    """ids of modules whose `weight` is also another module's."""
    owners: dict[int, list[int]] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(id(module))
    return {m for modules in owners.values() if len(modules) > 1 for m in modules}


def load(model: nn.Module, folder: str | Path, *, name: str = "default", force: bool = False) -> Adapted:
    """Attach a saved adapter (lorakit's own or a PEFT folder). Raises AdapterMismatch for a base of other shapes, always, and for one of
    other weights unless `force`."""
    from lorakit.adapters.io import load_adapter

    return attach_adapter(model, load_adapter(folder, model=model), name=name, force=force)


def attach_adapter(model: nn.Module, adapter: Adapter, *, name: str = "default", force: bool = False) -> Adapted:
    """Attach a finished adapter, after checking that the model is the base it was made for. Raises AdapterMismatch."""
    adapted = Adapted(model)
    try:
        check_base(adapter, adapted.fingerprint, force=force)
        return adapted.add(name, adapter)
    except BaseException:
        adapted.detach()
        raise


def check_base(adapter: Adapter, found: Fingerprint, *, force: bool) -> None:
    """Raise AdapterMismatch when the adapter was trained on other weights."""
    recorded = adapter.meta.get("base")
    if recorded and not force:
        made_for = Fingerprint(**recorded)
        if made_for.matches(found) is False:
            raise AdapterMismatch(f"the adapter was trained on {made_for}, but this model is {found}; force=True (--force) loads it anyway")
