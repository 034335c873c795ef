"""A finished adapter on its model: opened, scored, generated with, merged and proven."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lorakit.core.errors import AdapterMismatch, BadParameter, CheckpointError, NotMergeable
from lorakit.core.method import list_methods
from lorakit.serve.generate import complete, stream_chat
from lorakit.serve.merge import logits, merge, probes
from lorakit.serve.open import open_adapter
from lorakit.serve.score import score
from lorakit.train.train import train
from tests.train.runs import class_file, config, model_folder


def trained(tmp: Path, **keys: object) -> Path:
    """A tiny adapter that really changed something."""
    settings = config(tmp, **{"learning_rate": 5e-2, "max_steps": 8, "save_steps": 0, "lr_scheduler_type": "constant"} | keys)  # type: ignore[arg-type]
    train(settings, quiet=True)
    return Path(settings.output_dir) / "adapter"


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("method", list_methods())
def test_merged_model_loads_plainly_and_says_the_same(tmp_path: Path, method: str) -> None:
    more: dict[str, object] = {"experts": 2} if method in ("loramoe", "xlora") else {}
    folder = trained(tmp_path, method=method, **more, **({"r": 4} if method == "adalora" else {}))
    before = files(tmp_path / "model") | files(folder)
    if method == "bitfit" or config(tmp_path, method=method, **more).build_method().beyond is not None:  # no bias to merge into
        with pytest.raises(NotMergeable, match="keep the adapter attached"):
            merge(folder, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
        return
    verdict = merge(folder, tmp_path / "merged")
    assert verdict is not None
    assert verdict.ok
    assert verdict.max_abs_diff < 1e-3
    assert abs(verdict.perplexity_change) < 1e-4
    assert files(tmp_path / "model") | files(folder) == before, "merging touched its input"
    opened = open_adapter(folder)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        for ids in probes(opened):
            assert torch.allclose(logits(plain, ids), logits(opened.model, ids), atol=1e-3)
            with opened.adapted.disabled():  # type: ignore[union-attr]
                assert not torch.allclose(logits(plain, ids), logits(opened.model, ids), atol=1e-2)


def test_tied_embeddings_are_untied_by_merging(tmp_path: Path) -> None:
    model_folder(tmp_path / "model", tied=True)
    folder = trained(tmp_path, sites=["embed_tokens", "q_proj"])
    verdict = merge(folder, tmp_path / "merged")
    assert verdict is not None
    assert verdict.ok
    assert any("unties" in note for note in verdict.notes)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not torch.equal(plain.get_input_embeddings().weight, plain.get_output_embeddings().weight)


def test_bf16_target_reports_rounding(tmp_path: Path) -> None:
    verdict = merge(trained(tmp_path), tmp_path / "merged", dtype="bfloat16")
    assert verdict is not None
    assert verdict.ok
    assert 0 < verdict.target_max_abs_diff <= verdict.tolerance + 2 * verdict.rounding
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.bfloat16


def test_over_the_tolerance_nothing_is_written(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    with pytest.raises(NotMergeable, match="tolerance 1e-12"):
        merge(folder, tmp_path / "merged", tolerance=1e-12)
    assert [p.name for p in tmp_path.iterdir() if "merged" in p.name] == []


def test_a_wrong_merge_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: a merge that forgets one site."""
    from lorakit.core.attach import Adapted

    real = Adapted.merge

    def forgets(self: Adapted) -> torch.nn.Module:
        model = real(self)
        self.branches(next(iter(self.methods)))[0].host.restore_()
        return model

    folder = trained(tmp_path)
    monkeypatch.setattr(Adapted, "merge", forgets)
    with pytest.raises(NotMergeable):
        merge(folder, tmp_path / "merged")


def test_merging_into_a_folder_with_files_is_refused(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "precious").write_text("x")
    with pytest.raises(CheckpointError, match="not empty"):
        merge(folder, tmp_path / "merged")


def test_a_classifier_merges_and_scores(tmp_path: Path) -> None:
    data = class_file(tmp_path / "classes.jsonl")
    folder = trained(tmp_path, train_data=data, max_steps=40, learning_rate=1e-2)
    figures = score(open_adapter(folder), data, whole=True)
    assert figures["accuracy"] > 0.9
    assert merge(folder, tmp_path / "merged").ok  # type: ignore[union-attr]
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").config.id2label == {0: "a", 1: "z"}


def test_exact_match_of_memorized_answers(tmp_path: Path) -> None:
    rows = [{"prompt": f"{c}=", "completion": c * 2} for c in "abcd"] * 12
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    folder = trained(
        tmp_path, train_data=str(data), eval_data=str(data), max_steps=60, learning_rate=2e-2, r=8, per_device_train_batch_size=8
    )
    assert score(open_adapter(folder), str(data), whole=True, limit=4, exact=True)["exact_match"] >= 0.75


def test_generation_streams_and_is_deterministic(tmp_path: Path) -> None:
    opened = open_adapter(trained(tmp_path))
    once, again = (complete(opened, "line 3", max_new_tokens=8) for _ in range(2))
    assert once == again
    assert list(stream_chat(opened, [{"role": "user", "content": "hi"}], max_new_tokens=4))


def test_another_base_is_refused_with_both_names(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    other, wider = model_folder(tmp_path / "other", seed=1), model_folder(tmp_path / "wider", hidden_size=64)
    with pytest.raises(AdapterMismatch, match=r"trained on model \(\w+\), but this model is other \(\w+\); .*--force"):
        open_adapter(folder, model=other)
    assert open_adapter(folder, model=other, force=True).adapted is not None
    with pytest.raises(AdapterMismatch, match="a base of other shapes"):
        open_adapter(folder, model=wider, force=True)


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadParameter, match="no model folder"):
        open_adapter(trained(tmp_path), model="./gone/model")
