"""An ensemble: M adapters on one base, whose predictions are averaged (arXiv:2310.00035).

    p = 1/M Σ_m softmax(f(x; W + ΔW_m))          probabilities, not logits, and not weights

    H(p)                     predictive entropy: all of the uncertainty, in nats
    H(p) − 1/M Σ H(p_m)      mutual information: what the members disagree about, which more data would settle

By Jensen's inequality its negative log-likelihood is at most the mean of the members'. The base is there once; the members are shown one
after the other, so that they may be of any method, and each token costs M forwards. In generation every member reads the same text and
keeps a cache of its own. An ensemble is no weight: it cannot be merged (their average, `lorakit mix --how average`, is another model).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.attach import Adapted
from lorakit.core.errors import AdapterMismatch, BadParameter, DataError
from lorakit.data.encoded import IGNORED
from lorakit.data.packable import eval_mode
from lorakit.serve.decode import decode, next_token, pieces, prompt_ids, stops
from lorakit.serve.open import Opened, open_adapter, recorded
from lorakit.serve.score import prepared
from lorakit.train.evaluate import to
from lorakit.train.kinds import told
from lorakit.train.metrics import accuracy, bits_per_byte, forward_scored, macro_f1, perplexity

T = TypeVar("T")


class Opinion(NamedTuple):
    """What the members say together."""

    log_p: Tensor
    """Logarithm of the mean distribution, [.., v]."""
    entropy: Tensor
    """[..], nats."""
    mutual_information: Tensor
    """[..], nats, not negative."""


def together(logits: Iterable[Tensor]) -> Opinion:
    """The opinion of members with these logits [.., v], taken one after the other."""
    total: Tensor | None = None
    entropies: Tensor | float = 0.0
    n = 0
    for one in logits:
        log_p = one.to(torch.promote_types(one.dtype, torch.float32)).log_softmax(-1)
        total = log_p if total is None else torch.logaddexp(total, log_p)
        entropies, n = entropies + _entropy(log_p), n + 1
    if total is None:
        raise BadParameter("an ensemble has at least one member")
    mean = total - math.log(n)
    entropy = _entropy(mean)
    return Opinion(mean, entropy, (entropy - entropies / n).clamp_min(0))


def _entropy(log_p: Tensor) -> Tensor:
    terms: Tensor = torch.special.entr(log_p.exp())  # 0 where p is
    return terms.sum(-1)


@dataclass(frozen=True)
class Ensemble:
    """Some of the adapters on a model."""

    adapted: Adapted
    names: tuple[str, ...]

    def each(self, look: Callable[[], T]) -> Iterator[T]:
        """`look()` with each member shown alone; afterwards those are that were before."""
        before = self.adapted.active
        try:
            for name in self.names:
                self.adapted.switch(name)
                yield look()
        finally:
            self.adapted.switch(*before)

    @torch.no_grad()
    def predict(self, **inputs: Any) -> Opinion:
        """The opinion on a batch, as the model takes it."""
        return together(self.each(lambda: self.adapted.model(**inputs).logits))

    def next_token(self) -> Callable[[Tensor], Opinion]:
        """As decode.next_token, of all members: each has its own cache."""
        members = [next_token(self.adapted.model) for _ in self.names]

        def step(ids: Tensor) -> Opinion:
            steps = iter(members)
            return together(self.each(lambda: next(steps)(ids)))

        return step


@dataclass(frozen=True)
class OpenedEnsemble:
    """An ensemble, and the opened model with its tokenizer."""

    opened: Opened
    ensemble: Ensemble


def open_ensemble(
    folders: Sequence[str | Path], *, model: str | None = None, dtype: str | None = None, force: bool = False
) -> OpenedEnsemble:
    """Adapters on the base that the first one names, or on `model`. Raises as `open_adapter` does, and AdapterMismatch where they do not
    predict the same things."""
    if not folders:
        raise BadParameter("no adapter was given; an ensemble has at least one member, and is one from two on")
    opened = open_adapter(folders[0], model=model, dtype=dtype, force=force)
    assert opened.adapted is not None
    names = ["default", *(str(i) for i in range(2, len(folders) + 1))]
    for name, folder in zip(names[1:], folders[1:], strict=True):
        labels = recorded(folder).get("labels")
        if (labels or None) != (opened.meta.get("labels") or None):
            raise AdapterMismatch(
                f"{folder} predicts {labels or 'text'} and {folders[0]} {opened.meta.get('labels') or 'text'}: no ensemble"
            )
        opened.adapted.load(folder, name, force=force)
    opened.adapted.switch(names[0])
    opened.model.eval()
    return OpenedEnsemble(opened, Ensemble(opened.adapted, tuple(names)))


# ------------------------------------------------------------------------------------------------------------------------- scoring
def score(
    opened: OpenedEnsemble, data: str, *, whole: bool = False, limit: int | None = None, max_length: int | None = None, batch_size: int = 8
) -> dict[str, float]:
    """Figures on the validation side of `data` (all of it with `whole`): loss and what follows from it, the mean and the least of the
    members' losses, mean entropy and mutual information. Raises DataError."""
    sides = prepared(opened.opened, data, whole=whole, limit=limit, max_length=max_length)
    ensemble, model = opened.ensemble, opened.opened.model
    device = next(model.parameters()).device
    members, tally = [0.0] * len(ensemble.names), _Tally()
    with eval_mode(model), torch.no_grad():
        for batch in sides.valid.batches(batch_size):
            with told(model, to(batch, device)) as inputs:
                targets = _targets(model, inputs["labels"])
                tally.take(together(_heard(ensemble, model, inputs, members)), targets)
    if not tally.n:
        raise DataError("the evaluation data has no token to predict")
    figures = tally.figures(sides.valid.n_bytes)
    losses = [nats / tally.n for nats in members]
    return figures | {"member_loss": sum(losses) / len(losses), "best_member_loss": min(losses)}


def _heard(ensemble: Ensemble, model: nn.Module, inputs: dict[str, Any], members: list[float]) -> Iterator[Tensor]:
    """Each member's logits at the targets; its loss is added to `members`."""
    for i, scored in enumerate(ensemble.each(lambda: forward_scored(model, inputs))):
        members[i] += scored.loss.item()
        yield scored.logits


def _targets(model: nn.Module, labels: Tensor) -> Tensor:
    """What the logits of `forward_scored` are to predict, in their order: [n]."""
    net: Any = model
    ahead = net.can_generate() and not net.config.is_encoder_decoder
    aligned = F.pad(labels[:, 1:], (0, 1), value=IGNORED) if ahead else labels
    return aligned[aligned != IGNORED]


class _Tally:
    """Sums over what was scored."""

    def __init__(self) -> None:
        self.n, self.nats, self.entropy, self.information = 0, 0.0, 0.0, 0.0
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def take(self, opinion: Opinion, targets: Tensor) -> None:
        self.n += len(targets)
        self.nats -= opinion.log_p.gather(-1, targets[:, None]).double().sum().item()
        self.entropy += opinion.entropy.double().sum().item()
        self.information += opinion.mutual_information.double().sum().item()
        self.pairs.append((opinion.log_p.argmax(-1).cpu(), targets.cpu()))

    def figures(self, n_bytes: int) -> dict[str, float]:
        """{loss, entropy, mutual_information} a target, and those of texts or of classes."""
        own = (
            {"perplexity": perplexity(self.nats, self.n), "bits_per_byte": bits_per_byte(self.nats, n_bytes)}
            if n_bytes
            else self._classes()
        )
        means = {"entropy": self.entropy / self.n, "mutual_information": self.information / self.n}
        return {"loss": self.nats / self.n, **own, **means}

    def _classes(self) -> dict[str, float]:
        p, y = (torch.cat(column) for column in zip(*self.pairs, strict=True))
        return {"accuracy": accuracy(p, y), "macro_f1": macro_f1(p, y)}


# ---------------------------------------------------------------------------------------------------------------------- generation
class Said(NamedTuple):
    """A token, and how certain the members were of the next one when it was chosen."""

    token: int
    entropy: float
    mutual_information: float


def tokens(opened: OpenedEnsemble, prompt: str, *, max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 0) -> Iterator[Said]:
    """Each token of the continuation. Raises BadParameter for a classifier."""
    model, tokenizer = opened.opened.model, opened.opened.tokenizer
    ids = prompt_ids(model, tokenizer, prompt, room=max_new_tokens)
    forward = opened.ensemble.next_token()
    heard: list[Opinion] = []

    def step(new: Tensor) -> Tensor:
        heard[:] = [forward(new)]
        return heard[0].log_p

    options: Any = {"stop": stops(model, tokenizer), "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    for token in decode(step, ids, **options):
        yield Said(token, heard[0].entropy.item(), heard[0].mutual_information.item())


def stream(opened: OpenedEnsemble, prompt: str, **options: Any) -> Iterator[str]:
    """Pieces of the continuation, as they are made; options as of `tokens`."""
    yield from pieces(opened.opened.tokenizer, (said.token for said in tokens(opened, prompt, **options)))
