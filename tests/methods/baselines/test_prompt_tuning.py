"""Prompt tuning's acceptance properties (arXiv:2104.08691): prefix tuning's embedding form."""

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lorakit import DataError, Incompatible, NotMergeable, attach, get_method
from lorakit.core.attach import Adapted
from lorakit.data.packable import check_packing
from lorakit.parts.patches import prompt
from lorakit.parts.patches.prompt import Prompt
from lorakit.train.config import make_config
from lorakit.train.evaluate import ALONE
from lorakit.train.metrics import forward_loss
from lorakit.train.train import build
from tests.adapters.test_trajectory_peft import STEPS, TOLERANCE, batches
from tests.adapters.test_trajectory_peft import base as exact_base
from tests.laws.subject import base, batch, far, same_bits, small, subject
from tests.train import runs

N = 4


@torch.no_grad()
def worded(model: nn.Module, words: Tensor) -> Adapted:
    """A model whose prompt is the embeddings of `words`."""
    rows = model.get_input_embeddings()(words)
    adapted = attach(model, get_method("prompt_tuning", tokens=len(words)))
    adapted.shared("default")["prompt"].P.copy_(rows)
    return adapted


def padded() -> Tensor:
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return mask


@torch.no_grad()
def check_words_in_front(arch: str, task: str = "causal-lm") -> None:
    """A prompt of the embeddings of words is those words in front; logits have the text's shape."""
    words, ids = batch(9, rows=1, length=N)[0], batch(length=6)
    whole = torch.cat([words.expand(2, -1), ids], dim=1)
    adapted = worded(base(arch, torch.float64, task=task), words)
    plain = base(arch, torch.float64, task=task)
    for mask in (None, padded()):
        longer = None if mask is None else torch.cat([torch.ones(2, N, dtype=torch.long), mask], dim=1)
        want = plain(input_ids=whole, attention_mask=longer, output_hidden_states=True)
        got = adapted.model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        logits = want.logits[:, N:] if want.logits.ndim == 3 else want.logits
        real = torch.ones(2, 6, dtype=torch.bool) if mask is None else mask.bool()
        assert got.logits.shape == logits.shape
        for ours, theirs in ((got.logits, logits), *zip(got.hidden_states, [h[:, N:] for h in want.hidden_states], strict=True)):
            pairs = (ours[real], theirs[real]) if ours.ndim == 3 else (ours, theirs)
            assert far(*pairs) < 1e-6, (arch, far(*pairs))
    embeds = adapted.model.get_input_embeddings()(ids)
    assert far(adapted.model(inputs_embeds=embeds, attention_mask=mask).logits, got.logits) < 1e-6 or task != "causal-lm"


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt_neox", "gpt2", "bert", "mistral"])
def test_a_prompt_of_words_is_those_words_in_front(arch: str) -> None:
    check_words_in_front(arch)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_classifier_that_reads_the_last_token_is_served_too(arch: str) -> None:
    check_words_in_front(arch, "sequence-classification")


@torch.no_grad()
@pytest.mark.parametrize("arch", ["bert", "roberta"])
def test_a_classifier_that_reads_the_first_token_reads_the_texts_own(arch: str) -> None:
    words, ids = batch(9, rows=1, length=N)[0], batch(length=6)
    adapted = worded(base(arch, torch.float64, task="sequence-classification"), words)
    plain = base(arch, torch.float64, task="sequence-classification")
    body = getattr(plain, arch)
    hidden = body(input_ids=torch.cat([words.expand(2, -1), ids], dim=1)).last_hidden_state[:, N:]
    want = plain.classifier(body.pooler(hidden) if arch == "bert" else hidden)
    assert far(adapted.model(input_ids=ids).logits, want) < 1e-6
    types = torch.ones(2, 6, dtype=torch.long)
    more = {"token_type_ids": types} if arch == "bert" else {}
    assert adapted.model(input_ids=ids, **more).logits.shape == want.shape


@torch.no_grad()
def test_an_encoder_decoder_has_it_in_front_of_its_input_and_attends_to_it() -> None:
    words, ids, target = batch(9, rows=1, length=N)[0], batch(length=6), batch(5, length=5)
    adapted, plain = worded(base("t5", torch.float64), words), base("t5", torch.float64)
    whole = torch.cat([words.expand(2, -1), ids], dim=1)
    for mask in (None, padded()):
        longer = None if mask is None else torch.cat([torch.ones(2, N, dtype=torch.long), mask], dim=1)
        want = plain(input_ids=whole, attention_mask=longer, labels=target)
        got = adapted.model(input_ids=ids, attention_mask=mask, labels=target)
        assert far(got.logits, want.logits) < 1e-6
        assert abs(got.loss - want.loss) < 1e-6
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    a = adapted.model.generate(ids, attention_mask=padded(), **options)
    b = plain.generate(whole, attention_mask=longer, **options)
    assert torch.equal(a, b)


def without_end(self: Prompt, body: nn.Module, args: Any, output: Any) -> Any:
    return type(output)(**{**output, "last_hidden_state": output.last_hidden_state[:, : -len(self.P)]})


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "the mask does not cover the prompt": (prompt, "_covering", lambda mask, total, n: torch.nn.functional.pad(mask, (0, n), value=1)),
    "nothing is cut off": (Prompt, "_leave", lambda self, body, args, output: None),
    "the end is cut off": (Prompt, "_leave", without_end),
}


@pytest.mark.parametrize("what", MUTANTS)
def test_mutants_are_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[what])
    with pytest.raises(AssertionError):
        check_words_in_front("llama")


def test_a_mutant_whose_pooler_reads_the_prompt_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prompt, "_pool", lambda self, pooler, args: args)
    with pytest.raises(AssertionError):
        test_a_classifier_that_reads_the_first_token_reads_the_texts_own("bert")


@pytest.mark.parametrize("arch", ["gpt_neox", "gpt2"])
def test_a_trajectory_is_pefts(arch: str) -> None:
    ours = attach(exact_base(arch), get_method("prompt_tuning", tokens=N))
    P = ours.shared("default")["prompt"].P
    with warnings.catch_warnings(action="ignore"):
        theirs = peft.get_peft_model(exact_base(arch), peft.PromptTuningConfig(num_virtual_tokens=N, task_type="CAUSAL_LM"))
    (weight,) = [p for p in theirs.parameters() if p.requires_grad]
    weight.data = P.detach().double().clone()
    optimizers = [torch.optim.AdamW([p], lr=1e-2, weight_decay=0.01) for p in (P, weight)]
    losses = []
    for ids in batches():
        labels = torch.cat([torch.full_like(ids[:, :1], -100), ids[:, 1:]], dim=1)  # PEFT also predicts the first token, from the prompt
        pair = (ours.model(input_ids=ids, labels=ids).loss, theirs(input_ids=ids, labels=labels).loss)
        for loss, optimizer in zip(pair, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append([loss.item() for loss in pair])
    assert len(losses) == STEPS
    assert max(abs(a - b) for a, b in losses) < TOLERANCE
    assert losses[-1][0] < losses[4][0] - 0.02, "it did train"
    assert far(P.detach(), weight.detach()) < 1e-8


def test_losses_are_those_of_the_text_alone_and_the_head_never_sees_the_prompt() -> None:
    adapted = subject("prompt_tuning")
    rows: list[int] = []
    adapted.model.lm_head.register_forward_hook(lambda m, args, out: rows.append(args[0].flatten(0, -2).shape[0]))
    ids = batch(length=6)
    labels = ids.clone()
    labels[:, :3] = -100
    loss, n = forward_loss(adapted.model, {"input_ids": ids, "labels": labels})
    assert n == 6
    assert rows == [6], "two texts of three targets"
    whole = adapted.model(input_ids=ids, labels=labels).loss
    assert abs(loss.item() / n - whole.item()) < 1e-5


def test_windows_of_several_documents_are_refused_with_the_reason() -> None:
    adapted = subject("prompt_tuning")
    with pytest.raises(DataError, match="in front of one document.*turn packing off"):
        check_packing(adapted.model)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * 2)
    with pytest.raises(Incompatible, match="several"):
        adapted.model(input_ids=batch(), position_ids=positions, use_cache=False)
    adapted.model(input_ids=batch(), position_ids=torch.arange(7).expand(2, -1), use_cache=False)
    subject("prefix", form="layer").model(input_ids=batch(), position_ids=positions, use_cache=False)


def test_the_trainer_pads_unless_packing_was_asked_for(tmp_path: Any) -> None:
    runs.config(tmp_path)
    keys = {"method": "prompt_tuning", "tokens": N, "max_train_samples": 8}
    parts = build(make_config(_plain(tmp_path) | keys), ALONE)
    assert "packed" not in parts.data.train.account
    assert "packed" in build(make_config(_plain(tmp_path) | keys | {"method": "prefix"}), ALONE).data.train.account
    with pytest.raises(DataError, match="in front of one document"):
        build(make_config(_plain(tmp_path) | keys | {"packing": True}), ALONE)


def _plain(folder: Any) -> dict[str, Any]:
    return {"model": str(folder / "model"), "train_data": str(folder / "data.jsonl"), "output_dir": str(folder / "out"), "max_length": 64}


def test_caches_without_room_or_without_the_prompt_are_refused() -> None:
    adapted = subject("prompt_tuning")
    mask = torch.ones_like(batch())
    with pytest.raises(Incompatible, match="preallocated"):
        adapted.model.generate(batch(), attention_mask=mask, max_new_tokens=3, cache_implementation="static")
    with pytest.raises(Incompatible, match="dimensions"):
        adapted.model(input_ids=batch(), attention_mask=torch.ones(2, 1, 7, 7, dtype=torch.bool))
    with adapted.disabled():
        cache = adapted.model(input_ids=batch(), use_cache=True).past_key_values
    longer = torch.ones(2, 8, dtype=torch.long)
    with pytest.raises(Incompatible, match="cropped, or filled"):
        adapted.model(input_ids=batch()[:, :1], attention_mask=longer, past_key_values=cache)
    with pytest.raises(Incompatible, match="get_input_embeddings"):
        attach(nn.ModuleDict({"w": nn.Linear(3, 3)}), get_method("prompt_tuning"))
    with pytest.raises(NotMergeable, match="in front of every input"):
        adapted.merge()


def test_two_prompts_at_once_are_refused_and_the_first_stays() -> None:
    adapted = subject("prompt_tuning")
    want = adapted.model(input_ids=batch()).logits
    adapted.add("other", small("prompt_tuning"), seed=2)
    with pytest.raises(Incompatible, match="two trained prompts"):
        adapted.switch("default", "other")
    assert adapted.active == ("other",)
    assert same_bits(adapted.switch("default").model(input_ids=batch()).logits, want)


@torch.no_grad()
def test_continuing_a_conversation_from_its_cache_is_exact() -> None:
    adapted = subject("prompt_tuning", dtype=torch.float64)
    ids = batch(length=9)
    whole = adapted.model(input_ids=ids).logits
    first = adapted.model(input_ids=ids[:, :4], use_cache=True)
    second = adapted.model(input_ids=ids[:, 4:], past_key_values=copy.deepcopy(first.past_key_values))
    assert far(torch.cat([first.logits, second.logits], dim=1), whole) < 1e-6
    more = {"attention_mask": torch.ones(2, 9), "position_ids": torch.arange(4, 9).expand(2, -1)}
    again = adapted.model(input_ids=ids[:, 4:], past_key_values=first.past_key_values, **more)
    assert far(again.logits, second.logits) < 1e-9


def test_it_starts_from_rows_of_the_vocabulary_and_detaches_without_a_trace() -> None:
    adapted = subject("prompt_tuning", awake=False)
    P, table = adapted.shared("default")["prompt"].P.detach(), adapted.model.get_input_embeddings().weight
    assert all((table == row).all(dim=1).any() for row in P)
    assert 0.4 < attach(base(), small("prompt_tuning", start="normal", std=0.5)).shared("default")["prompt"].P.std() < 0.6
    assert same_bits(adapted.detach()(input_ids=batch()).logits, base()(input_ids=batch()).logits)


def test_it_finds_a_prompt_that_steered_the_teacher() -> None:
    """Planted: the base behind hidden words. With fewer places than words it stays behind."""
    hidden, ids = batch(9, rows=1, length=N)[0], batch(3, rows=8, length=8)
    with torch.no_grad():
        target = worded(base("llama"), hidden).model(input_ids=ids).logits
    left = []
    for tokens in (N, 1):
        ours = attach(base("llama"), get_method("prompt_tuning", tokens=tokens), seed=1)
        (P,) = [p.tensor for p in ours.params()]
        start = (ours.model(input_ids=ids).logits - target).square().mean().item()
        optimizer = torch.optim.AdamW([P], lr=0.05)
        for _ in range(150):
            loss = (ours.model(input_ids=ids).logits - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        left.append(loss.item() / start)
    assert left[0] < 0.5 * left[1], left
    assert left[0] < 0.3, left
