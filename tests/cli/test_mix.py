"""`lorakit mix`, as a user types it."""

import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lorakit.adapters.io import load_adapter, save_adapter
from lorakit.adapters.mix import MIXERS, mix, mix_into
from lorakit.adapters.mix.spaces import SPACES
from lorakit.adapters.weights import pack
from lorakit.cli import mix as command
from lorakit.cli.main import app
from lorakit.data.tiny import tiny_model
from lorakit.serve.library import WAYS
from lorakit.train.config import BUNDLED
from lorakit.train.source_model import load_model
from lorakit.train.weights import FINDERS
from tests.adapters.mix.values import adapter, close, pair, weight
from tests.adapters.subject import made_by_peft, shaken
from tests.test_readme import blocks, execute


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate("abc"):
        save_adapter(adapter(pair(i)), tmp_path / name)
    return tmp_path


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["mix", *map(str, words)])
    assert result.exit_code == code, (result.output, result.exception)
    return " ".join(result.output.split())


def test_folders_weights_and_options(folder: Path) -> None:
    text = run("--how", "ties", folder / "a", folder / "b", "--weights", 0.7, -0.3, "--density", 0.5, "--out", folder / "out")
    wanted = mix([adapter(pair(0)), adapter(pair(1))], "ties", weights=[0.7, -0.3], density=0.5)
    assert close(weight(load_adapter(folder / "out")), weight(wanted), 1e-6)
    assert "ties of 2 adapters at 1 sites, in delta space" in text
    assert f"cut off: {100 * wanted.meta['mix']['lost']['total']:.2f} % of the norm" in text
    assert json.loads((folder / "out" / "adapter.json").read_text())["meta"]["mix"]["weights"] == [0.7, -0.3]


def test_an_exact_mix_says_so_and_an_inexact_one_too(folder: Path) -> None:
    assert "nothing was cut off" in run(folder / "a", folder / "b", "--out", folder / "exact")
    assert "makes cross terms" in run(folder / "a", folder / "b", "--space", "factor", "--out", folder / "inexact")


def test_into_the_base(tmp_path: Path) -> None:
    """A whole model for plain Transformers, nothing cut off; the base's folder is not touched."""
    base = load_model(BUNDLED)
    made = [shaken(load_model(BUNDLED), "lora", seed=i, r=2, sites="q_proj").state() for i in (1, 2)]
    for name, one in zip("ab", made, strict=True):
        save_adapter(one, tmp_path / name)
    words = ("--how", "ties", tmp_path / "a", tmp_path / "b", "--density", 0.5, "--into-base", "--out", tmp_path / "model")
    assert "does not name its base; give it with --model" in run(*words, code=2)
    text = run(*words, "--model", BUNDLED)
    assert "ties of 2 adapters, written into the weights of bundled; nothing was cut off" in text
    mix_into(base, made, "ties", density=0.5)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).state_dict()
    assert all(torch.equal(W, found[key]) for key, W in base.state_dict().items())
    AutoTokenizer.from_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "mix.json").read_text())["how"] == "ties"
    assert "exists and is not empty" in run(*words, "--model", BUNDLED, code=2)
    assert "leave the space out" in run(*words[:-1], tmp_path / "new", "--space", "core", "--model", BUNDLED, code=2)
    assert not (tmp_path / "new").exists()


def test_a_recipe(folder: Path) -> None:
    (folder / "r.yaml").write_text("of: [a, {how: svd, rank: 2, of: [b, c]}]\nweights: [1, 0.5]\n")
    run("--recipe", folder / "r.yaml", "--out", folder / "out")
    inner = mix([adapter(pair(1)), adapter(pair(2))], "svd", rank=2)
    assert close(weight(load_adapter(folder / "out")), weight(mix([adapter(pair(0)), inner], weights=[1.0, 0.5])), 1e-6)
    assert "a recipe says everything; besides it were given" in run(
        folder / "a", "--recipe", folder / "r.yaml", "--out", folder / "x", code=2
    )


def test_all_mixers_are_listed() -> None:
    text = run("--list")
    assert all(name in text for name in MIXERS)


def test_weights_and_statistics_stand_anywhere(folder: Path) -> None:
    wanted = weight(mix([adapter(pair(0)), adapter(pair(1))], weights=[0.7, -0.3]))
    for words in (
        ["--weights", 0.7, -0.3, folder / "a", folder / "b"],
        [folder / "a", "--weights=[0.7, -0.3]", folder / "b"],
        [folder / "a", folder / "b", "--weights=[0.7, {q_proj: -0.3}]"],
    ):
        run(*words, "--out", folder / "out")
        assert close(weight(load_adapter(folder / "out")), wanted, 1e-6)
    for name in "ab":
        (folder / f"{name}.safetensors").write_bytes(pack({"layers.0.q_proj": torch.eye(10)}))
    run(
        "--how", "regmean", "--stats", folder / "a.safetensors", folder / "b.safetensors", folder / "a", folder / "b", "--out", folder / "r"
    )
    assert close(weight(load_adapter(folder / "r")), weight(mix([adapter(pair(0)), adapter(pair(1))])), 1e-5)


@pytest.mark.parametrize(
    "words", [["--how", "ties"], ["--space", "core"], ["--seed", "1"], ["--weights", "1"], ["--density", "0.5"], ["a"]]
)
def test_nothing_is_typed_beside_a_recipe(folder: Path, words: list[str]) -> None:
    (folder / "r.yaml").write_text("of: [a, b]\n")
    said = "besides it were given: " + (words[0] if words[0] in ("--how", "--space", "--seed") else " ".join(words))
    assert said in run(*words, "--recipe", folder / "r.yaml", "--out", folder / "x", code=2)
    assert not (folder / "x").exists()


def test_a_base_is_read_once_and_only_for_folders_of_peft(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.serve import open as opening

    model, read = tiny_model("llama"), list[str | None]()
    for i in range(2):
        made_by_peft(model, peft.LoraConfig(r=2, target_modules=["q_proj"]), folder / f"p{i}", seed=i)
    monkeypatch.setattr(opening, "base_of", lambda folder, name, needed: read.append(name) or model)
    run(folder / "a", folder / "b", "--model", "base", "--out", folder / "out")
    assert read == []
    run(folder / "p0", folder / "p1", "--model", "base", "--out", folder / "out")
    assert read == ["base"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b"], "where the result goes is missing"),
        (["a", "b", "--weights", "--out", "x"], "--weights is followed by nothing; expected one for each adapter, as in --weights 0.7 0.3"),
        (["--weights", "a", "b", "--out", "x"], "--weights is followed by 'a', which it does not take"),
        (["a", "b", "--weights", "0.7,0.3", "--out", "x"], "--weights is followed by '0.7,0.3', which it does not take"),
        (["a", "b", "--weights=0.7,0.3", "--out", "x"], "--weights ['0.7,0.3']: expected a number for each adapter"),
        (["a", "b", "--weights", "nan", "1", "--out", "x"], "weight nan is not a finite number"),
        (["a", "b", "--weights", "1", "1", "--weights", "2", "2", "--out", "x"], "--weights is given twice"),
        (["a", "b", "--weights=[{k_proj: 1}, 1]", "--out", "x"], "pattern 'k_proj' matches the name of none of the 1 adapted sites"),
        (["a", "b", "--verbose", "--out", "x"], "--verbose has no value"),
        (["a", "b", "--density", "--vote", "total", "--how", "ties", "--out", "x"], "--density has no value"),
        (["a", "b", "--denisty", "0.5", "--how", "ties", "--out", "x"], "Did you mean 'density'"),
        (["a", "b", "--density", "0.5", "--out", "x"], "linear has no option 'density'"),
        (["a", "b", "--weights", "0.5", "--out", "x"], "1 weights for 2 adapters"),
        (["a", "b", "--how", "tis", "--out", "x"], "Did you mean 'ties'"),
        (["a", "b", "--how", "ties", "--density", "-1", "--out", "x"], "density=-1"),
        (["a", "b", "--how", "ties", "--density", "1.5", "--out", "x"], "density=1.5: expected at most 1"),
        (["a", "b", "--how", "svd", "--rank", "-1", "--out", "x"], "svd: rank=-1"),
        (["a", "b", "--how", "slerp", "--space", "delta+svd:0", "--out", "x"], "expected +svd:Q with a rank Q of at least 1"),
        (["a", "b", "--space", "cor", "--out", "x"], "Did you mean 'core'"),
        (["a", "b", "c", "--how", "slerp", "--out", "x"], "slerp goes from one adapter to another; 3 were given"),
        (["a", "b", "--how", "regmean", "--out", "x"], "this mixer needs a gram of every adapter's task: stats holds 0 of 2"),
        (["a", "b", "--how", "regmean", "--stats", "none.safetensors", "--out", "x"], "there are no statistics none.safetensors"),
        (
            ["a", "b", "--how", "ties", "--stats", "s.safetensors", "--out", "x"],
            "ties reads no statistics; --stats is for regmean and fisher",
        ),
        (["a", "b", "--how", "regmean", "--stats", "a", "b", "--out", "x"], "--stats is followed by 'a', which it does not take"),
        (["a", "nowhere", "--out", "x"], "there is no folder"),
        (["a", "r.yaml", "--out", "x"], "r.yaml is a file; give the folder that holds it"),
        (["a", "b", "--recipe", "r.yaml", "--out", "x"], "a recipe says everything; besides it were given: a b"),
        (["--recipe", "none.yaml", "--out", "x"], "there is no recipe none.yaml"),
        (["--recipe", "r.yaml", "--out", "x"], "r.yaml is empty"),
        (["--out", "x"], "no adapter was given"),
        (["a", "b", "--out", ""], "where the result goes is missing"),
        (["a", "b", "--seed", "-1", "--out", "x"], "seed=-1; expected a number from 0 to 2**63 - 1"),
        (["a", "b", "--seed", str(2**63), "--out", "x"], "seed=9223372036854775808; expected a number"),
        (["a", "b", "--progress", "3", "--out", "x"], "linear has no option 'progress'"),
        (
            ["a", "b", "--how", "fisher", "--stats", "nan.safetensors", "nan.safetensors", "--out", "x"],
            "nan.safetensors holds NaN or infinite",
        ),
        (["--recipe", "stats.yaml", "--out", "x"], "linear has no option 'stats'"),
        (["--recipe", "seed.yaml", "--out", "x"], "seed=-1; expected a number"),
        (["--recipe", "inner.yaml", "--out", "x"], "ties: density=2: expected at most 1"),
    ],
)
def test_what_was_typed_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str) -> None:
    monkeypatch.chdir(folder)
    (folder / "r.yaml").write_text("")
    (folder / "stats.yaml").write_text("of: [a]\nstats: [s.safetensors]\n")
    (folder / "seed.yaml").write_text("of: [a, {of: [nowhere], seed: -1}]\n")
    (folder / "inner.yaml").write_text("of: [nowhere, {of: [b], how: ties, density: 2}]\n")
    (folder / "s.safetensors").write_bytes(b"no tensors")
    (folder / "nan.safetensors").write_bytes(pack({"layers.0.q_proj": torch.full((12, 10), math.nan)}))
    assert message in one_line(*words)
    assert not (folder / "x").exists()


def one_line(*words: object) -> str:
    result = CliRunner().invoke(app, ["mix", *map(str, words)])
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == "" and re.fullmatch(r"error: .*\n", result.stderr)
    return result.stderr


def test_a_source_is_never_overwritten(folder: Path) -> None:
    before = (folder / "a" / "adapter.safetensors").read_bytes()
    (folder / "r.yaml").write_text("of: [b, {of: [a, c]}]\n")
    said = "is one of the adapters that are mixed, and would be lost"
    assert said in one_line(folder / "a", folder / "b", "--out", f"{folder}/b/../a")
    assert said in one_line("--recipe", folder / "r.yaml", "--out", folder / "a")
    assert (folder / "a" / "adapter.safetensors").read_bytes() == before


def test_a_result_that_is_there_is_replaced_and_peft_folders_are_not(folder: Path) -> None:
    for w in (1.0, 2.0):
        run(folder / "a", "--weights", w, "--out", folder / "out")
    assert close(weight(load_adapter(folder / "out")), 2 * weight(adapter(pair(0))), 1e-6)
    made_by_peft(tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]), folder / "p")
    before = sorted(path.name for path in (folder / "p").iterdir())
    assert "holds an adapter in PEFT's format; save to another folder" in one_line(folder / "a", "--out", folder / "p")
    assert "is PEFT's and does not say what its modules are: give the model it is for (--model)" in one_line(
        folder / "p", "--out", folder / "x"
    )
    assert sorted(path.name for path in (folder / "p").iterdir()) == before
    assert not (folder / "x").exists()


def test_a_base_that_a_folder_names_and_that_is_not_there(folder: Path) -> None:
    made_by_peft(tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]), folder / "p")
    config = json.loads((folder / "p" / "adapter_config.json").read_text())
    (folder / "p" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "./gone/model"}))
    text = one_line(folder / "p", "--out", folder / "x")
    assert f"{folder / 'p'} names './gone/model' as its base: no model folder at ./gone/model" in text
    assert "or give the base with --model" in text
    assert "or give the base with --model" not in one_line(folder / "p", "--model", "./none", "--out", folder / "x")


@pytest.mark.parametrize("out", ["", "."])
def test_statistics_are_a_file(folder: Path, out: str) -> None:
    result = CliRunner().invoke(app, ["statistics", str(folder / "a"), "--data", "none.jsonl", "--out", out])
    assert result.exit_code == 2
    assert f"error: --out {out!r} is no name of a file; expected a new one, as in --out gram.safetensors" in result.stderr


def broken(folder: Path) -> None:
    f = pair(1)
    f.A[0, 0] = math.nan
    save_adapter(adapter(f), folder)


def of_another_base(folder: Path) -> None:
    save_adapter(adapter(pair(1), meta={"base": {"name": "other", "checkpoint": "b" * 32, "rows": None}}), folder)


def elsewhere(folder: Path) -> None:
    save_adapter(shaken(tiny_model("llama"), "lora", r=2).state(), folder)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "another base": (of_another_base, "adapter 1 was made for one (aaaaaaaaaaaa) and adapter 2 for other (bbbbbbbbbbbb)"),
    "no site in common": (elsewhere, "adapter 1 has no site in common with the others"),
    "another shape": (lambda f: save_adapter(adapter(pair(1, d_out=9)), f), "is linear of 12 × 10 for adapter 1 and linear of 9 × 10"),
    "not finite": (broken, "bad: tensor layers.0.q_proj.A holds NaN or infinite values"),
    "no factors": (lambda f: save_adapter(shaken(tiny_model("llama"), "dora", r=2).state(), f), "--svd-rank R --out FOLDER"),
    "cut off": (lambda f: (f.mkdir(), (f / "adapter.json").write_text("{")), "adapter.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_adapters_that_cannot_be_mixed(folder: Path, case: str) -> None:
    make, said = BAD[case]
    meta = {"base": {"name": "one", "checkpoint": "a" * 32, "rows": None}} if case == "another base" else {}
    save_adapter(adapter(pair(0), meta=meta), folder / "a")
    make(folder / "bad")
    assert said in one_line(folder / "a", folder / "bad", "--out", folder / "x")
    assert not (folder / "x").exists()


@pytest.mark.parametrize("recipe", ["of: [a, {abs}/b]", "of: [sub/../a, ./b]", "of: [{abs}/a, b]\nhow: linear"])
def test_where_a_recipes_folders_are_seen_from(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, recipe: str
) -> None:
    (folder / "sub").mkdir()
    (folder / "r.yaml").write_text(recipe.replace("{abs}", str(folder)))
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    run("--recipe", folder / "r.yaml", "--out", "out")
    assert close(weight(load_adapter("out")), weight(mix([adapter(pair(0)), adapter(pair(1))])), 1e-6)


def test_a_recipe_that_holds_itself(folder: Path) -> None:
    (folder / "r.yaml").write_text("&all {of: [a, *all]}\n")
    assert "mixes are nested more than 16 deep" in one_line("--recipe", folder / "r.yaml", "--out", folder / "x")


# ---------------------------------------------------------------------------------------------------------------- docs/mixing.md
PAGE = (Path(__file__).parents[2] / "docs" / "mixing.md").read_text(encoding="utf-8")


def test_the_page_names_everything_that_is_registered() -> None:
    assert [
        name for name in (*MIXERS, *SPACES, *FINDERS, *WAYS, *command.SEVERAL) if f"`{name}`" not in PAGE and f"--{name}" not in PAGE
    ] == []


def test_every_block_of_the_page_is_marked() -> None:
    assert len(re.findall(r"^```(?:bash|python)$", PAGE, flags=re.MULTILINE)) == len(blocks(PAGE)) > 10


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process, as each command's own would load torch some forty times."""
    monkeypatch.chdir(tmp_path)
    for block in blocks(PAGE):
        if block.language == "python":
            exec(compile(block.code, "docs/mixing.md", "exec"), {})
        elif "<<" in block.code:
            execute("bash", "-euo", "pipefail", "-c", block.code, cwd=tmp_path)
        else:
            for _, *words in filter(None, (shlex.split(line, comments=True) for line in block.code.splitlines())):
                result = CliRunner().invoke(app, words)
                assert result.exit_code == 0, (words, result.output, result.exception)
