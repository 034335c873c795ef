"""An ensemble's acceptance properties (arXiv:2310.00035)."""

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorakit.adapters.mix import mix
from lorakit.core.adapter import Adapter
from lorakit.core.attach import Adapted
from lorakit.core.errors import AdapterMismatch, BadParameter
from lorakit.serve import ensemble as module
from lorakit.serve.decode import pieces
from lorakit.serve.ensemble import Ensemble, OpenedEnsemble, open_ensemble, score, stream, together, tokens
from lorakit.serve.open import open_adapter
from lorakit.serve.score import score as score_one
from lorakit.train.source_model import load_model
from tests.laws.subject import attached, awaken, small
from tests.serve.values import DIFFERENT, IDS, alone, equals, far, logits, made, saved, several, tiny_model
from tests.train.runs import class_file, model_folder, text_file


def of(adapters: dict[str, Adapter]) -> Ensemble:
    adapted = Adapted(tiny_model("llama"))
    for name, adapter in adapters.items():
        adapted.add(name, adapter)
    adapted.model.eval()
    return Ensemble(adapted, tuple(adapters))


# -------------------------------------------------------------------------------------------------------------------- what it predicts
def test_it_is_the_mean_of_the_members_probabilities() -> None:
    """Of any methods; not the softmax of the mean of the logits, nor that of the mean of the weights."""
    adapters = several() | {"dora": made(7, "dora", r=2)}
    opinion = of(adapters).predict(input_ids=IDS)
    members = [alone(adapter) for adapter in adapters.values()]
    want = torch.stack([z.double().softmax(-1) for z in members]).mean(0)
    assert far(opinion.log_p.exp().double(), want) < 1e-5
    assert far(torch.stack(members).mean(0).softmax(-1).double(), want) > 1e-2
    mean = alone(mix(list(several().values()), "average"))
    assert far(of(several()).predict(input_ids=IDS).log_p.exp(), mean.softmax(-1)) > 1e-2


def test_copies_of_one_adapter_are_that_one_and_do_not_disagree() -> None:
    one = made(1)
    opinion = of({"a": one, "b": one, "c": one}).predict(input_ids=IDS)
    want = alone(one).log_softmax(-1)
    assert far(opinion.log_p, want) < 1e-5
    assert far(opinion.entropy, -(want.exp() * want).sum(-1)) < 1e-4
    assert float(opinion.mutual_information.max()) < 1e-5


@given(st.integers(1, 5), st.integers(2, 9), st.integers(0, 10**6), st.sampled_from([0.1, 3.0, 60.0]))
@settings(max_examples=60)
def test_laws_of_probabilities(m: int, v: int, seed: int, size: float) -> None:
    """Jensen; an entropy is at most log v; disagreement is at most log M, and at most all of the uncertainty."""
    z = size * torch.randn(m, 4, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    opinion = together(z)
    members = z.log_softmax(-1)
    assert torch.allclose(opinion.log_p.exp(), members.exp().mean(0), atol=1e-12)
    assert bool((-opinion.log_p <= -members.mean(0) + 1e-9).all())
    assert float(opinion.entropy.max()) <= math.log(v) + 1e-9
    divergence = (members.exp() * (members - opinion.log_p)).nan_to_num().sum(-1).mean(0)  # mean KL of a member from the mean
    assert torch.allclose(opinion.mutual_information, divergence, atol=1e-9)
    assert float(opinion.mutual_information.min()) >= 0
    assert float(opinion.mutual_information.max()) <= math.log(m) + 1e-9
    assert bool((opinion.mutual_information <= opinion.entropy + 1e-9).all())


@given(st.integers(2, 5), st.integers(2, 9), st.integers(0, 10**6))
@settings(max_examples=40)
def test_members_that_differ_are_strictly_better_together(m: int, v: int, seed: int) -> None:
    """Jensen is strict wherever members give the target different probabilities, and an equation where they do not."""
    rng = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(m, 6, v, generator=rng, dtype=torch.float64)
    z[:, 3:] = z[:1, 3:]  # of the later tokens all members say the same
    target = torch.randint(v, (6, 1), generator=rng)
    members = z.log_softmax(-1).gather(-1, target.expand(m, 6, 1)).squeeze(-1)
    gain = together(z).log_p.gather(-1, target).squeeze(-1) - members.mean(0)
    spread = members.exp().std(0, correction=0)
    assert bool((gain[:3] >= spread[:3].square() / 2).all()), "the logarithm is strongly concave on (0, 1]"
    assert bool((spread[:3] > 0).all() and (gain[:3] > 0).all())
    assert torch.allclose(gain[3:], torch.zeros(3, dtype=torch.float64), atol=1e-12)


def test_uncertainty_by_hand() -> None:
    """Two members that are certain of different things: one bit in all, and all of it disagreement; two that are undecided: none of it."""
    certain = together([torch.tensor([100.0, 0.0]), torch.tensor([0.0, 100.0])])
    undecided = together([torch.zeros(2), torch.zeros(2)])
    for opinion, information in ((certain, math.log(2)), (undecided, 0.0)):
        assert opinion.entropy.item() == pytest.approx(math.log(2), abs=1e-6)
        assert opinion.mutual_information.item() == pytest.approx(information, abs=1e-6)
    halves = together([torch.tensor([-torch.inf, 0.0]), torch.tensor([0.0, 0.0])])  # a token that one member rules out
    assert halves.log_p.exp().tolist() == pytest.approx([0.25, 0.75])
    assert math.isfinite(halves.entropy.item())
    with pytest.raises(BadParameter, match="at least one member"):
        together([])


# ------------------------------------------------------------------------------------------------------------------------- what it is
def test_the_base_is_there_once() -> None:
    model = tiny_model("llama")
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    adapted = Adapted(model)
    adapters = equals(4)
    for name, adapter in adapters.items():
        adapted.add(name, adapter)
    Ensemble(adapted, tuple(adapters)).predict(input_ids=IDS)
    assert {name: p.data_ptr() for name, p in model.named_parameters() if name in places} == places
    own = sum(p.numel() for p in tiny_model("llama").parameters())
    one = sum(t.numel() for t in next(iter(adapters.values())).tensors.values())
    assert sum(p.numel() for p in model.parameters()) == own + 4 * one


def test_what_was_shown_before_is_shown_again() -> None:
    ensemble = of(several())
    ensemble.adapted.switch("a1", "a3")
    before = logits(ensemble.adapted.model, IDS)
    ensemble.predict(input_ids=IDS)
    assert ensemble.adapted.active == ("a1", "a3")
    assert torch.equal(logits(ensemble.adapted.model, IDS), before)
    with pytest.raises(ZeroDivisionError):
        together(ensemble.each(lambda: 1 / 0))  # type: ignore[arg-type, return-value]
    assert ensemble.adapted.active == ("a1", "a3")


# -------------------------------------------------------------------------------------------------------------------------- from files
@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """A base, and adapters of several methods on it."""
    root = tmp_path_factory.mktemp("ensemble")
    base = model_folder(root / "model")
    some = [saved(root / str(i), base, i, name, size=0.1, **kwargs) for i, (name, kwargs) in enumerate([*DIFFERENT, ("dora", {"r": 2})])]
    text_file(root / "data.jsonl", lines=12)
    (root / "pairs.jsonl").write_text("".join(json.dumps({"prompt": f"{c} is", "completion": c * 3}) + "\n" for c in "abcde"))
    return str(root), [str(path) for path in some]


@pytest.mark.parametrize("data", ["data.jsonl", "pairs.jsonl"])
def test_scores_beside_the_members_own(folders: tuple[str, list[str]], data: str) -> None:
    root, some = folders
    file = f"{root}/{data}"
    figures = score(open_ensemble(some), file, whole=True, max_length=64, batch_size=3)
    own = [score_one(open_adapter(folder), file, whole=True, max_length=64, batch_size=3)["loss"] for folder in some]
    assert figures["member_loss"] == pytest.approx(sum(own) / len(own), rel=1e-5)
    assert figures["best_member_loss"] == pytest.approx(min(own), rel=1e-5)
    assert figures["loss"] < figures["member_loss"] - 1e-3
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]), rel=1e-6)
    assert 0 < figures["mutual_information"] < figures["entropy"]
    assert figures["bits_per_byte"] > 0


def test_one_member_scores_as_itself(folders: tuple[str, list[str]]) -> None:
    root, some = folders
    figures = score(open_ensemble(some[:1]), f"{root}/data.jsonl", whole=True, max_length=64)
    own = score_one(open_adapter(some[0]), f"{root}/data.jsonl", whole=True, max_length=64)
    assert {key: figures[key] for key in own} == pytest.approx(own, rel=1e-5)
    assert figures["mutual_information"] == pytest.approx(0.0, abs=1e-6)


def test_classifiers_with_heads_of_their_own(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "model")
    data = class_file(tmp_path / "classes.jsonl")
    some = [str(saved_classifier(tmp_path / str(i), base, i)) for i in range(3)]
    figures = score(open_ensemble(some), data, whole=True)
    own = [score_one(open_adapter(folder), data, whole=True)["loss"] for folder in some]
    assert figures["member_loss"] == pytest.approx(sum(own) / 3, rel=1e-5)
    assert figures["loss"] < figures["member_loss"]
    assert {"accuracy", "macro_f1"} <= figures.keys()


def saved_classifier(folder: Path, base: str, seed: int, labels: tuple[str, ...] = ("a", "z")) -> Path:
    model = load_model(base, task="sequence-classification", labels=list(labels))
    adapted = awaken(attached(model, small("lora", unfreeze=("score",))), seed=seed)
    adapted.meta = {"model": base, "task": "sequence-classification", "labels": list(labels)}
    return adapted.save(folder)


def test_members_that_predict_other_things_are_refused(tmp_path: Path, folders: tuple[str, list[str]]) -> None:
    _, some = folders
    base = model_folder(tmp_path / "model")
    one, other = saved_classifier(tmp_path / "1", base, 1), saved_classifier(tmp_path / "2", base, 2, ("a", "b"))
    with pytest.raises(AdapterMismatch, match=r"predicts \['a', 'b'\]"):
        open_ensemble([one, other])
    with pytest.raises(AdapterMismatch, match="trained on"):
        open_ensemble([some[0], saved(tmp_path / "3", model_folder(tmp_path / "other", seed=1), 1)])
    with pytest.raises(BadParameter, match="no adapter was given"):
        open_ensemble([])
    with pytest.raises(BadParameter, match="no causal language model"):
        next(tokens(open_ensemble([one]), "x"))


# -------------------------------------------------------------------------------------------------------------------------- generation
@torch.no_grad()
def without_caches(opened: OpenedEnsemble, prompt: str, n: int) -> list[int]:
    """Greedy, every member reading all of the text anew for each token."""
    ids: Tensor = opened.opened.tokenizer(prompt, return_tensors="pt")["input_ids"]
    model, made_by = opened.opened.model, list[int]()
    for _ in range(n):
        read = partial(model, input_ids=ids)
        p = torch.stack([out.logits[0, -1].double().softmax(-1) for out in opened.ensemble.each(read)])
        made_by.append(int(p.mean(0).argmax()))
        ids = torch.cat([ids, torch.tensor([[made_by[-1]]])], 1)
    return made_by


def test_every_member_reads_the_same_text_and_keeps_its_own_cache(folders: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_ensemble(folders[1])
    monkeypatch.setattr(module, "stops", lambda *_: frozenset())
    found = [said.token for said in tokens(opened, "line 3 abc", max_new_tokens=12)]
    assert found == without_caches(opened, "line 3 abc", 12)
    lengths: list[int] = []
    handle = opened.opened.model.get_input_embeddings().register_forward_pre_hook(lambda _, x: lengths.append(x[0].shape[1]))  # type: ignore[operator]
    list(tokens(opened, "line 3 abc", max_new_tokens=3))
    handle.remove()
    n = len(opened.opened.tokenizer("line 3 abc")["input_ids"])
    assert lengths == [n] * 5 + [1] * 10, "the prompt once a member, then a token at a time"


def test_one_cache_for_all_would_be_seen(folders: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    real, kept = module.next_token, []

    def shared(model: Any) -> Any:
        kept[:] = kept or [real(model)]
        return kept[0]

    monkeypatch.setattr(module, "next_token", shared)
    monkeypatch.setattr(module, "stops", lambda *_: frozenset())
    opened = open_ensemble(folders[1])
    found = [said.token for said in tokens(opened, "line 3 abc", max_new_tokens=12)]
    assert found != without_caches(opened, "line 3 abc", 12)


def test_sampling_follows_the_mean_and_its_seed(folders: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "stops", lambda *_: frozenset())
    opened = open_ensemble(folders[1][:2])
    once, again, other = ("".join(stream(opened, "line", max_new_tokens=8, temperature=1.5, seed=seed)) for seed in (1, 1, 2))
    assert once == again != other
    drawn = [next(tokens(opened, "line", max_new_tokens=1, temperature=1.0, seed=seed)).token for seed in range(80)]
    ids = opened.opened.tokenizer("line", return_tensors="pt")["input_ids"]
    p = opened.ensemble.predict(input_ids=ids).log_p[0, -1].exp()
    likely = int(p.argmax())
    assert drawn.count(likely) / 80 == pytest.approx(float(p[likely]), abs=0.17)


def test_said_knows_how_certain_it_was(folders: tuple[str, list[str]]) -> None:
    opened = open_ensemble(folders[1])
    ids = opened.opened.tokenizer("line 1", return_tensors="pt")["input_ids"]
    opinion, said = opened.ensemble.predict(input_ids=ids), next(tokens(opened, "line 1", max_new_tokens=1))
    assert said.entropy == pytest.approx(opinion.entropy[0, -1].item(), rel=1e-4)
    assert said.mutual_information == pytest.approx(opinion.mutual_information[0, -1].item(), rel=1e-3)


def test_pieces_wait_for_a_characters_last_token() -> None:
    from lorakit.data.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    text = "a é 漢 b"
    ids: list[int] = tokenizer(text)["input_ids"]
    made_by: Iterator[str] = pieces(tokenizer, ids)
    found = list(made_by)
    assert "".join(found) == text
    assert len(found) < len(ids)
    assert not any("�" in piece for piece in found)
    assert "".join(pieces(tokenizer, tokenizer("漢")["input_ids"][:2])) == "�"


def test_averaging_logits_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(logits: Any) -> Any:
        mean = torch.stack(list(logits)).mean(0).log_softmax(-1)
        return module.Opinion(mean, mean.sum(-1), mean.sum(-1))

    monkeypatch.setattr(module, "together", wrong)
    with pytest.raises(AssertionError):
        test_it_is_the_mean_of_the_members_probabilities()
