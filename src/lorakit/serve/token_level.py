"""Token-level adaptation: while a text is made, the adapters' weights follow what it is about (arXiv:2311.10847). Nothing is trained.

    w = softmax(cos(e, c_i) / τ)        e = E(the context so far), c_i = the mean vector of adapter i's task (serve/library.py)

w is computed for the prompt, and again before every n-th token: it holds for a window of n. `refresh` None is a window without end: routing
by the prompt. The keys and values of earlier tokens stay as the weights in force made them; they are not computed again, as in the paper,
so the same text read at once under the last weights gives other numbers. Each refresh reads the context anew (E keeps nothing): n small
and a long text cost most there.

The paper's τ is not known to us, and its re-ranking of weights is left out; n = 2 is its best.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lorakit.core.errors import BadParameter
from lorakit.serve.decode import decode, next_token, pieces, prompt_ids, stops
from lorakit.serve.encoder import Encoder
from lorakit.serve.mixture import Mixture


@dataclass(frozen=True)
class Nearness:
    """Weights of a context by its nearness to each adapter's task."""

    encoder: Encoder
    centroids: Tensor
    """[N, d], in the order of the mixture's adapters."""
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise BadParameter(
                f"temperature={self.temperature} divides the similarities; expected a positive number, small for a hard choice"
            )

    def __call__(self, context: str) -> Tensor:
        """[N], summing up to 1."""
        (e,) = self.encoder.encode([context]).double()
        similarity = F.cosine_similarity(e[None], self.centroids.double(), dim=1)
        return torch.softmax(similarity / self.temperature, 0).float()


def tokens(
    mixture: Mixture,
    tokenizer: PreTrainedTokenizerBase,
    nearness: Nearness,
    prompt: str,
    *,
    refresh: int | None = 2,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[tuple[int, Tensor]]:
    """Each token, and the weights [N] under which it was chosen."""
    if refresh is not None and refresh < 1:
        raise BadParameter(f"refresh={refresh} is no number of tokens; expected at least 1, or None for the prompt's weights throughout")
    model: Any = mixture.adapted.model
    ids = prompt_ids(model, tokenizer, prompt, room=max_new_tokens)
    seen, weights = ids[0].tolist(), list[Tensor]()
    forward = next_token(model)

    def step(new: Tensor) -> Tensor:
        if not weights or (refresh is not None and len(weights) % refresh == 0):
            with mixture.adapted.disabled():
                weights.append(nearness(str(tokenizer.decode(seen, skip_special_tokens=True))))
        else:
            weights.append(weights[-1])
        with mixture.weighted(weights[-1]):
            return forward(new)

    options: Any = {"stop": stops(model, tokenizer), "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    for token in decode(step, ids, **options):
        seen.append(token)
        yield token, weights[-1]


def stream(mixture: Mixture, tokenizer: PreTrainedTokenizerBase, nearness: Nearness, prompt: str, **options: Any) -> Iterator[str]:
    """Pieces of the continuation of `prompt`, as they are made; options as of `tokens`."""
    yield from pieces(tokenizer, (token for token, _ in tokens(mixture, tokenizer, nearness, prompt, **options)))
