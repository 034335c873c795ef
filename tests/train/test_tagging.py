"""Token classification: whole entities are counted, a head is trained beside the adapter, and the adapter comes back with it."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.core.errors import DataError, Incompatible
from lorakit.data.tiny import tiny_model
from lorakit.serve.open import open_adapter
from lorakit.serve.score import score
from lorakit.train import tagging
from lorakit.train.config import TrainConfig
from lorakit.train.evaluate import ALONE
from lorakit.train.tagging import TagJudge, entities
from lorakit.train.train import train
from tests.cli.typed import run
from tests.train.runs import config, model_folder

BIO = ("B-LOC", "B-PER", "I-LOC", "I-PER", "O")


def tag_file(path: Path, n: int = 60, *, numbers: bool = False) -> str:
    """Names begin with t and go on with s; everything else begins with a. The tokenizer has a token for each of the three after a blank."""
    rng = random.Random(0)
    rows = []
    for _ in range(n):
        tokens, tags = [], []
        for _ in range(rng.randint(2, 4)):
            tokens.append("a" + "".join(rng.choice("bcd") for _ in range(rng.randint(0, 2))))
            tags.append("O")
            for i in range(rng.randint(0, 2)):
                tokens.append(("s" if i else "t") + rng.choice("xyz"))
                tags.append("I-A" if i else "B-A")
        rows.append({"tokens": tokens, "tags": [("O", "B-A", "I-A").index(tag) for tag in tags] if numbers else tags})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def tagged(tmp: Path, **keys: Any) -> TrainConfig:
    keys = {"train_data": tag_file(tmp / "tags.jsonl"), "max_steps": 40, "per_device_train_batch_size": 8, "save_steps": 0, **keys}
    return config(tmp, learning_rate=1e-2, logging_steps=20, **keys)


# --- spans ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("B-PER I-PER O B-LOC", {("PER", 0, 1), ("LOC", 3, 3)}),
        ("B-PER B-PER", {("PER", 0, 0), ("PER", 1, 1)}),
        ("I-PER I-PER I-LOC", {("PER", 0, 1), ("LOC", 2, 2)}),  # IOB1, and a type that changes inside
        ("O I-PER O", {("PER", 1, 1)}),
        ("B-PER I-LOC", {("PER", 0, 0), ("LOC", 1, 1)}),
        ("S-PER B-LOC E-LOC I-LOC", {("PER", 0, 0), ("LOC", 1, 2), ("LOC", 3, 3)}),
        ("U-PER B-LOC I-LOC L-LOC O", {("PER", 0, 0), ("LOC", 1, 3)}),
        ("O O", set()),
        ("B-LOC-X I-LOC-X", {("LOC-X", 0, 1)}),
    ],
)
def test_spans_are_conllevals(tags: str, spans: set[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == spans


class Says(nn.Module):
    """A model that answers what it is told to."""

    def __init__(self, answers: Tensor, classes: int) -> None:
        super().__init__()
        self.logits = 9.0 * nn.functional.one_hot(answers, classes).float()
        self.config = tiny_model("bert", task="token-classification").config

    def can_generate(self) -> bool:
        return False

    def forward(self, input_ids: Tensor) -> Any:
        return type("Out", (), {"logits": self.logits})()


def figures(names: tuple[str, ...], said: list[str], true: list[str | None]) -> dict[str, float]:
    """Of one row; None has no label."""
    number = {name: i for i, name in enumerate(names)}
    labels = torch.tensor([[-100 if t is None else number[t] for t in true]])
    model = Says(torch.tensor([[number[s] for s in said]]), len(names))
    return TagJudge(names)(model, [{"input_ids": labels, "labels": labels}], ALONE, None)


def test_an_entity_is_right_as_a_whole() -> None:
    check_entities()


def check_entities() -> None:
    found = figures(BIO, ["O", "B-PER", "I-PER", "O", "B-LOC", "I-LOC"], ["O", "B-PER", "I-PER", None, "B-LOC", "O"])
    assert found["accuracy"] == 4 / 5
    assert found["entity_f1"] == 1 / 2  # of two entities each, one is the same
    between = figures(BIO, ["B-PER", "O", "I-PER"], ["B-PER", None, "I-PER"])  # what has no label parts no entity
    assert between["entity_f1"] == 1


def test_other_tags_have_the_mean_over_classes() -> None:
    names = ("ADJ", "NOUN", "VERB")
    found = figures(names, ["NOUN", "NOUN", "VERB"], ["NOUN", "VERB", "VERB"])
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert "entity_f1" not in found
    assert not TagJudge(("0", "1")).spans
    assert not TagJudge(("O",)).spans


# --- runs -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_tags_are_learned_and_come_back_with_the_head(tmp_path: Path, arch: str) -> None:
    settings = tagged(tmp_path, model=model_folder(tmp_path / "model", arch))
    result = train(settings, quiet=True)
    assert set(result.final) == {"loss", "accuracy", "entity_f1"}
    assert result.final["entity_f1"] > 0.8
    opened = open_adapter(tmp_path / "out" / "adapter")
    assert type(opened.model).__name__.endswith("ForTokenClassification")
    assert opened.model.config.id2label == {0: "B-A", 1: "I-A", 2: "O"}
    found = score(opened, settings.train_data)  # type: ignore[arg-type]
    assert found == pytest.approx(result.final, abs=1e-6)


def test_numbers_are_tags_too(tmp_path: Path) -> None:
    result = train(tagged(tmp_path, train_data=tag_file(tmp_path / "n.jsonl", numbers=True)), quiet=True)
    assert result.final["macro_f1"] > 0.7


def test_the_command_line_trains_scores_and_merges(tmp_path: Path) -> None:
    settings = tagged(tmp_path, max_steps=10)
    adapter, data = str(tmp_path / "out" / "adapter"), str(settings.train_data)
    train(settings, quiet=True)
    found = json.loads(run("eval", adapter, "--data", data, "--whole", "--json"))
    assert set(found) == {"loss", "accuracy", "entity_f1"}
    assert "merged model" in run("merge", adapter, "--out", str(tmp_path / "merged"))
    from transformers import AutoModelForTokenClassification

    merged = AutoModelForTokenClassification.from_pretrained(tmp_path / "merged")
    opened = open_adapter(adapter)
    ids = torch.arange(5, 25)[None]
    assert torch.allclose(merged(input_ids=ids).logits, opened.model(input_ids=ids).logits, atol=1e-4)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(f'{{"text": "a b {i}"}}\n' for i in range(20)))
    assert "this is a token classifier" in run("eval", adapter, "--data", str(texts), code=2)


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    (note,) = train(tagged(tmp_path, packing=True, max_steps=1), quiet=True).notes
    assert "samples of task=token-classification are padded" in note
    with pytest.raises(Incompatible, match="trains no module whole"):
        train(tagged(tmp_path, method="dfo_lora", output_dir=str(tmp_path / "other")), quiet=True)
    with pytest.raises(DataError, match="task"):
        train(tagged(tmp_path, task="sequence-classification", output_dir=str(tmp_path / "third")), quiet=True)


def _types_do_not_matter(m: pytest.MonkeyPatch) -> None:
    real = tagging.entities
    m.setattr(tagging, "entities", lambda tags: {("", *span[1:2], 0) for span in real(tags)})


def test_mutants_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    _types_do_not_matter(monkeypatch)
    with pytest.raises(AssertionError):
        check_entities()
