"""Learning from preferences: DPO and KTO, with the model without its adapter as the reference. One base is in memory.

r(x, y) = log π(y|x) − log π_ref(y|x), summed over the answer's tokens; π is the model with the adapter, π_ref the same model without it.

DPO   loss = mean over pairs of −log σ(β [r(x, y_w) − r(x, y_l)])                                            arXiv:2305.18290, eq. 7
KTO   v = λ_D σ(β [r(x, y) − z])  where y is wanted,  λ_U σ(β [z − r(x, y)])  where it is not                arXiv:2402.01306, eq. 7-8
      loss = mean of λ_y − v,   z = max(0, mean of r(x, y') over the micro-batch of all processes), y' an answer to another prompt; no
      gradient through z. Of held-out answers z is the mean over all of them. So DPO's loss does not depend on how a step is divided into
      micro-batches, and KTO's does; neither depends on the number of processes.

An answer's reward is β r. The reference goes first and gets the same rows in the same layout, under the same state of the base's own
dropout and through layers that are compiled where the policy's are, so an adapter that starts silent gives the same bits twice: r = 0, and
DPO's first loss is ln 2 exactly.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.attach import Adapted
from lorakit.core.errors import BadParameter, Incompatible
from lorakit.core.method import Method
from lorakit.data.preference import rows_of
from lorakit.train.config import TrainConfig
from lorakit.train.distributed import World
from lorakit.train.kinds import told
from lorakit.train.metrics import row_log_probs

Batch = Mapping[str, Any]
REFERENCE = "reference"
"""The name under which the adapter that a run began with stays beside the one that it trains."""


class Judged(NamedTuple):
    """One micro-batch: the loss summed over its n pairs or answers, and the float64 sums that figures are made of, the loss first."""

    loss: Tensor
    n: int
    sums: Tensor


@dataclass(frozen=True)
class Ratios:
    """r of rows of a batch. Without an adapter the model is its own reference: r is 0, and has the policy's gradient.

    `within` makes the context of one forward of the policy; `world`: who shares the micro-batch; `compiled`: whether layers are compiled
    where they train (train/compile.py).
    """

    model: nn.Module
    adapted: Adapted | None = None
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    world: World | None = None
    compiled: bool = False

    def __call__(self, batch: Batch) -> Tensor:
        """r of each row, fp32 [b]."""
        reference = None if self.adapted is None else self._reference(self.adapted, batch)
        with self.within(), told(self.model, batch) as inputs:
            policy = row_log_probs(self.model, inputs)
        return policy - (policy.detach() if reference is None else reference)

    def mean(self, r: Tensor) -> Tensor:
        """The mean of all processes' r [b], a scalar; each process must ask."""
        sums = torch.stack([r.sum(), r.new_full((), len(r))])
        if self.world is not None:
            self.world.total_(sums)
        return sums[0] / sums[1]

    def _reference(self, adapted: Adapted, batch: Batch) -> Tensor:
        """log π_ref: the state of the random generators is given back, so that the policy's forward drops what this one dropped.

        Where an adapter is the reference, or layers are compiled, it goes the way of the policy's, which rounds differently without
        gradients; the graph, if there is one, is dropped at once.
        """
        device = batch["input_ids"].device
        generators = torch.random.fork_rng([device] if device.type == "cuda" else [])
        grad = torch.set_grad_enabled(torch.is_grad_enabled() and (self.compiled or REFERENCE in adapted.methods))
        with grad, generators, aside(adapted), self.within(), told(self.model, batch) as inputs:
            return row_log_probs(self.model, inputs).detach()


def aside(adapted: Adapted) -> AbstractContextManager[Any]:
    """The reference: the base alone, or with the adapter that the run began with."""
    return _Switched(adapted) if REFERENCE in adapted.methods else adapted.disabled()


class _Switched:
    def __init__(self, adapted: Adapted) -> None:
        self.adapted, self.active = adapted, adapted.active

    def __enter__(self) -> None:
        self.adapted.switch(REFERENCE)

    def __exit__(self, *exc: object) -> None:
        self.adapted.switch(*self.active)


class Aim(ABC):
    """A loss that compares the model with its reference; a value."""

    name: ClassVar[str]
    width: ClassVar[int]
    """How many sums there are: of the losses, their number, and more."""

    @classmethod
    @abstractmethod
    def of(cls, config: TrainConfig) -> Self:
        """As configured."""

    @abstractmethod
    def __call__(self, ratios: Ratios, batch: Batch) -> Judged:
        """The loss of a micro-batch as data/preference.py collates it."""

    @abstractmethod
    def figures(self, sums: list[float]) -> dict[str, float]:
        """What is told of sums over micro-batches and processes: rewards, margin and accuracy."""

    def mean(self, sums: list[float]) -> float:
        """The mean loss."""
        return sums[0] / max(1.0, sums[1])

    def notes(self, items: Sequence[Any]) -> list[str]:
        """What the user should know of the training items."""
        return []

    def check(self, method: Method) -> None:
        """Raise Incompatible for a method that has a loss or a likelihood of its own."""
        name = "this method" if method.recipe is None else method.recipe.name
        if method.objective is not None:
            raise Incompatible(
                f"{name} makes its loss of predicted tokens or classes itself, and {self.name} has another loss; "
                "choose another method, or a parameter that leaves that term out (hiddenkey: kl=0, loramoe: balance=0)"
            )
        if any(getattr(spec, "likelihood", False) for spec in method.controllers):
            raise Incompatible(f"{name} fits a posterior of predicted tokens or classes, and {self.name} predicts none; train with lora")

    @abstractmethod
    def keys(self) -> dict[str, float]:
        """The configuration's keys that it was made of."""

    def on(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """(summed loss, n) where model and reference are still one: its gradient is that of the first step."""
        judged = self(Ratios(model), batch)
        return judged.loss, judged.n

    def judge(self, model: nn.Module, batches: Iterable[Batch], world: World, adapted: Adapted | None) -> dict[str, float]:
        """Held-out figures: {loss, accuracy, margin, …}."""
        sums = torch.zeros(self.width, dtype=torch.float64)
        for batch in batches:
            sums += self(Ratios(model, adapted), batch).sums
        totals = world.total(*sums.tolist())
        return {"loss": self.mean(totals)} | self.figures(totals)


@dataclass(frozen=True)
class DPO(Aim):
    """Direct preference optimization."""

    beta: float
    name: ClassVar[str] = "dpo"
    width: ClassVar[int] = 5

    @classmethod
    def of(cls, config: TrainConfig) -> Self:
        """Its beta."""
        return cls(config.beta)

    def keys(self) -> dict[str, float]:
        """Its beta."""
        return asdict(self)

    def __call__(self, ratios: Ratios, batch: Batch) -> Judged:
        """Of a batch [chosen; rejected]."""
        chosen, rejected = (self.beta * ratios(batch)).chunk(2)
        losses = -F.logsigmoid(chosen - rejected)
        return Judged(losses.sum(), len(losses), _sums(losses, torch.ones_like(losses), chosen, rejected, chosen > rejected))

    def figures(self, sums: list[float]) -> dict[str, float]:
        """Means over pairs; a pair is right where the chosen answer's reward is the greater."""
        _, n, chosen, rejected, hits = sums
        n = max(1.0, n)
        return {"accuracy": hits / n, "margin": (chosen - rejected) / n, "reward_chosen": chosen / n, "reward_rejected": rejected / n}


@dataclass(frozen=True)
class KTO(Aim):
    """Kahneman-Tversky optimization: answers that are wanted or not, in no pairs."""

    beta: float
    desirable_weight: float
    undesirable_weight: float
    name: ClassVar[str] = "kto"
    width: ClassVar[int] = 8

    @classmethod
    def of(cls, config: TrainConfig) -> Self:
        """Its beta and weights. BadParameter for batches of one, or where nothing has a weight."""
        if config.per_device_train_batch_size < 2:
            raise BadParameter(
                "task=kto estimates a divergence from the samples of a micro-batch, and one sample says nothing of it; "
                "give per_device_train_batch_size of at least 2"
            )
        if not config.desirable_weight and not config.undesirable_weight:
            raise BadParameter("desirable_weight and undesirable_weight are both 0: nothing would be learned; give one of them a weight")
        return cls(config.beta, config.desirable_weight, config.undesirable_weight)

    def keys(self) -> dict[str, float]:
        """Its beta and weights."""
        return asdict(self)

    def __call__(self, ratios: Ratios, batch: Batch) -> Judged:
        """Of a batch [answers; mismatched answers] with `desirable`."""
        wanted: Tensor = batch["desirable"]
        b = len(wanted)
        if ratios.adapted is None:
            r, z = ratios(batch)[:b], torch.zeros((), device=wanted.device)
        else:
            with torch.no_grad():
                z = ratios.mean(ratios(rows_of(batch, slice(b, None)))).clamp_min(0)
            r = ratios(rows_of(batch, slice(0, b)))
        return self._judged(r, z, wanted)

    def judge(self, model: nn.Module, batches: Iterable[Batch], world: World, adapted: Adapted | None) -> dict[str, float]:
        """With z of all samples: how they are divided into batches and among processes decides nothing."""
        ratios, found = Ratios(model, adapted, world=world), [(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.bool))]
        for batch in batches:
            b = len(batch["desirable"])
            r, others = (ratios(rows_of(batch, some)).cpu() for some in (slice(0, b), slice(b, None)))
            found.append((r, others, batch["desirable"].cpu()))
        r, others, wanted = map(torch.cat, zip(*found, strict=True))
        totals = world.total(*self._judged(r, ratios.mean(others).clamp_min(0), wanted).sums.tolist())
        return {"loss": self.mean(totals)} | self.figures(totals)

    def _judged(self, r: Tensor, z: Tensor, wanted: Tensor) -> Judged:
        sign, weight = _either(wanted, 1.0, -1.0, r), _either(wanted, self.desirable_weight, self.undesirable_weight, r)
        losses = weight * torch.sigmoid(self.beta * sign * (z - r))  # λ (1 − σ(u)) = λ σ(−u)
        rewards = self.beta * r
        hits, parts = sign * (r - z) > 0, (wanted, rewards * wanted, ~wanted, rewards * ~wanted)
        return Judged(losses.sum(), len(r), _sums(losses, torch.ones_like(r), *parts, hits, z.expand(len(r))))

    def figures(self, sums: list[float]) -> dict[str, float]:
        """Mean rewards of wanted and unwanted answers, their difference, and z; an answer is right on the side of z where it is wanted."""
        _, n, n_up, up, n_down, down, hits, z = sums
        n, up, down = max(1.0, n), up / max(1.0, n_up), down / max(1.0, n_down)
        return {"accuracy": hits / n, "margin": up - down, "reward_chosen": up, "reward_rejected": down, "kl": z / n}

    def notes(self, items: Any) -> list[str]:
        """Where the two kinds of answers weigh otherwise than the paper advises."""
        up = int(items.desirable.sum())
        ups, downs = self.desirable_weight * up, self.undesirable_weight * (len(items) - up)
        if not ups or not downs:
            only, does, missing = ("desirable", "more", "avoid") if ups else ("undesirable", "less", "say instead")
            return [
                f"of {len(items)} answers {up} are desirable, and only {only} ones have a weight: KTO makes them all {does} likely, "
                f"nothing says what to {missing}, and reward margins compare with nothing; KTO needs both kinds to tell them apart"
            ]
        if 0.9 <= ups / downs <= 1.1 * 4 / 3:  # a held-out part was taken from both
            return []
        low = self.undesirable_weight * (len(items) - up) / up
        return [
            f"{up} desirable answers weigh {ups / downs:.2f} times as much as {len(items) - up} undesirable ones; the authors of KTO "
            f"advise 1 to 4/3: "
            f"desirable_weight from {low:.3g} to {low * 4 / 3:.3g} with undesirable_weight {self.undesirable_weight:g}"
        ]


def _either(wanted: Tensor, up: float, down: float, like: Tensor) -> Tensor:
    return torch.where(wanted, like.new_tensor(up), like.new_tensor(down))


def _sums(*columns: Tensor) -> Tensor:
    """The sum of each of the equally long columns, exact in float64 for what fp32 holds; they leave the device together."""
    return torch.stack([column.detach().to(columns[0].dtype) for column in columns]).cpu().double().sum(-1)
