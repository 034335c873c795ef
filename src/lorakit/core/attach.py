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
from lorakit.core.base import BaseSpec, added, expand, hosts
from lorakit.core.calibrate import Calibration, observe
from lorakit.core.combine import Combine
from lorakit.core.context import Cell, Ctx
from lorakit.core.delta import Delta
from lorakit.core.errors import BadParameter, Incompatible, NotExportable, NotMergeable, did_you_mean
from lorakit.core.events import Assembled, Calibrated, Init
from lorakit.core.fingerprint import Fingerprint, check_base, fingerprint
from lorakit.core.fresh import branch_at, not_both, shared_of, sites_for, take_
from lorakit.core.layer import Branch, Slot
from lorakit.core.method import Method
from lorakit.core.params import Param, ParamTable
from lorakit.core.pause import paused
from lorakit.core.places import Places
from lorakit.core.prepare import Prepare, leave_context, own_modules, tied_modules
from lorakit.core.shared import Patch, Shared, take_shapes
from lorakit.core.site import MODULES, ROOT, Beyond, Site, Where, sites_of, strange_stacks, weight_shape
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
    """A model with adapters. One or several may be active; `switch` chooses, `disabled` shows the base.

    Hundreds may be attached: what is done with one visits its own branches, never all modules or the others' branches.
    """

    def __init__(self, model: nn.Module, *, seed: int = 0) -> None:
        if any(isinstance(m, Slot) for m in model.modules()):
            raise Incompatible("this model is already adapted; use its handle's .add(name, method), or .detach() it first")
        self.model, self.seed, self.cell = model, seed, Cell()
        self.fingerprint: Fingerprint = fingerprint(model)
        self._survey()
        self._places = Places(model, self.cell)
        self._in_force: tuple[str, ...] = ()
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
        self._check_name(name)
        if isinstance(what, Adapter):  # it stays its owner's
            what = replace(what, tensors={k: v.clone(memory_format=torch.contiguous_format) for k, v in what.tensors.items()})
        return self._add(name, what, self.seed if seed is None else seed, calibration)

    def load(self, folder: str | Path, name: str = "default", *, force: bool = False) -> "Adapted":
        """Add a saved adapter (lorakit's own or a PEFT folder) under a name, and make it the active one. Raises as `lorakit.load` does.

        lorakit's own files are read straight into the model's tensors, which are independent of them afterwards.
        """
        from lorakit.adapters.io import read_adapter

        self._check_name(name)
        adapter = read_adapter(folder, model=self.model)
        check_base(adapter, self.fingerprint, force=force)
        return self._add(name, adapter, self.seed, None)

    def switch(self, *names: str) -> "Adapted":
        """Make these adapters the active ones; their updates add up, and only they are trainable. No name: the base alone."""
        self._not_while_merged("switch")
        for name in names:
            if name not in self.methods:
                raise BadParameter(f"no adapter is called {name!r}. {did_you_mean(name, self.methods)}")
        if sum(bool(self.unfrozen[n]) for n in names) > 1:
            raise Incompatible(f"{names} each train whole modules; only one of them can be active at a time")
        before = self.active
        try:
            self._activate(*dict.fromkeys(names))
        except BaseException:  # a patch that refuses this model, or another patch beside it
            self._activate(*before)
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
        """The branches of one adapter, or of all active ones one after the other, in model order."""
        return self._places.branches(*((name,) if name else self.active))

    def params(self) -> ParamTable:
        """Every trainable parameter of the active adapters."""
        rows = []
        for path, part, site in self._parts():
            roles = part.roles()
            rows += [Param(f"{path}.{a}", part, a, roles[a], site) for a in sorted(part.trains)]
        for name in self.active:
            rows += [Param(UNFROZEN + u.name, u.module, u.attribute, "full", None) for u in self.unfrozen[name]]
        once = {id(row.tensor): row for row in reversed(rows)}  # tied weights trained together are one parameter
        return ParamTable(tuple(row for row in rows if once[id(row.tensor)] is row))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Every tensor of one adapter as it is in the model now, keyed as in Adapter."""
        found = {k: v for b in self.branches(name) for k, v in _tensors(b).items()}
        found |= {f"{path}.{k}": v for path, module in self._children(name) for k, v in module.state_dict().items()}
        return found | {UNFROZEN + u.name: u.trained.detach() for u in self.unfrozen[name]}

    def shared(self, name: str) -> dict[str, Shared]:
        """What one adapter's sites share, by child name: the pool, the patches."""
        roots = self.model._modules.get(ROOT)
        return dict(roots[name].items()) if roots is not None and name in roots else {}  # type: ignore[index, operator]

    def fit(self, name: str, values: Mapping[str, Tensor]) -> None:
        """Give an adapter's tensors the shapes of `values`, keyed as in Adapter, where its parts allow it. Raises AdapterMismatch."""
        parts: list[tuple[str, Delta | Shared]] = [(b.site.name, b.delta) for b in self.branches(name)]
        for path, part in [*parts, *self._children(name)]:
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
        tied = tied_modules(self.model)
        for slot in self._places.of(*self.active):
            base = slot.base
            wide = torch.promote_types(base.dtype, torch.float32)
            changes = [slot.branches[k].weight().to(wide) for k in slot.active]  # type: ignore[operator]
            shifts = [b for k in slot.active if (b := slot.branches[k].bias()) is not None]  # type: ignore[operator]
            if shifts:
                base.shift_(functools.reduce(torch.add, shifts))
            base.open_()
            base.assign_(added(base, functools.reduce(torch.add, changes)))
            slot.active = ()
            if base.module in tied:
                self._set_tied(False)
        weights = {id(m._parameters.get("weight")) for m in own_modules(self.model)}
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
        seen = self._seen(name)
        return replace(seen, tensors={k: v.to("cpu", copy=True).contiguous() for k, v in seen.tensors.items()})

    def _seen(self, name: str | None) -> Adapter:
        """The adapter as it is now, with the model's own tensors."""
        name = name or self._only_active()
        method = self.methods[name]
        if method.recipe is None:
            raise NotExportable("this method was changed with .but() and has no recipe; register a function for it (lorakit new-method)")
        quantized = getattr(self.model, "quantized", None)  # lorakit.quantize left word of it
        storage = {} if quantized is None else {"quantized": quantized}
        meta = {"base": self.fingerprint.as_dict(), **storage, **self._meta.get(name, {})}
        return Adapter(method.recipe, tuple(b.site for b in self.branches(name)), self.tensors(name), meta)

    def save(self, folder: str | Path, name: str | None = None) -> Path:
        """Write the adapter to a folder, atomically. Never touches the network."""
        from lorakit.adapters.io import save_adapter

        return save_adapter(self._seen(name), folder)

    # --- inside -----------------------------------------------------------------------------------------------------------

    def _all_slots(self) -> list[Slot]:
        return list(self._places.slots.values())

    def _children(self, name: str) -> list[tuple[str, Shared]]:
        """What one adapter's sites share, and the prefix of its tensors' names."""
        return [(f"{ROOT}.{child}", module) for child, module in self.shared(name).items()]

    def _parts(self) -> Iterator[tuple[str, Delta | Combine | Shared, Site | None]]:
        """What may train of the active adapters: the prefix of its tensors' names, the module, its site."""
        for branch in self.branches():
            yield branch.site.name, branch.delta, branch.site
            yield branch.site.name, branch.combine, branch.site
        for name in self.active:
            yield from ((path, module, None) for path, module in self._children(name))

    def _known(self) -> list[Site]:
        """The model's sites. Its modules stay while it is adapted; only the vocabulary may be resized."""
        if any(weight_shape(self.model.get_submodule(s.module)) != (s.d_out, s.d_in) for s in self._vocabulary):
            self._survey()
        return self._sites

    def _survey(self) -> None:
        """Look through the model, once for all adapters."""
        self._sites, self._strange, self._twins = sites_of(self.model), strange_stacks(self.model), tied_modules(self.model)
        self._vocabulary = [s for s in self._sites if s.role in ("embed", "head") and s.kind in MODULES and s.rows is None]

    def _check_name(self, name: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise BadParameter(f"adapter name {name!r}: use letters, digits, '_' and '-'")
        if name in dir(nn.ModuleDict):
            raise BadParameter(f"adapter name {name!r} is an attribute of torch's modules; choose another")
        if name in self.methods:
            raise BadParameter(f"an adapter called {name!r} is already attached; switch({name!r}) or choose another name")
        self._not_while_merged("add an adapter")

    @paused()
    def _add(
        self, name: str, what: Method | Adapter, seed: int, calibration: Calibration | Iterable[Mapping[str, Any]] | None
    ) -> "Adapted":
        """`add`, after its first checks. An adapter's tensors become the model's own where dtype and device are the same."""
        before = self.active
        method = self._assembled(what) if isinstance(what, Method) else what.method()
        if method.base is not None:
            self._store(method.base)
        known = self._known()
        sites = sites_for(known, method, what)
        try:
            self._activate()  # inits, clones and combines see the base alone
            self.methods[name], self.unfrozen[name] = method, []
            init = self._init(method, sites, calibration) if isinstance(what, Method) else None
            if method.unfreeze:
                self.unfrozen[name] = unfreeze(self.model, method.unfreeze)
            if method.combine.full_rank():
                not_both(sites, self.unfrozen[name])
            saved = what.shapes() if isinstance(what, Adapter) else {}
            pool = {k: v.shape for k, v in what.shared(POOL).items()} if isinstance(what, Adapter) else {}
            shared = self._share(name, shared_of(self.model, method, sites, known, self.cell, seed, pool))
            held: dict[str, Tensor] = {}
            for site in sites:
                shapes = saved.get(site.name, {})
                branch = branch_at(site, self._places.slot(site).base, method, init, shared.get(POOL), seed, shapes)
                if isinstance(what, Adapter):  # at once: what the delta was made with is free for the next one
                    held |= take_(_tensors(branch, keep_vars=True), what.tensors)
                idle = not shapes and branch.delta.linear and branch.delta.bound() == 0 and branch.bias() is None
                if not idle:  # an init may leave a site without rank: left out
                    self._places.put(name, site, branch)
            self._places.complete(name)
            if isinstance(what, Adapter):
                self._fill(name, what, held)
        except BaseException:
            self._forget(name)
            self.switch(*before)
            raise
        self._note_ties(sites)
        self._note_stacks(method.sites)
        if any(s.kind == "embedding" or s.role == "head" for s in sites):
            self.model.__dict__["resize_token_embeddings"] = _refuse_resize
        return self.switch(name)

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
        data = calibration if isinstance(calibration, Calibration) else Calibration(list(calibration))
        return method.init.fit(observe(self.model, sites, method.init.needs, data), sites)

    def _share(self, name: str, shared: dict[str, Shared]) -> dict[str, Shared]:
        """Put what the sites share under the model's root."""
        if shared:
            if ROOT not in self.model._modules:
                self.model.add_module(ROOT, nn.ModuleDict())
            self.model._modules[ROOT][name] = nn.ModuleDict(shared)  # type: ignore[index, operator]
        return shared

    def _fill(self, name: str, adapter: Adapter, held: dict[str, Tensor]) -> None:
        """Give what the sites share and the whole modules their tensors too, and check every one of the adapter's. `held`: the sites'."""
        for path, module in self._children(name):
            shapes = {k: adapter.tensors[f"{path}.{k}"].shape for k in module.state_dict() if f"{path}.{k}" in adapter.tensors}
            take_shapes(module.fit, shapes, path)
            held |= take_({f"{path}.{k}": v for k, v in module.state_dict(keep_vars=True).items()}, adapter.tensors)
        held |= take_({UNFROZEN + u.name: u.trained for u in self.unfrozen[name]}, adapter.tensors)
        adapter.check(held, f"method {adapter.recipe.name!r} on this model")
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
        self._places.drop(*names)
        forgotten = [entry for name in names for entry in self.unfrozen.pop(name, [])]
        needed = {id(entry.module) for rest in self.unfrozen.values() for entry in rest}
        for entry in forgotten:  # after the slots: an adapted class may sit on a casting one
            entry.install(False)
            if id(entry.module) not in needed:
                stop_casting(entry.module)
        for name in names:
            self.methods.pop(name, None)
            self._meta.pop(name, None)

    def _activate(self, *names: str) -> None:
        """Show these adapters, and let only them train."""
        self._require(False)
        for p, _ in self._required:
            p.requires_grad_(False)
        self.active = names
        self._install()
        self._require(True)

    def _require(self, trains: bool) -> None:
        """Set whether the active adapters' tensors train."""
        for _, part, _ in self._parts():
            for attribute in part.trains:
                getattr(part, attribute).requires_grad_(trains)
        for entry in [u for name in self.active for u in self.unfrozen[name]]:
            entry.trained.requires_grad_(trains)

    def _install(self) -> None:
        """Show the active adapters, instead of those that the model showed before."""
        before, self._in_force = self._in_force, self.active
        for on, names in ((False, before), (True, self.active)):
            for entry in [u for name in names for u in self.unfrozen[name]]:
                entry.install(on)
        self._places.show(before, self.active)
        for branch in self._places.branches(*(name for name in before if name not in self.active)):
            branch.expel()
        while self._installed:
            self._installed.pop().remove()
        children = [module for name in self.active for module in self.shared(name).values()]
        for patch in [module for module in children if isinstance(module, Patch)]:
            patch.install()
            self._installed.append(patch)
        self.cell.draws = any(b.delta.draws for b in self.branches()) or any(module.draws for module in children)
        self.cell.reads = self._places.reads(*self.active)

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
        for site in sites if self._twins else ():
            if self.model.get_submodule(site.module) in self._twins:
                self.notes.append(
                    f"{site.module} shares its weight with another module: the adapter changes this use only, and merging unties the two"
                )

    def _note_stacks(self, where: Where | Beyond) -> None:
        """A preset that means every layer says which weights it could not mean."""
        entries = (where,) if isinstance(where, str) else where if isinstance(where, Sequence) else ()
        if self._strange and {"all-linear", "mlp"} & set(entries):
            n, first = len(self._strange), self._strange[0]
            self.notes.append(f"{n} weights of experts have a form that cannot be adapted and stay frozen: {first}, …")


def _refuse_resize(*args: Any, **kwargs: Any) -> None:
    raise Incompatible("an embedding or head of this model is adapted and cannot be resized: detach() first, resize, then attach again")


def _tensors(branch: Branch, *, keep_vars: bool = False) -> dict[str, Tensor]:
    parts = (branch.delta, branch.combine)
    return {f"{branch.site.name}.{k}": v for part in parts for k, v in part.state_dict(keep_vars=keep_vars).items()}


def load(model: nn.Module, folder: str | Path, *, name: str = "default", force: bool = False) -> Adapted:
    """Attach a saved adapter (lorakit's own or a PEFT folder). Raises AdapterMismatch for a base of other shapes, always, and for one of
    other weights unless `force`."""
    adapted = Adapted(model)
    try:
        return adapted.load(folder, name, force=force)
    except BaseException:
        adapted.detach()
        raise


def attach_adapter(model: nn.Module, adapter: Adapter, *, name: str = "default", force: bool = False) -> Adapted:
    """Attach a finished adapter, after checking that the model is the base it was made for. Raises AdapterMismatch."""
    adapted = Adapted(model)
    try:
        check_base(adapter, adapted.fingerprint, force=force)
        return adapted.add(name, adapter)
    except BaseException:
        adapted.detach()
        raise
