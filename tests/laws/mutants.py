"""Each law shown able to fail: a change of the code under which its check must not pass. A mutant changes lorakit, never the law."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

from lorakit.adapters.peft_types import adalora as peft_adalora
from lorakit.core import adapter as adapter_module
from lorakit.core import attach as attach_module
from lorakit.core import base as base_module
from lorakit.core import context, layer, places, prepare, random
from lorakit.core import method as method_module
from lorakit.core.attach import Adapted
from lorakit.core.delta import Factors
from lorakit.core.lowrank import LowRank, LowRankSpec
from lorakit.core.unfreeze import Unfrozen
from lorakit.methods.learning import dora, pissa
from lorakit.methods.mixing import l_lora
from lorakit.methods.rank_allocation import adalora, dylora
from lorakit.ops import lora_linear, mask
from lorakit.ops.mask import Mask
from lorakit.parts.inits.random import Kaiming
from lorakit.parts.optimizers.flora import FloraOptimizer
from tests.laws import (
    subject,
    test_l0_detach,
    test_l1_start,
    test_l2_l3_weight,
    test_l4_merge,
    test_l5_files,
    test_l6_l7_l8_trained,
    test_l9_oracle,
    test_l10_bases,
    test_l11_compile,
    test_l12_l13_replay,
    test_l14_checkpointing,
    test_l15_memory,
    test_l16_distributed,
    test_l17_parameters,
    test_l18_l19_l20_isolation,
)


@dataclass(frozen=True)
class Mutant:
    """`check(method)` must raise AssertionError once `change(monkeypatch)` was made."""

    law: str
    what: str
    method: str
    check: Callable[[str], None]
    change: Callable[[pytest.MonkeyPatch], None]
    slow: bool = False


MUTANTS: list[Mutant] = []


def mutant(law: str, what: str, method: str, check: Callable[..., None], *, slow: bool = False) -> Callable[[Any], Any]:
    """Register a change."""

    def add(change: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
        MUTANTS.append(Mutant(law, what, method, check, change, slow))
        return change

    return add


def after(m: pytest.MonkeyPatch, owner: Any, name: str, then: Callable[..., Any]) -> None:
    """Let `owner.name` return `then(result, *arguments)` instead of its result."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def changed(*args: Any, **kwargs: Any) -> Any:
        return then(original(*args, **kwargs), *args, **kwargs)

    m.setattr(owner, name, changed)


def not_loaded(m: pytest.MonkeyPatch, ending: str) -> None:
    """Tensors of this ending stay as a fresh adapter has them."""
    original = attach_module.take_
    m.setattr(
        attach_module, "take_", lambda tensors, values: original(tensors, {k: v for k, v in values.items() if not k.endswith(ending)})
    )


# --- L0 ---------------------------------------------------------------------------------------------------------------------


@mutant("L0", "detach leaves its hook", "lora", test_l0_detach.check_L0)
def _(m: pytest.MonkeyPatch) -> None:
    m.setattr(torch.utils.hooks.RemovableHandle, "remove", lambda self: None)


@mutant("L0", "detach leaves its checkpointing context", "lora", test_l0_detach.check_L0)
def _(m: pytest.MonkeyPatch) -> None:
    m.setattr(attach_module, "leave_context", lambda model, cell: None)


@mutant("L0", "restoring copies the weight instead of keeping the object", "dora", test_l0_detach.check_L0)
def _(m: pytest.MonkeyPatch) -> None:
    m.setattr(
        base_module._Stored,
        "restore_",
        lambda self: setattr(self.module, "weight", nn.Parameter((self.kept if self.kept is not None else self.weight).detach().clone())),
    )


@mutant("L0", "an unfrozen module stays trained", "adalora", test_l0_detach.check_L0)
def _(m: pytest.MonkeyPatch) -> None:
    m.setattr("lorakit.core.unfreeze.Unfrozen.install", lambda self, on: self.module.register_parameter(self.attribute, self.trained))


# --- L1 ---------------------------------------------------------------------------------------------------------------------


@mutant("L1", "B starts random too", "lora", test_l1_start.check_L1)
def _(m: pytest.MonkeyPatch) -> None:
    after(m, Kaiming, "__call__", lambda _, self, delta, *rest: nn.init.normal_(delta.B, std=1e-3))


@mutant("L1", "m starts at a norm computed in another way", "dora", test_l1_start.check_L1)
def _(m: pytest.MonkeyPatch) -> None:
    def build(combine: Any, self: Any, site: Any, base: Any, delta: Any) -> Any:
        combine.m.data.copy_(base.dense().norm(dim=1) * (1 + 1e-6))
        return combine

    after(m, dora.DecomposedSpec, "build", build)


@mutant("L1", "the anchor is not subtracted", "pissa", test_l1_start.check_L1)
def _(m: pytest.MonkeyPatch) -> None:
    m.setattr(LowRank, "_up", lambda self: self.B if self.B0 is None else torch.cat([self.B, 0 * self.B0], dim=1))


@mutant("L1", "the anchor keeps the bf16 cast of A while A keeps fp32", "pissa", test_l1_start.check_L1)
def _(m: pytest.MonkeyPatch) -> None:
    after(m, pissa.Principal, "__call__", lambda _, self, delta, *rest: delta.A0.copy_(delta.A.detach().bfloat16()))


# --- L2, L3 -----------------------------------------------------------------------------------------------------------------


@mutant("L2", "weight() forgets the scale", "lora", test_l2_l3_weight.check_L2)
def _(m: pytest.MonkeyPatch) -> None:
    after(m, LowRank, "weight", lambda W, self: W / self.s)


@mutant("L2", "DoRA scales the bias", "dora", test_l2_l3_weight.check_L2)
def _(m: pytest.MonkeyPatch) -> None:
    m.setattr(
        dora.Decomposed,
        "forward",
        lambda self, x, y, base, delta, ctx: (self.gain(base, delta) - 1) * y + self.gain(base, delta) * delta(x, ctx),
    )


@mutant("L2", "weight() forgets the branch's own scale", "adalora", test_l2_l3_weight.check_L2)
def _(m: pytest.MonkeyPatch) -> None:
    after(m, layer.Branch, "weight", lambda W, self: W / self.w)


@mutant("L3", "factors give the scale of another rule", "rslora", test_l2_l3_weight.check_L3)
def _(m: pytest.MonkeyPatch) -> None:
    after(m, LowRank, "factors", lambda f, self: Factors(f.A, f.B, 16 / self.r))


@mutant("L3", "factors leave the gate out", "adalora", test_l2_l3_weight.check_L3)
def _(m: pytest.MonkeyPatch) -> None:
    m.setattr(LowRank, "factors", lambda self: Factors(self.A, self.B, self.s))


@mutant("L3", "factors leave the anchor out", "pissa", test_l2_l3_weight.check_L3)
def _(m: pytest.MonkeyPatch) -> None:
    m.setattr(LowRank, "factors", lambda self: Factors(self.A, self.B, self.s))


@mutant("L3", "the gain is left out", "dora", test_l2_l3_weight.check_L3)
def _(m: pytest.MonkeyPatch) -> None:
    after(m, layer.Branch, "factors", lambda f, self: f._replace(gain=None))


# --- L4, L5 -----------------------------------------------------------------------------------------------------------------


@mutant("L4", "merging in the base's own precision", "lora", test_l4_merge.check_L4_cycles)
def _(m: pytest.MonkeyPatch) -> None:
    def merge(self: Adapted) -> nn.Module:
        with torch.no_grad():
            for slot in self._all_slots():
                rounded = [slot.branches[k].weight().to(slot.base.dtype) for k in slot.active]  # type: ignore[operator]
                if rounded:
                    slot.base.assign_(functools.reduce(torch.add, rounded, slot.base.dense()))
                    slot.active = ()
        self._merged = True
        return self.model

    m.setattr(Adapted, "merge", merge)


@mutant("L4", "unmerging by subtraction", "lora", test_l4_merge.check_L4_cycles)
def _(m: pytest.MonkeyPatch) -> None:
    def assign_(self: Any, weight: Tensor) -> None:
        stored = (weight.T if self.transposed else weight).to(self.weight.dtype)
        self.kept = stored - self.weight.detach()
        self.weight.data = stored.contiguous()

    def restore_(self: Any) -> None:
        if self.kept is not None:
            self.weight.data, self.kept = self.weight.data - self.kept, None

    m.setattr(base_module._Stored, "assign_", assign_)
    m.setattr(base_module._Stored, "restore_", restore_)


@mutant("L4", "merging in place changes a tied weight's other use", "lora_fa", test_l4_merge.check_L4)
def _(m: pytest.MonkeyPatch) -> None:
    def assign_(self: Any, weight: Tensor) -> None:
        self.kept = self.weight.detach().clone()
        self.weight.data.copy_(weight.T if self.transposed else weight)

    def restore_(self: Any) -> None:
        if self.kept is not None:
            self.weight.data.copy_(self.kept)
            self.kept = None

    m.setattr(base_module._Stored, "assign_", assign_)
    m.setattr(base_module._Stored, "restore_", restore_)


@mutant("L5", "tensors are saved in half precision", "lora", test_l5_files.check_L5)
def _(m: pytest.MonkeyPatch) -> None:
    after(m, Adapted, "_seen", lambda a, *_: dataclasses.replace(a, tensors={k: v.bfloat16().float() for k, v in a.tensors.items()}))


@mutant("L5", "loading forgets the magnitude", "dora", test_l5_files.check_L5)
def _(m: pytest.MonkeyPatch) -> None:
    not_loaded(m, ".m")


@mutant("L5", "loading draws the frozen factor again", "lora_fa", test_l5_files.check_L5)
def _(m: pytest.MonkeyPatch) -> None:
    not_loaded(m, ".A")


@mutant("L5", "the export confuses the triplets' gates", "adalora", test_l5_files.check_L5_peft)
def _(m: pytest.MonkeyPatch) -> None:
    after(m, peft_adalora, "_triplets", lambda pair, *_: dataclasses.replace(pair, E=pair.E.flip(0)))


# --- L6, L7, L8 -------------------------------------------------------------------------------------------------------------


def _train_A_too(m: pytest.MonkeyPatch) -> None:
    after(m, LowRankSpec, "build", lambda delta, *_, **__: _set(delta, "trains", frozenset({"A", "B"})))


def _set(owner: Any, name: str, value: Any) -> Any:
    setattr(owner, name, value)
    return owner


mutant("L6", "the frozen factor is trained", "lora_fa", test_l6_l7_l8_trained.check_L6)(_train_A_too)


@mutant("L6", "the magnitude is not counted", "dora", test_l6_l7_l8_trained.check_L6)
def _(m: pytest.MonkeyPatch) -> None:
    m.setattr(dora.DecomposedSpec, "count", lambda self, site: 0)


@mutant("L7", "the anchor is A itself and learns", "pissa", test_l6_l7_l8_trained.check_L7)
def _(m: pytest.MonkeyPatch) -> None:
    after(m, pissa.Principal, "__call__", lambda _, self, delta, *rest: _set(delta, "A0", delta.A.data))


@mutant("L7", "A gets no gradient", "lora", test_l6_l7_l8_trained.check_L7)
def _(m: pytest.MonkeyPatch) -> None:
    m.setattr(LowRank, "_down", lambda self: self.A.detach())


@mutant("L7", "the base learns", "loraplus", test_l6_l7_l8_trained.check_L7)
def _(m: pytest.MonkeyPatch) -> None:
    after(m, Adapted, "given", lambda held, self, **_: (self.model.get_input_embeddings().weight.data.mul_(1.001), held)[1])


@mutant("L7", "at an embedding nothing but zeros reach B", "lora_fa", test_l6_l7_l8_trained.check_L7)
def _(m: pytest.MonkeyPatch) -> None:
    original = Kaiming.__call__
    m.setattr(Kaiming, "__call__", lambda self, *rest: original(Kaiming(), *rest))


@mutant("L7", "a whole weight is left out of the step", "flora_gc", test_l6_l7_l8_trained.check_L7)
def _(m: pytest.MonkeyPatch) -> None:
    update = FloraOptimizer._update
    m.setattr(FloraOptimizer, "_update", lambda self, p, *rest: None if p.ndim == 1 else update(self, p, *rest))


@mutant("L8", "an anchored delta claims rank r", "pissa", test_l6_l7_l8_trained.check_L8)
def _(m: pytest.MonkeyPatch) -> None:
    m.setattr(LowRank, "bound", lambda self: self.r)


@mutant("L8", "the update has a diagonal besides", "lora", test_l6_l7_l8_trained.check_L8)
def _(m: pytest.MonkeyPatch) -> None:
    after(m, LowRank, "weight", lambda W, self: W + 1e-3 * torch.eye(*W.shape, dtype=W.dtype))


# --- L9, L10, L11 -----------------------------------------------------------------------------------------------------------


@mutant("L9", "the forward forgets the scale", "lora", test_l9_oracle.check_L9)
def _(m: pytest.MonkeyPatch) -> None:
    m.setattr(lora_linear, "_scale", lambda layer: 1.0)


@mutant("L9", "a weight trained whole is not in its place", "flora_gc", test_l9_oracle.check_L9)
def _(m: pytest.MonkeyPatch) -> None:
    m.setattr(Unfrozen, "install", lambda self, on: None)


@mutant("L9", "the output is right and its gradient doubled", "init_ab", test_l9_oracle.check_L9)
def _(m: pytest.MonkeyPatch) -> None:
    after(m, lora_linear, "_dA", lambda found, *_: [None if dA is None else 2 * dA for dA in found])


@mutant("L9", "the norm is a constant forward only", "dora", test_l9_oracle.check_L9)
def _(m: pytest.MonkeyPatch) -> None:
    original = dora.Decomposed.forward

    def forward(self: Any, *args: Any) -> Tensor:
        self.detach_norm = False
        try:
            return original(self, *args)
        finally:
            self.detach_norm = True

    m.setattr(dora.Decomposed, "forward", forward)


@mutant("L10", "a part sees the first rows' bias", "dora", functools.partial(test_l10_bases.check_L10, label="conv1d rows"))
def _(m: pytest.MonkeyPatch) -> None:
    m.setattr(layer.RowsOf, "bias", property(lambda self: self.base.bias[: len(self.index)]))


@mutant("L10", "a part's update lands on other rows", "lora", functools.partial(test_l10_bases.check_L10, label="interleaved rows"))
def _(m: pytest.MonkeyPatch) -> None:
    after(m, layer.Branch, "forward", lambda change, self, *_: change if self.index is None else change.roll(1, -1))


@mutant("L10", "trainables take the base's precision", "lora", functools.partial(test_l10_bases.check_L10, label="linear bf16"))
def _(m: pytest.MonkeyPatch) -> None:
    build = LowRankSpec.build
    m.setattr(
        LowRankSpec, "build", lambda self, site, *, pool, dtype, device: build(self, site, pool=pool, dtype=torch.bfloat16, device=device)
    )


@mutant("L11", "masks from a generator", "lora", test_l11_compile.check_L11)
def _(m: pytest.MonkeyPatch) -> None:
    def keep(self: Mask, x: Tensor) -> Tensor:
        seed, step = self.key.tolist()
        return torch.rand(x.shape, generator=torch.Generator().manual_seed(mask.mixed(seed, step, int(self.site)))) >= self.p

    m.setattr(Mask, "keep", keep)


@mutant("L11", "a counter in Python", "lora", test_l11_compile.check_L11)
def _(m: pytest.MonkeyPatch) -> None:
    def drop(self: LowRank, x: Tensor, ctx: Any) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return random.dropout(x, ctx.key, self.stream + self.calls, self.p)

    m.setattr(LowRank, "drop", drop)


@mutant("L11", "masks that do not follow the step", "lora", test_l11_compile.check_L11)
def _(m: pytest.MonkeyPatch) -> None:
    original = Mask.keep
    m.setattr(Mask, "keep", lambda self, x: original(self._replace(key=torch.zeros_like(self.key)), x))


# --- L12, L13, L14 ----------------------------------------------------------------------------------------------------------


@mutant("L12", "the start is drawn from the global generator", "lora", test_l12_l13_replay.check_L12)
def _(m: pytest.MonkeyPatch) -> None:
    m.setattr(random, "generator", lambda seed, name: torch.default_generator)


@mutant("L12", "all sites draw the same numbers", "init_ab", test_l12_l13_replay.check_L12)
def _(m: pytest.MonkeyPatch) -> None:
    original = random.generator
    m.setattr(random, "generator", lambda seed, name: original(seed, ""))


@mutant("L12", "the start depends on how many sites came before", "adalora", test_l12_l13_replay.check_L12)
def _(m: pytest.MonkeyPatch) -> None:
    one: dict[int, torch.Generator] = {}
    after(m, attach_module, "attach", lambda adapted, *_, **__: (one.clear(), adapted)[1])
    m.setattr(subject, "attach", attach_module.attach)
    original = random.generator
    m.setattr(random, "generator", lambda seed, name: one.setdefault(seed, original(seed, "")))


@mutant("L12", "the start that tasks share ignores its seed", "l_lora", test_l12_l13_replay.check_L12)
def _(m: pytest.MonkeyPatch) -> None:
    def draw(self: Any, delta: Any, base: Any, site: Any, rng: torch.Generator) -> None:
        self.start(delta, base, site, random.generator(0, site.name))

    m.setattr(l_lora.Pinned, "__call__", draw)


@mutant("L12", "torch's own dropout", "lora", test_l12_l13_replay.check_L12)
def _(m: pytest.MonkeyPatch) -> None:
    m.setattr(Mask, "keep", lambda self, x: torch.rand(x.shape) >= self.p)


@mutant("L12", "masks ignore the step", "lora", test_l12_l13_replay.check_L12_masks)
def _(m: pytest.MonkeyPatch) -> None:
    original = mask.mixed
    m.setattr(mask, "mixed", lambda seed, step, site: original(seed, 0, site))


@mutant("L13", "the budget forgets its scores", "adalora", test_l12_l13_replay.check_L13)
def _(m: pytest.MonkeyPatch) -> None:
    m.setattr(adalora.Budget, "load_state_dict", lambda self, state: None)


@mutant("L13", "the optimizer forgets its moments", "flora_gc", test_l12_l13_replay.check_L13)
def _(m: pytest.MonkeyPatch) -> None:
    m.setattr(FloraOptimizer, "load_state_dict", lambda self, state: None)


@mutant("L13", "b counts the steps of this process", "dylora", test_l12_l13_replay.check_L13)
def _(m: pytest.MonkeyPatch) -> None:
    calls: dict[int, int] = {}

    def rank(self: Any, seed: int, step: int) -> int:
        calls[id(self)] = calls.get(id(self), -1) + 1
        return 1 + calls[id(self)] // 2 % 4  # asked twice a step

    m.setattr(dylora.DrawSpec, "rank", rank)


@mutant("L13", "the norm is computed at the first forward only", "dora", test_l12_l13_replay.check_L13)
def _(m: pytest.MonkeyPatch) -> None:
    original = dora.Decomposed.norm

    def norm(self: Any, base: Any, delta: Any) -> Tensor:
        if "built" not in self.__dict__:  # m's start
            self.__dict__["built"] = True
            return original(self, base, delta)
        return self.__dict__.setdefault("stale", original(self, base, delta).detach())

    m.setattr(dora.Decomposed, "norm", norm)


@mutant("L13", "masks count the forwards of this process", "lora", test_l12_l13_replay.check_L13)
def _(m: pytest.MonkeyPatch) -> None:
    original, calls = Mask.keep, [0]

    def keep(self: Mask, x: Tensor) -> Tensor:
        calls[0] += 1
        return original(self._replace(key=torch.tensor([0, calls[0]])), x)

    m.setattr(Mask, "keep", keep)


@mutant("L14", "recomputation sees the latest context", "lora", test_l14_checkpointing.check_L14)
def _(m: pytest.MonkeyPatch) -> None:
    m.setattr(context.Cell, "checkpoint_contexts", lambda self: (context._Nothing(), context._Nothing()))


@mutant("L14", "the context is not carried at all", "dora", test_l14_checkpointing.check_L14)
def _(m: pytest.MonkeyPatch) -> None:
    m.setattr(prepare, "_carry_context", lambda model, cell: None)


@mutant("L14", "reentrant checkpointing is let through", "lora", test_l14_checkpointing.check_L14_reentrant)
def _(m: pytest.MonkeyPatch) -> None:
    m.setattr(prepare, "_carry_context", lambda model, cell: None)


@mutant("L14", "the first attach's context is kept", "lora", test_l14_checkpointing.check_L14_again)
def _(m: pytest.MonkeyPatch) -> None:
    m.setattr(attach_module, "leave_context", lambda model, cell: None)


# --- L15, L16, L17 ----------------------------------------------------------------------------------------------------------


@mutant("L15", "the frozen factor asks for a gradient", "lora_fa", test_l15_memory.check_L15)
def _(m: pytest.MonkeyPatch) -> None:
    after(m, Adapted, "_activate", lambda _, self, *names: [b.delta.A.requires_grad_(True) for b in self.branches()])


@mutant("L15", "the output is kept", "lora", test_l15_memory.check_L15)
def _(m: pytest.MonkeyPatch) -> None:
    after(m, layer, "lora_linear", lambda ys, x, layers: tuple(0.5 * y + 0.5 * y.square().sqrt() for y in ys))


@mutant("L16", "gradients are not summed over processes", "lora", lambda name: None, slow=True)
def _(m: pytest.MonkeyPatch) -> None:
    raise NotImplementedError  # see test_mutants: the processes are started with forget=True


def forgetful_processes() -> None:
    """L16 on two processes that do not reduce their gradients."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(test_l16_distributed.work, (folder, ["lora"], True), nprocs=test_l16_distributed.RANKS)
        test_l16_distributed.check_L16("lora", Path(folder))


@mutant("L17", "a parameter nobody explains", "lora", test_l17_parameters.check_L17)
def _(m: pytest.MonkeyPatch) -> None:
    m.delitem(method_module.COMMON, "alpha_pattern")


@mutant("L17", "a parameter called as a key of the run", "lora", test_l17_parameters.check_L17)
def _(m: pytest.MonkeyPatch) -> None:
    m.setattr(test_l17_parameters, "FIELDS", (*test_l17_parameters.FIELDS, "dropout"))


# --- L18, L19, L20 ----------------------------------------------------------------------------------------------------------


@mutant("L18", "one delta for all models", "lora", test_l18_l19_l20_isolation.check_L18)
def _(m: pytest.MonkeyPatch) -> None:
    m.setattr(LowRankSpec, "build", functools.cache(LowRankSpec.build))


@mutant("L18", "one budget for all runs", "adalora", test_l18_l19_l20_isolation.check_L18)
def _(m: pytest.MonkeyPatch) -> None:
    first: list[Any] = []
    after(m, adalora.BudgetSpec, "build", lambda budget, *_: (first.append(budget), first[0])[1])


@mutant("L18", "one context for all models", "pissa", test_l18_l19_l20_isolation.check_L18)
def _(m: pytest.MonkeyPatch) -> None:
    one = context.Cell()
    m.setattr(attach_module, "Cell", lambda: one)


@mutant("L19", "a mean over the batch", "lora", test_l18_l19_l20_isolation.check_L19)
def _(m: pytest.MonkeyPatch) -> None:
    after(m, layer, "lora_linear", lambda ys, *_: tuple(y + 0 * y.mean(0, keepdim=True) for y in ys))


@mutant("L19", "tensors are loaded unseen", "dora", test_l18_l19_l20_isolation.check_L19)
def _(m: pytest.MonkeyPatch) -> None:
    m.setattr(adapter_module.Adapter, "check", lambda self, expected, what: None)


@mutant("L20", "a weight trained whole is not in its place", "flora_gc", test_l18_l19_l20_isolation.check_L20)
def _(m: pytest.MonkeyPatch) -> None:
    m.setattr(Unfrozen, "install", lambda self, on: None)


@mutant("L20", "the start rewrites the base", "pissa", test_l18_l19_l20_isolation.check_L20)
def _(m: pytest.MonkeyPatch) -> None:
    after(
        m,
        pissa.Principal,
        "__call__",
        lambda _, self, delta, base, *rest: base.assign_(base.dense() - 0.5 * delta.s * delta.B.detach() @ delta.A.detach()),
    )


@mutant("L20", "the weight lives in the slot", "lora", test_l18_l19_l20_isolation.check_L20)
def _(m: pytest.MonkeyPatch) -> None:
    original = places.adapt

    def adapt(module: nn.Module, path: str, cell: Any) -> None:
        original(module, path, cell)
        module.lora.original = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
        module.weight.data.zero_()

    m.setattr(places, "adapt", adapt)
