"""Derivative-free LoRA: low-rank updates searched layer by layer, without a gradient.

    A = reshape(R_A z_A), B = reshape(R_B z_B)         z_l = (z_A, z_B, … of the layer's sites) ∈ R^d, R fixed random

Each layer has a search of its own (`algorithm`: CMA-ES or fireworks) in `d` dimensions, mean 0, step size `sigma`. A step takes the next
layer, asks for `population` candidates z_l, computes the training loss of each on the step's batch with all other layers at their best,
tells, and sets the layer to its best so far, z = 0 included (`keep="best"`), or to where the search stands (`keep="mean"`, for batches
that differ from step to step: then losses of different steps do not compare). So a run of n steps costs n · population forwards, one more
for each layer, and no backward; memory is inference's.
R ~ N(0, std²), std = `spread` · h / (√d σ), h the standard deviation of the site's input after five rounds of clipping at 3 std. Both A and
B are linear in z, so ΔW is quadratic; z = 0 is the base. The official code leaves most B projections at another init; here all are alike.
The adapter is plain LoRA: A and B, r (d_in + d_out) a site. The optimizer, its schedule and its rate are not used.
Defaults: q and k, r 4, alpha 4, d 500 a layer, σ 1, population 20, spread 1 (official; budget 8000
forwards, 16 examples a class). That the fireworks are the enhanced ones is our reading: no code of theirs is public.
References: arXiv:2403.01754; survey 3.3.2.

Use it when there is no gradient at all: a base that can only be run forward. Everywhere else gradient steps win at the same number of
forwards by far (log); keep d small, the batch fixed, and CMA-ES rather than fireworks.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lorakit.core import random
from lorakit.core.errors import BadParameter, Incompatible
from lorakit.core.events import Loop, MicroBatches, Run, Step
from lorakit.core.layer import Branch
from lorakit.core.lowrank import LowRank, LowRankSpec
from lorakit.core.method import Method, method
from lorakit.core.scale import Rank
from lorakit.core.site import Where
from lorakit.parts.loops.ask_tell import Algorithm, Search, Vector, search


@dataclass(frozen=True)
class AskTellSpec:
    """The searches, as values."""

    algorithm: Algorithm
    d: int
    sigma: float
    population: int
    spread: float
    keep: Literal["best", "mean"]
    requires: frozenset[str] = frozenset({"factors"})

    def __post_init__(self) -> None:
        if self.d < 4 or self.population < 4 or self.sigma <= 0:
            raise BadParameter(f"d={self.d} and population={self.population} must be at least 4, sigma={self.sigma} positive")

    def build(self, run: Run) -> "AskTell":
        found = {row.name for row in run.adapted.params()}
        pairs = {f"{b.site.name}.{n}" for b in run.adapted.branches() if isinstance(b.delta, LowRank) and b.delta.A0 is None for n in "AB"}
        if found != pairs:
            odd = ", ".join(sorted(found ^ pairs)[:2])
            raise Incompatible(f"the search sets A and B of every site, from zero, and nothing else; this method differs in {odd}, …")
        for name in run.adapted.active:
            if run.adapted.methods[name].optim is not None or run.adapted.methods[name].penalties:
                raise Incompatible("the search takes no gradient step; it has no use for another method's optimizer or penalty")
        return AskTell(self, run)


class Layer:
    """One layer's search, the maps from z to its tensors, and the best z so far."""

    def __init__(self, name: str, branches: list[Branch], spec: AskTellSpec, widths: dict[str, float], seed: int, generations: int) -> None:
        self.tensors = [(b, n, getattr(b.delta, n)) for b in branches for n in ("A", "B")]
        self.part = max(1, spec.d // len(self.tensors))
        d = self.part * len(self.tensors)
        number = random.mixed(seed, 0, int(random.stream(name))) % 2**32
        self.search: Search = search(spec.algorithm, d, spec.sigma, spec.population, number, generations=generations)
        std = {b.site.name: spec.spread * widths[b.site.name] / (math.sqrt(d) * spec.sigma) for b in branches}
        self.maps = [
            torch.empty(t.numel(), self.part).normal_(0, std[b.site.name], generator=random.generator(seed, f"{b.site.name}.{n}:map"))
            for b, n, t in self.tensors
        ]
        self.best, self.loss, self.told = np.zeros(d), math.inf, list[list[float]]()
        self.start = math.inf

    @torch.no_grad()
    def set_(self, z: Vector) -> None:
        """Put the layer's A and B where z says."""
        for i, (_, _, tensor) in enumerate(self.tensors):
            part = torch.from_numpy(z[i * self.part : (i + 1) * self.part]).to(self.maps[i])
            tensor.copy_((self.maps[i] @ part).view_as(tensor))

    def tell(self, candidates: Any, losses: list[float]) -> None:
        self.search.tell(np.asarray(losses))
        self.told.append(losses)
        i = int(np.nanargmin(losses)) if np.isfinite(losses).any() else 0
        if losses[i] < self.loss:
            self.best, self.loss = np.asarray(candidates[i]), losses[i]


class AskTell(Loop):
    """One generation of one layer a step."""

    def __init__(self, spec: AskTellSpec, run: Run) -> None:
        self.spec, self.run, self.data = spec, run, run.stream()
        groups: dict[str, list[Branch]] = {}
        for branch in run.adapted.branches():
            if isinstance(branch.delta, LowRank):
                groups.setdefault(f"layer {branch.site.layer}", []).append(branch)
        widths = input_widths(run, [b for group in groups.values() for b in group])
        generations = -(-run.total // max(1, len(groups)))
        self.layers = [Layer(name, group, spec, widths, run.adapted.seed, generations) for name, group in groups.items()]

    def step(self, info: Step) -> tuple[float, int]:
        self.run.adapted.model.eval()
        layer, batches = self.layers[info.index % len(self.layers)], next(self.data)
        if not layer.told:  # the base's own loss is the one to beat
            nats, n = self._loss(layer, layer.best, batches, info)
            layer.loss = layer.start = nats / max(1, n)
        candidates = layer.search.ask()
        found = [self._loss(layer, z, batches, info) for z in candidates]
        losses = [nats / max(1, n) for nats, n in found]
        layer.tell(candidates, losses)
        layer.set_(layer.best if self.spec.keep == "best" else layer.search.mean)
        return min((f for f in found if math.isfinite(f[0])), default=found[0])

    def _loss(self, layer: Layer, z: Vector, batches: MicroBatches, info: Step) -> tuple[float, int]:
        layer.set_(z)
        return self.run.loss(batches, info)

    def state_dict(self) -> dict[str, Any]:
        return {"told": [layer.told for layer in self.layers], "start": [layer.start for layer in self.layers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for layer, told, start in zip(self.layers, state["told"], state["start"], strict=True):
            layer.loss = layer.start = start
            for losses in told:
                layer.tell(layer.search.ask(), losses)


def input_widths(run: Run, branches: list[Branch]) -> dict[str, float]:
    """The clipped standard deviation of each site's input on one batch a process; their mean."""
    sums, runs = dict.fromkeys((b.site.name for b in branches), 0.0), dict.fromkeys((b.site.name for b in branches), 0)

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            sums[name] += clipped_std(x.float().flatten()) if x.is_floating_point() else 1.0
            runs[name] += 1

        return hook

    hooks = [b.base.module.register_forward_pre_hook(watch(b.site.name)) for b in branches]
    data, model = run.calibration(run.processes), run.adapted.model
    training = model.training
    try:
        with torch.no_grad():
            for batch in data.batches:  # none where there are fewer than processes; all under a sharded base
                data.loss(model.eval(), batch)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    widths = torch.tensor([[sums[b.site.name], runs[b.site.name]] for b in branches], dtype=torch.float64)
    run.total_(widths)  # the same maps everywhere
    return {b.site.name: total / n if n else 1.0 for b, (total, n) in zip(branches, widths.tolist(), strict=True)}


def clipped_std(x: Tensor, rounds: int = 5) -> float:
    """The standard deviation after clipping at mean ± 3 std, so many times."""
    for _ in range(rounds):
        mean, std = x.mean(), x.std()
        x = x.clamp(mean - 3 * std, mean + 3 * std)
    return float(x.std())


@method("dfo_lora", paper="arXiv:2403.01754", survey="3.3.2", kind="loop")
def dfo_lora(
    r: int = 4,
    alpha: float = 4.0,
    sites: Where = "qk",
    algorithm: Algorithm = "cma",
    d: int = 500,
    sigma: float = 1.0,
    population: int = 20,
    spread: float = 1.0,
    keep: Literal["best", "mean"] = "best",
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
) -> Method:
    """LoRA searched by CMA-ES or fireworks: forwards only, any loss, no gradient."""
    rank = Rank.of(r, alpha, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    return Method(LowRankSpec(rank), None, sites=sites, loop=AskTellSpec(algorithm, d, sigma, population, spread, keep))
