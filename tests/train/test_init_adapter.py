"""A run that goes on from a saved adapter: where it starts, what it takes over, what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from lorakit.adapters.digest import digest
from lorakit.adapters.io import load_adapter, save_adapter
from lorakit.adapters.mix import mix
from lorakit.adapters.peft_files import SIDE
from lorakit.adapters.peft_write import to_peft
from lorakit.cli.main import app
from lorakit.core.errors import AdapterMismatch, BadParameter, CheckpointError, Incompatible
from lorakit.core.events import Step
from lorakit.core.method import get_method, list_methods
from lorakit.train.checkpoint import checkpoints
from lorakit.train.config import TrainConfig, make_config
from lorakit.train.evaluate import ALONE
from lorakit.train.run import Run
from lorakit.train.source_model import load_model, load_tokenizer
from lorakit.train.train import build, train
from lorakit.train.weights import few_shots, init_from_mixture
from tests.laws.subject import same_bits
from tests.train.runs import class_file, config, model_folder, stopped, text_file

OWN: dict[str, dict[str, Any]] = {
    "lora": {"r": 3, "alpha": 5.0, "sites": ["q_proj", "mlp"], "dropout": 0.1},
    "adalora": {"r": 4, "target_r": 2, "tfinal": 1},
    "relora": {"period": 2, "warmup": 1},
    "bitfit": {"model": "gpt2"},
    "l_lora": {"start": "random"},
    "lora+loraplus": {"ratio": 4.0},
}
"""What a method is given besides, so that there is something to take over."""
FRESH = {"increlora"}
"""Those that only ever begin afresh."""
FEW = ("lora", "dora", "pissa")


def first(tmp: Path, method: str = "lora", **keys: Any) -> Path:
    """The folder of an adapter that was trained a little."""
    if keys.get("model") == "gpt2":
        keys["model"] = model_folder(tmp / "gpt2", "gpt2")
    out = tmp / "first"
    train(config(tmp, method=method, output_dir=str(out), **keys), quiet=True)
    return out / "adapter"


def onward(tmp: Path, start: str | Path, **keys: Any) -> TrainConfig:
    """A run that starts from an adapter; nothing of a method is typed."""
    found = config(tmp, output_dir=str(tmp / "onward"))
    plain = {k: v for k, v in found.model_dump(exclude_unset=True).items() if k not in ("method", "method_args")}
    return make_config(plain | {"init_adapter": str(start)} | keys)


def held(settings: TrainConfig) -> dict[str, Tensor]:
    """What a run's adapter holds before its first step."""
    return build(settings, ALONE).adapted.tensors("default")


# ------------------------------------------------------------------------------------------------------------------ where it starts
def methods() -> list[Any]:
    names = sorted({*list_methods(), *OWN} - FRESH)
    return [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("method", methods())
def test_before_the_first_step_it_is_the_adapter(tmp_path: Path, method: str) -> None:
    """Its tensors, bit by bit; its method and every parameter; what it says, also once its controllers have begun. Its steps are steps."""
    keys = {"learning_rate": 3e-2}
    start = first(tmp_path, method, **keys | OWN.get(method, {}))
    saved = load_adapter(start)
    settings = onward(tmp_path, start, **keys | ({"model": str(tmp_path / "gpt2")} if method == "bitfit" else {}))
    parts = build(settings, ALONE)
    tensors = parts.adapted.tensors("default")
    assert tensors.keys() == saved.tensors.keys()
    assert all(same_bits(t.cpu(), saved.tensors[k]) for k, t in tensors.items())
    run = Run(parts.adapted, parts.data, parts.config, ALONE, out=None, quiet=True)
    for controller in run.controllers:
        controller.start()
        controller.before_task(run.task)
        controller.before_forward(Step(0, run.total))
    assert run.evaluate()["loss"] == pytest.approx(saved.meta["metrics"]["loss"], rel=1e-6)
    result = train(settings, quiet=True)
    trained = load_adapter(tmp_path / "onward" / "adapter")
    assert trained.recipe == saved.recipe and result.method == method
    assert {s.name for s in trained.sites} == {s.name for s in saved.sites}
    assert digest(trained.tensors) != digest(saved.tensors)


@pytest.mark.parametrize("method", sorted(FRESH))
def test_a_method_that_only_begins_afresh_says_what_can_be_trained_on(tmp_path: Path, method: str) -> None:
    start = first(tmp_path, method)
    with pytest.raises(Incompatible, match=rf"{method} works on ranks .*`lorakit mix .* --weights 1 --out FOLDER`"):
        build(onward(tmp_path, start), ALONE)
    assert CliRunner().invoke(app, ["mix", str(start), "--weights", "1", "--out", str(tmp_path / "plain")]).exit_code == 0
    parts = build(onward(tmp_path, tmp_path / "plain"), ALONE)
    run = Run(parts.adapted, parts.data, parts.config, ALONE, out=None, quiet=True)
    assert run.evaluate()["loss"] == pytest.approx(load_adapter(start).meta["metrics"]["loss"], rel=1e-5)


@pytest.mark.slow
def test_training_goes_on_at_its_loss(tmp_path: Path) -> None:
    keys = {"max_steps": 30, "learning_rate": 3e-2, "save_steps": 0, "eval_data": text_file(tmp_path / "eval.jsonl")}
    before = train(config(tmp_path, output_dir=str(tmp_path / "first"), **keys), quiet=True)
    settings = onward(tmp_path, tmp_path / "first" / "adapter", **keys | {"learning_rate": 3e-3})
    parts = build(settings, ALONE)
    run = Run(parts.adapted, parts.data, parts.config, ALONE, out=None, quiet=True)
    assert run.evaluate() == pytest.approx(before.final, rel=1e-6)
    assert not run.optimizer.state, "the optimizer starts afresh"
    fresh = build(config(tmp_path, **keys), ALONE)
    nothing = Run(fresh.adapted, fresh.data, fresh.config, ALONE, out=None, quiet=True).evaluate()
    assert before.final["loss"] < nothing["loss"] - 0.3
    after = train(settings, quiet=True)
    assert after.final["loss"] < before.final["loss"] - 0.02
    rows = [json.loads(line) for line in (tmp_path / "onward" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] < nothing["loss"] - 0.2, "the very first steps are near its loss, too"
    assert rows[0]["step"] == 2


def test_the_adapter_itself_stays_as_it_was(tmp_path: Path) -> None:
    start = first(tmp_path)
    files = {p.name: p.read_bytes() for p in start.iterdir()}
    train(onward(tmp_path, start), quiet=True)
    assert {p.name: p.read_bytes() for p in start.iterdir()} == files


def test_a_mixture_is_trained_on(tmp_path: Path) -> None:
    """What `lorakit mix` writes, of adapters of two tasks; what it was made of is still known."""
    folders = []
    for i, word in enumerate(("red ", "blue ")):
        data = tmp_path / f"{i}.jsonl"
        data.write_text("".join(json.dumps({"text": word * (3 + n % 5)}) + "\n" for n in range(20)))
        train(config(tmp_path, train_data=str(data), output_dir=str(tmp_path / f"run{i}"), seed=i, learning_rate=5e-2), quiet=True)
        folders.append(tmp_path / f"run{i}" / "adapter")
    both = mix([load_adapter(folder) for folder in folders], weights=[0.5, 0.5])
    save_adapter(both, tmp_path / "both")
    data = str(tmp_path / "0.jsonl")
    settings = onward(tmp_path, tmp_path / "both", train_data=data, learning_rate=1e-2)
    parts = build(settings, ALONE)
    start = Run(parts.adapted, parts.data, parts.config, ALONE, out=None, quiet=True).evaluate()["loss"]
    result = train(settings, quiet=True)
    assert result.final["loss"] < start
    made = load_adapter(tmp_path / "onward" / "adapter")
    assert {len(f.A) for f in made.factors().values()} == {4}, "2 + 2, as it was"
    assert made.meta["init_adapter"]["mix"]["weights"] == [0.5, 0.5]
    assert made.meta["init_adapter"]["sha256"] == digest(both.tensors)
    assert "mix" not in made.meta, "it is none itself"


def test_a_start_from_a_searched_mixture_is_trained_on(tmp_path: Path) -> None:
    data, name = text_file(tmp_path / "data.jsonl"), model_folder(tmp_path / "model")
    folders = [first(tmp_path / str(i), model=name, train_data=data, seed=i, learning_rate=5e-2) for i in range(2)]
    model, tokenizer = load_model(str(tmp_path / "model")), load_tokenizer(str(tmp_path / "model"))
    rows = [{"text": "line 3 " + "abc de " * 5}, {"text": "line 9 " + "abc de " * 8}]
    made = init_from_mixture(model, [load_adapter(f) for f in folders], few_shots(model, tokenizer, rows), how="nnls", rank=3)
    assert made.helps
    save_adapter(made.adapter, tmp_path / "start")
    settings = onward(tmp_path, tmp_path / "start")
    assert all(same_bits(t, made.adapter.tensors[k]) for k, t in held(settings).items())
    parts = build(settings, ALONE)
    batches = list(few_shots(model, tokenizer, rows)(parts.adapted.model))
    assert sum(loss.item() for loss, _ in batches) / sum(n for _, n in batches) == pytest.approx(made.loss, rel=1e-4)
    train(settings, quiet=True)
    done = load_adapter(tmp_path / "onward" / "adapter")
    assert {len(f.A) for f in done.factors().values()} == {3}
    assert done.meta["init_adapter"]["start"] == made.adapter.meta["start"]


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_a_peft_folder_is_a_start_too(tmp_path: Path, method: str) -> None:
    """One that PEFT wrote, without lorakit's file beside it: its method is read from its configuration."""
    start = first(tmp_path, method, r=3, alpha=5.0, sites=["q_proj", "down_proj"])
    saved = load_adapter(start)
    to_peft(saved, tmp_path / "peft", model=load_model(str(tmp_path / "model")))
    (tmp_path / "peft" / SIDE).unlink()
    settings = onward(tmp_path, tmp_path / "peft")
    assert all(torch.equal(t, saved.tensors[k]) for k, t in held(settings).items())
    assert train(settings, quiet=True).method == method
    named = onward(tmp_path, tmp_path / "peft", method=method, output_dir=str(tmp_path / "named"))
    assert held(named).keys() == saved.tensors.keys()
    with pytest.raises(BadParameter, match=f"was made by method={method}, and method=vera was given"):
        build(onward(tmp_path, tmp_path / "peft", method="vera"), ALONE)


# ----------------------------------------------------------------------------------------------------------------- what is typed beside
def test_what_says_how_it_is_trained_may_be_given_anew(tmp_path: Path) -> None:
    start = first(tmp_path, "lora+loraplus", r=3, ratio=4.0)
    saved = load_adapter(start)
    settings = onward(tmp_path, start, method="lora+loraplus", ratio=8.0, dropout=0.2, r=3)
    parts = build(settings, ALONE)
    assert all(same_bits(t, saved.tensors[k]) for k, t in parts.adapted.tensors("default").items())
    method = parts.adapted.methods["default"]
    assert {b.delta.p for b in parts.adapted.branches()} == {0.2}
    assert method.optim == get_method("lora+loraplus", ratio=8.0).optim != get_method("lora+loraplus", ratio=4.0).optim
    assert parts.adapted.state().recipe.kwargs == saved.recipe.kwargs | {"ratio": 8.0, "dropout": 0.2}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"method": "dora"}, "was made by method=lora, and method=dora was given; leave it out to go on with lora"),
        ({"method": "lora", "r": 8}, "was made with r=3, and r=8 was given; leave it out"),
        ({"r": 8}, "was made with r=3, and r=8 was given"),
        ({"alpha": 1.0}, r"was made with alpha=5.0, and alpha=1.0 was given"),
        ({"sites": "v_proj"}, "was made with sites='q_proj', and sites='v_proj' was given"),
        ({"rank_pattern": {"q_proj": 2}}, "was made with rank_pattern=None"),
        ({"unfreeze": ["norm"]}, r"was made with unfreeze=\(\)"),
    ],
)
def test_what_says_what_it_is_stays_its_own(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    start = first(tmp_path, r=3, alpha=5.0, sites="q_proj", max_steps=1)
    assert held(onward(tmp_path, start, method="lora", r=3, alpha=5, sites="q_proj")), "the same may be typed again"
    with pytest.raises(BadParameter, match=message):
        build(onward(tmp_path, start, **keys), ALONE)


def test_a_parameter_that_its_method_lacks(tmp_path: Path) -> None:
    start = first(tmp_path, "bitfit", model="gpt2", max_steps=1)
    with pytest.raises(BadParameter, match="method 'bitfit' has no parameter 'alpha'"):
        build(onward(tmp_path, start, model=str(tmp_path / "gpt2"), alpha=3.0), ALONE)


TEMPLATE = "{% for m in messages %}{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant> {% endif %}"


def test_its_chat_template_goes_with_it(tmp_path: Path) -> None:
    start = first(tmp_path, chat_template=TEMPLATE, max_steps=1)
    assert build(onward(tmp_path, start), ALONE).tokenizer.chat_template == TEMPLATE
    assert build(onward(tmp_path, start, chat_template=TEMPLATE + "x"), ALONE).tokenizer.chat_template == TEMPLATE + "x"


# ------------------------------------------------------------------------------------------------------------------------- classifiers
@pytest.mark.slow
def test_a_classifier_begins_with_an_adapter_of_texts_and_a_fresh_head(tmp_path: Path) -> None:
    start = first(tmp_path)
    saved = load_adapter(start)
    settings = onward(tmp_path, start, train_data=class_file(tmp_path / "classes.jsonl"), max_steps=20, learning_rate=3e-2, seed=4)
    tensors = held(settings)
    assert all(same_bits(tensors[k], v) for k, v in saved.tensors.items())
    fresh = held(config(tmp_path, train_data=str(tmp_path / "classes.jsonl"), seed=4))
    assert same_bits(tensors["unfrozen.score.weight"], fresh["unfrozen.score.weight"])
    result = train(settings, quiet=True)
    assert result.final["accuracy"] > 0.9
    done = load_adapter(tmp_path / "onward" / "adapter")
    assert not torch.equal(done.tensors["unfrozen.score.weight"], tensors["unfrozen.score.weight"])
    assert done.recipe.kwargs["unfreeze"] == ("score",)


def test_a_classifier_goes_on_with_its_head_and_its_classes(tmp_path: Path) -> None:
    data = class_file(tmp_path / "classes.jsonl")
    start = first(tmp_path, train_data=data)
    saved = load_adapter(start)
    tensors = held(onward(tmp_path, start, train_data=data, seed=9))
    assert "unfrozen.score.weight" in tensors and all(same_bits(t, saved.tensors[k]) for k, t in tensors.items())
    other = tmp_path / "other.jsonl"
    other.write_text(Path(data).read_text().replace('"label": "z"', '"label": "b"'))
    with pytest.raises(AdapterMismatch, match=r"predicts the classes \['a', 'z'\], and the data holds the classes \['a', 'b'\]"):
        build(onward(tmp_path, start, train_data=str(other)), ALONE)
    with pytest.raises(AdapterMismatch, match=r"predicts the classes \['a', 'z'\], and the data holds texts"):
        build(onward(tmp_path, start), ALONE)


def test_whole_parts_of_its_own_stay_beside_the_fresh_head(tmp_path: Path) -> None:
    start = first(tmp_path, unfreeze=("model.norm",))
    settings = onward(tmp_path, start, train_data=class_file(tmp_path / "classes.jsonl"))
    tensors = held(settings)
    assert same_bits(tensors["unfrozen.model.norm.weight"], load_adapter(start).tensors["unfrozen.model.norm.weight"])
    assert "unfrozen.score.weight" in tensors


def test_a_method_without_whole_modules_cannot_train_the_head(tmp_path: Path) -> None:
    start = first(tmp_path, "dfo_lora", population=4, d=8, max_steps=1)
    with pytest.raises(Incompatible, match="dfo_lora trains no module whole"):
        build(onward(tmp_path, start, train_data=class_file(tmp_path / "classes.jsonl")), ALONE)


# -------------------------------------------------------------------------------------------------------------------- killed and resumed
@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "adalora", "relora", "eva"])
def test_a_run_cut_in_two_ends_with_the_same_bytes(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start = first(tmp_path, method, **OWN.get(method, {}) | {"dropout": 0.1})
    keys = {"max_steps": 7, "save_steps": 3}
    train(onward(tmp_path, start, output_dir=str(tmp_path / "whole"), **keys), quiet=True)
    cut = {"output_dir": str(tmp_path / "cut"), **keys}
    stopped(onward(tmp_path, start, **cut), 5, monkeypatch)
    train(onward(tmp_path, start, resume="auto", **cut), quiet=True)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name / "adapter").iterdir()} for name in ("whole", "cut"))
    assert one == two


@pytest.mark.parametrize("at", [1, 5])
def test_another_start_is_not_resumed(tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first checkpoint, and after it: another folder, none, other tensors in the same folder, another scale."""
    start, keys = first(tmp_path), {"max_steps": 7, "save_steps": 3}
    stopped(onward(tmp_path, start, **keys), at, monkeypatch)
    assert bool(checkpoints(tmp_path / "onward")) == (at == 5)
    shutil.copytree(start, tmp_path / "copy")
    with pytest.raises(BadParameter, match="cannot resume .*: init_adapter was '.*first/adapter' and is now '.*copy'"):
        train(onward(tmp_path, tmp_path / "copy", resume="auto", **keys), quiet=True)
    without = {k: v for k, v in onward(tmp_path, start, resume="auto", **keys).model_dump().items() if k != "init_adapter"}
    with pytest.raises(BadParameter, match="cannot resume .*: init_adapter was '.*first/adapter' and is now None"):
        train(TrainConfig(**without), quiet=True)
    whole = load_adapter(start)
    for changed in (
        {"tensors": {k: v + 1e-6 for k, v in whole.tensors.items()}},
        {"recipe": get_method("lora", **whole.recipe.kwargs | {"alpha": 99.0}).recipe},
    ):
        shutil.rmtree(start)
        save_adapter(type(whole)(**vars(whole) | changed), start)
        with pytest.raises(BadParameter, match="first/adapter is not the adapter any more that the run began with"):
            train(onward(tmp_path, start, resume="auto", **keys), quiet=True)
    shutil.rmtree(start)
    with pytest.raises(CheckpointError, match="there is no folder"):
        train(onward(tmp_path, start, resume="auto", **keys), quiet=True)
    (tmp_path / "copy").rename(start)
    assert train(onward(tmp_path, start, resume="auto", **keys), quiet=True).steps == 7


def test_a_run_that_began_fresh_does_not_take_a_start_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = first(tmp_path)
    keys = {"max_steps": 7, "save_steps": 3}
    plain = config(tmp_path, output_dir=str(tmp_path / "onward"), **keys)
    stopped(plain, 5, monkeypatch)
    with pytest.raises(BadParameter, match="init_adapter was None and is now"):
        train(onward(tmp_path, start, resume="auto", **keys), quiet=True)


def test_a_finished_run_returns_at_once(tmp_path: Path) -> None:
    start = first(tmp_path)
    done = train(onward(tmp_path, start), quiet=True)
    shutil.rmtree(start)
    assert train(onward(tmp_path, start, resume="auto"), quiet=True) == done


# ---------------------------------------------------------------------------------------------------------------------- what it says
def test_where_it_came_from_is_kept(tmp_path: Path) -> None:
    start = first(tmp_path)
    train(onward(tmp_path, start), quiet=True)
    saved, made = load_adapter(start), load_adapter(tmp_path / "onward" / "adapter")
    found = made.meta["init_adapter"]
    assert (found["folder"], found["method"], found["sha256"]) == (str(start), "lora", digest(saved.tensors))
    assert found["train_data"] == saved.meta["train_data"] and found["data_hash"] == saved.meta["data_hash"]
    assert made.meta["metrics"] != saved.meta["metrics"]
    third = onward(tmp_path, tmp_path / "onward" / "adapter", output_dir=str(tmp_path / "third"))
    train(third, quiet=True)
    chain = load_adapter(tmp_path / "third" / "adapter").meta["init_adapter"]
    assert chain["init_adapter"] == found
    assert json.loads((tmp_path / "third" / "run.json").read_text())["init_adapter"]["sha256"] == digest(made.tensors)
    assert "init_adapter" not in saved.meta


@pytest.mark.slow
def test_the_command_line(tmp_path: Path) -> None:
    start = first(tmp_path, "dora", r=3, alpha=5.0)
    words = ["train", "--init-adapter", str(start), "--model", str(tmp_path / "model"), "--train-data", str(tmp_path / "data.jsonl")]
    words += ["--output-dir", str(tmp_path / "cli"), "--max-steps", "1", "--max-length", "64", "--quiet"]
    preview = CliRunner().invoke(app, [*words, "--dry-run"])
    assert preview.exit_code == 0, preview.output
    assert "method: dora" in preview.output and "r: 3" in preview.output and not (tmp_path / "cli").exists()
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and done.output.startswith("dora on "), done.output
    again = CliRunner().invoke(app, [*words, "--resume", "auto"])
    assert again.output.startswith("dora on ")
    wrong = CliRunner().invoke(app, [*words, "--method", "lora", "--output-dir", str(tmp_path / "new")])
    assert wrong.exit_code == 2 and wrong.output.startswith("error: init_adapter ") and wrong.output.count("\n") == 1
    assert "init_adapter" in CliRunner().invoke(app, ["train", "--keys"]).output


# ------------------------------------------------------------------------------------------------------------------------- bad starts
def test_another_base_is_refused_by_both_names(tmp_path: Path) -> None:
    start = first(tmp_path)
    other = model_folder(tmp_path / "other", seed=1)
    with pytest.raises(AdapterMismatch, match=r"was trained on model \(.*\), and this model is other \(.*\)") as error:
        build(onward(tmp_path, start, model=other), ALONE)
    assert str(error.value).endswith(f"train on the same base (model={tmp_path / 'model'})")


def test_a_base_of_other_shapes(tmp_path: Path) -> None:
    """Also of an adapter that does not say which base it is for."""
    start = first(tmp_path)
    whole = load_adapter(start)
    save_adapter(type(whole)(**vars(whole) | {"meta": {}}), tmp_path / "silent")
    narrow = model_folder(tmp_path / "narrow", intermediate_size=48)
    with pytest.raises(AdapterMismatch, match="made for a base of other shapes"):
        build(onward(tmp_path, tmp_path / "silent", model=narrow), ALONE)
    assert held(onward(tmp_path, tmp_path / "silent")).keys() == whole.tensors.keys()


def test_folders_that_hold_none(tmp_path: Path) -> None:
    start = first(tmp_path)
    for folder, message in (
        (tmp_path / "nowhere", "there is no folder"),
        (tmp_path / "first", "holds no adapter.*there is one in .*first/adapter"),
        (start / "adapter.json", "is a file; give the folder"),
    ):
        with pytest.raises(CheckpointError, match=message):
            build(onward(tmp_path, folder), ALONE)
        assert not (tmp_path / "onward" / "run.json").exists(), "the folder is still free"
    whole = load_adapter(start)
    broken = {k: torch.full_like(v, float("nan")) for k, v in whole.tensors.items()}
    save_adapter(type(whole)(**vars(whole) | {"tensors": broken}), tmp_path / "broken")
    with pytest.raises(AdapterMismatch, match="NaN"):
        build(onward(tmp_path, tmp_path / "broken"), ALONE)
