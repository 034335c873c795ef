"""LoraRetriever's acceptance properties (arXiv:2402.09997), and libraries that are not what they say."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from lorakit.adapters.io import load_adapter
from lorakit.core.attach import attach_adapter
from lorakit.core.errors import AdapterMismatch, BadParameter, CheckpointError, Incompatible
from lorakit.data.tiny import tiny_tokenizer
from lorakit.serve.encoder import HiddenMean
from lorakit.serve.generate import stream
from lorakit.serve.library import MANIFEST, VECTORS, WAYS, Library, add, open_library, sample_inputs
from lorakit.serve.open import open_base
from lorakit.serve.shelf import HOW, Choice, Shelf, continued, encoder_for, open_shelf
from tests.laws.subject import everything, same_bits
from tests.serve.values import IDS, alone, equals, far, logits, made, saved, several, tiny_model
from tests.train.runs import model_folder


class Letters:
    """A text's vector: how often each of some letters stands in it. One-hot for a text of one letter."""

    name = "letters"

    def __init__(self, letters: str = "abcd") -> None:
        self.letters = letters

    def encode(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([[float(text.count(c)) for c in self.letters] for text in texts])


def shelf(folder: Path, adapters: dict[str, Any] | None = None) -> Library:
    """Adapter ai for texts of the i-th letter."""
    found = adapters if adapters is not None else several()
    for (name, adapter), letter in zip(found.items(), "abcd", strict=False):
        library = add(folder, name, adapter, [letter, letter * 2], Letters())
    return library


# ---------------------------------------------------------------------------------------------------------------------- what is found
def test_the_right_one_is_found_and_is_itself(tmp_path: Path) -> None:
    library, adapters = shelf(tmp_path), several()
    for i, (name, adapter) in enumerate(adapters.items()):
        query = Letters().encode(["abcd"[i]])
        (hit,) = library.search(query[0], 1)
        assert (hit.name, hit.similarity) == (name, pytest.approx(1.0))
        mixture, g = library.attach(tiny_model("llama"), query, k=3, how="selection")
        with mixture.weighted(g):
            assert far(logits(mixture.adapted.model, IDS), alone(adapter)) < 1e-5


def test_nearest_first_by_the_angle_alone(tmp_path: Path) -> None:
    """An adapter of long texts, whose vector is long, is no nearer for it."""
    add(tmp_path, "long", made(1), ["ab" * 50], Letters())
    library = add(tmp_path, "short", made(2), ["aab"], Letters())
    assert [hit.name for hit in library.search(Letters().encode(["aaaab"])[0], 5)] == ["short", "long"]
    assert [hit.name for hit in library.search(Letters().encode(["ab"])[0])] == ["long", "short"]
    equal = add(tmp_path, "same", made(3), ["aab"], Letters()).search(Letters().encode(["aab"])[0], 2)
    assert [hit.name for hit in equal] == ["short", "same"], "of equals the first that came"


def test_a_vector_is_the_mean_over_the_samples(tmp_path: Path) -> None:
    library = add(tmp_path, "one", made(1), ["aa", "bbbb", "c"], Letters())
    assert (
        library.embeddings.tolist() == [[2 / 3, 4 / 3, 1 / 3, 0.0]]
        or far(library.embeddings, torch.tensor([[2 / 3, 4 / 3, 1 / 3, 0]])) < 1e-6
    )
    assert library.entries[0].samples == 3


def test_one_that_is_left_out_makes_room_for_the_next(tmp_path: Path) -> None:
    library = shelf(tmp_path)
    query = Letters().encode(["aaabbc"])[0]
    assert [hit.name for hit in library.search(query, 2)] == ["a0", "a1"]
    assert [hit.name for hit in library.search(query, 2, without={"a0"})] == ["a1", "a2"]
    assert len(library.search(query, 9)) == 4
    for k, without in ((0, ()), (2, library.names)):
        with pytest.raises(BadParameter, match="expected at least one"):
            library.search(query, k, without=without)


def test_each_query_has_its_own_row_of_weights(tmp_path: Path) -> None:
    library = shelf(tmp_path)
    names, g = library.weights(Letters().encode(["aab", "ccb", "aab"]), 2)
    assert names == ("a0", "a1", "a2"), "what any of them found, and no more"
    assert g.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.5, 0.5, 0.0]]


def test_adding_an_adapter_changes_no_others_vector_or_files(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    encoder, adapters = HiddenMean(model, tokenizer), several()
    first = add(tmp_path, "a0", adapters["a0"], ["some text", "more of it"], encoder)
    files = {p: p.read_bytes() for p in (tmp_path / "a0").iterdir()}
    second = add(tmp_path, "a1", adapters["a1"], ["of quite another kind", "x"], encoder)
    assert same_bits(second.embeddings[:1], first.embeddings)
    assert {p: p.read_bytes() for p in (tmp_path / "a0").iterdir()} == files
    alone_there = add(tmp_path / "other", "a1", adapters["a1"], ["of quite another kind", "x"], encoder)
    assert same_bits(second.embeddings[1:], alone_there.embeddings)
    assert second.entries == open_library(tmp_path).entries


# ------------------------------------------------------------------------------------------------------------------- what it makes
@pytest.mark.parametrize("how", WAYS)
def test_a_batch_says_what_each_sample_says_alone(tmp_path: Path, how: str) -> None:
    library = shelf(tmp_path, equals(4))
    queries = Letters().encode(["aab", "dc", "bbd"])
    mixture, g = library.attach(tiny_model("llama"), queries, 2, how=how)
    with mixture.weighted(g):
        whole = logits(mixture.adapted.model, IDS)
    for i in range(3):
        single, one = library.attach(tiny_model("llama"), queries[i : i + 1], 2, how=how)
        with single.weighted(one):
            assert far(whole[i], logits(single.adapted.model, IDS[i : i + 1])[0]) < 1e-5
        with single.weighted(one):
            assert far(whole[i - 1], logits(single.adapted.model, IDS[i - 1 : i or None])[0]) > 1e-3


@pytest.mark.parametrize("how", WAYS)
def test_for_one_prompt_it_is_a_plain_lora(tmp_path: Path, how: str) -> None:
    library = shelf(tmp_path, equals(4))
    query = Letters().encode(["aabc"])
    mixture, g = library.attach(tiny_model("llama"), query, 3, how=how)
    with mixture.weighted(g):
        want = logits(mixture.adapted.model, IDS)
    exported = library.export([hit.name for hit in library.search(query[0], 3)], how)
    assert far(alone(exported), want) < 1e-5
    assert len(exported.meta["mix"]["sources"]) == (1 if how == "selection" else 3)
    ranks = {len(f.A) for f in exported.factors().values()}
    assert ranks == {6 if how == "mixture" else 2}


def test_of_different_ranks_only_outputs_mix(tmp_path: Path) -> None:
    library = shelf(tmp_path)
    query = Letters().encode(["ab"])
    assert library.attach(tiny_model("llama"), query, 2, how="mixture")
    with pytest.raises(Incompatible, match="mix outputs"):
        library.attach(tiny_model("llama"), query, 2, how="fusion")
    with pytest.raises(BadParameter, match="Did you mean 'mixture'"):
        library.attach(tiny_model("llama"), query, 2, how="mixtures")


# ----------------------------------------------------------------------------------------------------------------------- what does not go
def test_another_encoder_or_base_is_refused(tmp_path: Path) -> None:
    library = shelf(tmp_path)
    other = HiddenMean(tiny_model("llama"), tiny_tokenizer())
    with pytest.raises(AdapterMismatch, match="those of letters, which hidden-mean of"):
        library.encode(other, ["x"])
    with pytest.raises(AdapterMismatch, match="which hidden-mean of"):
        add(tmp_path, "new", made(1), ["x"], other)
    with pytest.raises(AdapterMismatch, match=r"shape \(32,\)"):
        library.search(torch.zeros(32))
    with pytest.raises(BadParameter, match="the query holds NaN"):
        library.search(torch.tensor([1.0, float("nan"), 0.0, 0.0]))
    with pytest.raises(BadParameter, match="0 adapters make nothing"):
        library.export([])
    from tests.laws.subject import attached, awaken, small

    elsewhere = awaken(attached(tiny_model("llama", seed=4), small("lora"))).state()
    with pytest.raises(AdapterMismatch, match="a0 was made for unnamed .* and new for unnamed .*--force"):
        add(tmp_path, "new", elsewhere, ["x"], Letters())
    assert open_library(tmp_path).names == library.names
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "../out", "a/b", "/abs", "a\\b", "x" * 101, "nul\0", "a b", "a\n"])
def test_a_name_is_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadParameter, match="letters, digits"):
        add(tmp_path / "lib", name, made(1), ["a"], Letters())
    assert not (tmp_path / "lib").exists()
    shelf(tmp_path / "lib")
    change(tmp_path / "lib", lambda m: m["entries"][0].update(name=name))
    with pytest.raises(CheckpointError, match=r"entries\.0\.name"):
        open_library(tmp_path / "lib")


def change(folder: Path, how: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    how(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "twice": (lambda m: m["entries"][1].update(name="a0"), "lists 'a0' twice"),
    "path": (lambda m: m["entries"][0].update(path="/etc"), r"entries\.0\.path"),
    "type": (lambda m: m["entries"][0].update(name=7), r"entries\.0\.name"),
    "samples": (lambda m: m["entries"][0].update(samples=0), r"entries\.0\.samples"),
    "none": (lambda m: m.update(entries=[]), "entries"),
    "fewer": (lambda m: m["entries"].pop(), "no `embeddings` of the 3 adapters"),
    "format": (lambda m: m.update(format="other"), "format"),
    "version": (lambda m: m.update(version=9), "upgrade lorakit"),
    "many": (lambda m: m.update(entries=[{"name": f"n{i}", "samples": 1} for i in range(100_001)]), "entries"),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c == "many" else c for c in HOSTILE])
def test_a_manifest_is_read_as_hostile(tmp_path: Path, case: str) -> None:
    shelf(tmp_path)
    how, said = HOSTILE[case]
    change(tmp_path, how)
    with pytest.raises(CheckpointError, match=said):
        open_library(tmp_path)


def test_files_that_are_damaged_or_missing(tmp_path: Path) -> None:
    library = shelf(tmp_path)
    good = (tmp_path / MANIFEST).read_bytes()
    for bad in (b"", b"[", b"[]", b"[" * 10**5, b"\xff"):
        (tmp_path / MANIFEST).write_bytes(bad)
        with pytest.raises(CheckpointError, match="not a library's manifest"):
            open_library(tmp_path)
    (tmp_path / MANIFEST).write_bytes(good)
    for vectors, said in (
        ({"embeddings": torch.full((4, 4), float("nan"))}, "NaN"),
        ({"embeddings": torch.zeros(4, 4, dtype=torch.int64)}, "no `embeddings`"),
        ({"embeddings": torch.zeros(4)}, "no `embeddings`"),
        ({"other": torch.zeros(4, 4)}, "no `embeddings`"),
    ):
        safetensors.torch.save_file(vectors, tmp_path / VECTORS)
        with pytest.raises(CheckpointError, match=said):
            open_library(tmp_path)
    (tmp_path / VECTORS).unlink()
    with pytest.raises(CheckpointError, match=f"no {VECTORS}"):
        open_library(tmp_path)
    with pytest.raises(CheckpointError, match="lorakit library add"):
        open_library(tmp_path / "nowhere")
    with pytest.raises(BadParameter, match="Did you mean 'a0'"):
        library.adapter("a00")


def test_a_link_leads_nowhere(tmp_path: Path) -> None:
    library = shelf(tmp_path / "lib")
    (tmp_path / "lib" / "a0").rename(tmp_path / "outside")
    (tmp_path / "lib" / "a0").symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="leads out of the library"):
        library.adapter("a0")


def test_a_library_may_be_moved(tmp_path: Path) -> None:
    shelf(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    for folder in ("there", "link"):
        assert far(alone(open_library(tmp_path / folder).adapter("a1")), alone(several()["a1"])) < 1e-6


def test_bad_additions(tmp_path: Path) -> None:
    shelf(tmp_path)
    with pytest.raises(BadParameter, match="has an adapter 'a0' already"):
        add(tmp_path, "a0", made(1), ["a"], Letters())
    with pytest.raises(BadParameter, match="no sample input"):
        add(tmp_path, "new", made(1), [], Letters())

    class Broken(Letters):
        def encode(self, texts: Sequence[str]) -> Tensor:
            return torch.full((len(texts), 4), float("nan"))

    with pytest.raises(BadParameter, match="no finite vector"):
        add(tmp_path, "new", made(1), ["a"], Broken())
    assert open_library(tmp_path).names == ("a0", "a1", "a2", "a3")


def test_an_addition_that_dies_leaves_the_library_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.serve import library as module

    shelf(tmp_path, dict(list(several().items())[:2]))

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_files", dies)
    with pytest.raises(KeyboardInterrupt):
        add(tmp_path, "new", made(1), ["a"], Letters())
    monkeypatch.undo()
    assert open_library(tmp_path).names == ("a0", "a1")
    assert add(tmp_path, "new", made(2), ["a"], Letters()).names == ("a0", "a1", "new")


# ------------------------------------------------------------------------------------------------------------------- opened, with its base
@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    root = tmp_path_factory.mktemp("shelf")
    base = model_folder(root / "model")
    encoder = encoder_for(open_base(base), None)
    for i, letter in enumerate("q7#"):
        folder = saved(root / f"a{i}", base, i, r=2, alpha=1.0 + i)
        add(root / "lib", f"a{i}", load_adapter(folder), [letter * 3, letter * 7], encoder)
    return open_shelf(root / "lib")


@pytest.mark.parametrize("how", HOW)
def test_the_base_is_plain_again_whatever_was_said(opened: Shelf, how: str) -> None:
    """Also where nobody waited for the end."""
    model, before = opened.opened.model, everything(opened.opened.model)
    classes = [type(m) for m in model.modules()]
    texts = ["".join(continued(opened, "777", Choice(how, k=2), max_new_tokens=5)) for _ in range(2)]
    assert texts[0] == texts[1]
    started = continued(opened, "777", Choice(how, k=2), max_new_tokens=50, temperature=2.0)
    next(started, None)
    started.close()  # type: ignore[attr-defined]
    assert [type(m) for m in model.modules()] == classes
    assert before.keys() == everything(model).keys()
    assert all(same_bits(before[name], tensor) for name, tensor in everything(model).items())


@pytest.mark.parametrize("how", ["selection", "mixture", "fusion"])
def test_what_is_said_is_what_the_export_says(opened: Shelf, how: str) -> None:
    options = {"max_new_tokens": 8}
    said = "".join(continued(opened, "77q", Choice(how, k=2), **options))
    exported = opened.library.export([hit.name for hit in opened.library.search(opened.query("77q"), 2)], how)
    adapted = attach_adapter(opened.opened.model, exported)
    try:
        assert said == "".join(stream(opened.opened, "77q", **options))
    finally:
        adapted.detach()


@pytest.mark.parametrize("how", ["mixture", "token"])
def test_vectors_of_another_encoder_are_refused_before_anything_is_attached(opened: Shelf, how: str) -> None:
    with pytest.raises(AdapterMismatch, match="which letters cannot be compared with"):
        next(continued(replace(opened, encoder=Letters()), "777", Choice(how)))
    assert not any("lora" in name for name, _ in opened.opened.model.named_modules())


def test_samples_are_inputs_without_answers(tmp_path: Path) -> None:
    rows: dict[str, tuple[list[dict[str, Any]], str]] = {
        "text": ([{"text": f"t{i}"} for i in range(100)], "t"),
        "pair": ([{"prompt": f"p{i}", "completion": "answer"} for i in range(100)], "p"),
        "classify": ([{"text": f"c{i}", "label": "answer"} for i in range(100)], "c"),
        "chat": (
            [{"messages": [{"role": "user", "content": f"u{i}"}, {"role": "assistant", "content": "answer"}]} for i in range(100)],
            "u",
        ),
    }
    for name, (some, letter) in rows.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in some))
        found = sample_inputs(str(file), 8)
        assert len(found) == len(set(found)) == 8
        assert all(text.startswith(letter) and "answer" not in text for text in found)
        assert max(int(text[1:]) for text in found) > 60, "spread over all of it"
    assert len(sample_inputs(str(tmp_path / "text.jsonl"), 1000)) <= 100
