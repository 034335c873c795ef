"""Token-level adaptation's acceptance properties (arXiv:2311.10847)."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.core.errors import BadParameter
from lorakit.data.tiny import tiny_tokenizer
from lorakit.serve import token_level as module
from lorakit.serve.decode import decode, next_token, prompt_ids
from lorakit.serve.encoder import HiddenMean
from lorakit.serve.mixture import Mixture, attach_mixture
from lorakit.serve.token_level import Nearness, stream, tokens
from tests.serve.values import far, tiny_model

TOKENIZER = tiny_tokenizer()


class Drifting:
    """A context's vector turns as it grows."""

    name = "drifting"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, texts: Sequence[str]) -> Tensor:
        self.asked += texts
        return torch.stack([torch.tensor([math.cos(len(t)), math.sin(len(t)), 0.3]) for t in texts])


class Turning:
    """Another vector each time it is asked, also where a special token adds no text."""

    name = "turning"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, texts: Sequence[str]) -> Tensor:
        self.asked += texts
        return torch.tensor([[math.cos(len(self.asked)), math.sin(len(self.asked)), 0.3]])


@pytest.fixture(autouse=True)
def _endless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "stops", lambda *_: frozenset())


def mixture(n: int = 3) -> Mixture:
    return attach_mixture(tiny_model("llama", vocab_size=len(TOKENIZER)), dict(list(adapters().items())[:n]))


def adapters() -> dict[str, Any]:
    from tests.laws.subject import attached, awaken, small

    found = {}
    for i in range(3):
        adapted = attached(tiny_model("llama", vocab_size=len(TOKENIZER)), small("lora", r=2, alpha=2.0 + i), seed=i)
        found[f"a{i}"] = awaken(adapted, seed=i, size=0.4).state()
    return found


# ------------------------------------------------------------------------------------------------------------------------- the weights
def test_weights_are_a_softmax_of_cosines() -> None:
    centroids = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([[1.0], [5.0], [0.1], [30.0]])
    e = Drifting().encode(["hello"])[0].double()
    cos = torch.stack([c.double() @ e / (c.double().norm() * e.norm()) for c in centroids])
    for tau in (0.05, 1.0, 7.0):
        want = (cos / tau).exp() / (cos / tau).exp().sum()
        assert torch.allclose(Nearness(Drifting(), centroids, tau)("hello").double(), want, atol=1e-6)


def test_the_same_centroids_share_alike_and_a_cold_choice_is_hard() -> None:
    assert Nearness(Drifting(), torch.ones(4, 3))("x").tolist() == [0.25] * 4
    centroids = torch.eye(3)
    centroids[1] = 9 * Drifting().encode(["abc"])[0]
    assert Nearness(Drifting(), centroids, 1e-6)("abc").tolist() == [0.0, 1.0, 0.0]
    with pytest.raises(BadParameter, match="expected a positive number"):
        Nearness(Drifting(), centroids, 0.0)


# ------------------------------------------------------------------------------------------------------------------------- the windows
@pytest.mark.parametrize("refresh", [1, 2, 3, 7, None])
def test_weights_hold_for_a_window(refresh: int | None) -> None:
    encoder, n = Turning(), 11
    found = list(tokens(mixture(), TOKENIZER, Nearness(encoder, torch.eye(3), 0.2), "the start", refresh=refresh, max_new_tokens=n))
    weights = torch.stack([w for _, w in found])
    changes = [i for i in range(1, n) if not torch.equal(weights[i], weights[i - 1])]
    assert changes == ([] if refresh is None else list(range(refresh, n, refresh)))
    assert len(encoder.asked) == len(changes) + 1
    ids = [*TOKENIZER("the start")["input_ids"], *(token for token, _ in found)]
    start = len(TOKENIZER("the start")["input_ids"])
    assert encoder.asked == [TOKENIZER.decode(ids[: start + at], skip_special_tokens=True) for at in (0, *changes)]


def test_without_refresh_it_is_routing_by_the_prompt() -> None:
    nearness = Nearness(Drifting(), torch.eye(3), 0.2)
    found = [token for token, _ in tokens(mixture(), TOKENIZER, nearness, "the start", refresh=None, max_new_tokens=10)]
    fixed = mixture()
    ids = TOKENIZER("the start", return_tensors="pt")["input_ids"]
    with fixed.weighted(nearness("the start")):
        assert found == list(decode(next_token(fixed.adapted.model), ids, stop=(), max_new_tokens=10))
    drifting = [token for token, _ in tokens(mixture(), TOKENIZER, nearness, "the start", refresh=1, max_new_tokens=10)]
    assert found != drifting


def test_a_hard_choice_is_that_adapter() -> None:
    nearness = Nearness(Drifting(), torch.stack([Drifting().encode(["go"])[0], -torch.ones(3), torch.eye(3)[2]]), 1e-6)
    found = [token for token, _ in tokens(mixture(), TOKENIZER, nearness, "go", refresh=None, max_new_tokens=8)]
    only = mixture(1)
    same = Nearness(Drifting(), torch.ones(1, 3))
    assert found == [token for token, _ in tokens(only, TOKENIZER, same, "go", max_new_tokens=8)]


# ------------------------------------------------------------------------------------------------------------------------ the cache
@torch.no_grad()
def test_earlier_tokens_keep_the_keys_and_values_of_their_own_weights() -> None:
    """And are not read again under later ones, which would give other numbers."""
    mixed, nearness = mixture(), Nearness(Drifting(), torch.eye(3), 0.05)
    model: Any = mixed.adapted.model
    seen: list[Tensor] = []
    lengths: list[int] = []
    handles = [
        model.lm_head.register_forward_hook(lambda _, x, y: seen.append(y[0, -1])),
        model.get_input_embeddings().register_forward_pre_hook(lambda _, x: lengths.append(x[0].shape[1])),
    ]
    found = list(tokens(mixed, TOKENIZER, nearness, "the start", refresh=2, max_new_tokens=6))
    for handle in handles:
        handle.remove()
    ids = TOKENIZER("the start", return_tensors="pt")["input_ids"]
    n = ids.shape[1]
    assert lengths == [n, 1, 1, 1, 1, 1]
    cache, new = None, ids
    for i, (token, w) in enumerate(found):
        with mixed.weighted(w):
            out = model(input_ids=new, past_key_values=cache, use_cache=True)
        cache, new = out.past_key_values, torch.tensor([[token]])
        assert far(seen[i], out.logits[0, -1]) < 1e-5
    whole = torch.cat([ids, torch.tensor([[token for token, _ in found[:-1]]])], 1)
    with mixed.weighted(found[-1][1]):
        again = model(input_ids=whole).logits[0, -1]
    assert far(seen[-1], again) > 1e-3


# -------------------------------------------------------------------------------------------------------------------------- the rest
def test_the_context_is_read_by_the_base_alone() -> None:
    model = tiny_model("llama", vocab_size=len(TOKENIZER))
    encoder = HiddenMean(model, TOKENIZER)
    want = encoder.encode(["the start"])
    vectors: list[Tensor] = []

    class Watched:
        name = "watched"

        def encode(self, texts: Sequence[str]) -> Tensor:
            vectors.append(encoder.encode(texts))
            return vectors[-1]

    mixed = attach_mixture(model, adapters())
    first, *_ = tokens(mixed, TOKENIZER, Nearness(Watched(), torch.randn(3, 32), 0.1), "the start", max_new_tokens=2)
    assert torch.equal(vectors[0], want)
    assert first[1].shape == (3,)


def test_text_and_its_options() -> None:
    nearness = Nearness(Drifting(), torch.eye(3), 0.2)
    texts = ["".join(stream(mixture(), TOKENIZER, nearness, "go", max_new_tokens=6, temperature=1.0, seed=s)) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    with pytest.raises(BadParameter, match="refresh=0"):
        next(tokens(mixture(), TOKENIZER, nearness, "go", refresh=0))
    assert list(tokens(mixture(), TOKENIZER, nearness, "", max_new_tokens=1))
    long = "x" * 400
    assert len(list(tokens(mixture(), TOKENIZER, nearness, long, max_new_tokens=3))) == 3, "the model has 256 positions"


def test_a_prompt_that_is_too_long_loses_its_beginning() -> None:
    text = "z" * 300 + "and this is its end"
    whole: list[int] = TOKENIZER(text)["input_ids"]
    assert prompt_ids(mixture(1).adapted.model, TOKENIZER, text, room=3)[0].tolist() == whole[-253:]
    assert prompt_ids(mixture(1).adapted.model, TOKENIZER, text, room=1000)[0].tolist() == whole[-1:]


def test_another_number_of_centroids_is_refused() -> None:
    with pytest.raises(BadParameter, match="weights of 3 adapters"):
        next(tokens(mixture(), TOKENIZER, Nearness(Drifting(), torch.eye(3)[:2]), "go"))
