"""`lorakit export`, `convert` and `inspect` of files, as a user types them; docs/formats.md runs."""

import json
import re
import shlex
from pathlib import Path

import gguf
import pytest
import torch
from typer.testing import CliRunner

from lorakit.adapters.gguf import ARCHITECTURES
from lorakit.adapters.io import load_adapter
from lorakit.adapters.kohya import KNOWN
from lorakit.cli.main import app
from lorakit.train.source_model import load_model
from tests.adapters.lycoris.make import HERE, base, clip
from tests.adapters.subject import shaken, tiny_model
from tests.cli.typed import run
from tests.test_readme import blocks

PAGE = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "m"
    base("loha").save_pretrained(folder)
    return str(folder)


def test_a_file_is_inspected_without_and_with_its_model(model: str) -> None:
    path = str(HERE / "glora.safetensors")
    rows = json.loads(run("inspect", path, "--json"))["modules"]
    assert [row["algorithm"] for row in rows] == ["glora"] * 3
    assert [row["norm"] for row in rows] == [None] * 3
    rows = json.loads(run("inspect", path, "--model", model, "--json"))["modules"]
    assert all(row["norm"] > 0 for row in rows)
    assert "model.layers.0.mlp.down_proj" in run("inspect", path, "--model", model)


def test_a_file_is_converted_exactly_or_cut(model: str, tmp_path: Path) -> None:
    text = run("convert", str(HERE / "loha.safetensors"), "--model", model, "--to", "lorakit", "--out", str(tmp_path / "a"))
    assert "lora, exact" in text
    exact = load_adapter(tmp_path / "a")
    assert exact.meta["model"] == model
    text = run("convert", str(tmp_path / "a"), "--to", "lorakit", "--rank", "2", "--out", str(tmp_path / "b"))
    cut = load_adapter(tmp_path / "b")
    total = 0.0
    for site, one in exact.deltas().items():
        error = ((one.weight() - cut.deltas()[site].weight()).norm() / one.weight().norm()).item()
        assert f"{site}: relative error {error:.2e}" in text
        assert cut.meta["cut"]["errors"][site] == pytest.approx(error, abs=1e-6)
        total += float((one.weight() - cut.deltas()[site].weight()).square().sum())
    whole = sum(float(one.weight().square().sum()) for one in exact.deltas().values())
    assert cut.meta["cut"]["error"] == pytest.approx((total / whole) ** 0.5, abs=1e-6)
    text = run("convert", str(HERE / "full.safetensors"), "--rank", "1", "--out", str(tmp_path / "c"), code=2)
    assert "give it (--model)" in text


def test_of_an_encoder(tmp_path: Path) -> None:
    clip().save_pretrained(tmp_path / "clip")
    run("convert", str(HERE / "clip.safetensors"), "--model", str(tmp_path / "clip"), "--out", str(tmp_path / "peft"))
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 2


def test_plain_in_both_formats(tmp_path: Path) -> None:
    shaken(tiny_model("llama"), "pissa", sites=["q_proj"], r=2).save(tmp_path / "a")
    assert "lora, exact" in run("convert", str(tmp_path / "a"), "--plain", "--to", "lorakit", "--out", str(tmp_path / "b"))
    one, other = (load_adapter(tmp_path / name).deltas() for name in "ab")
    torch.testing.assert_close(next(iter(other.values())).weight(), next(iter(one.values())).weight())
    assert "in total: relative error" in run("convert", str(tmp_path / "a"), "--rank", "1", "--out", str(tmp_path / "c"))


def test_what_rescales_its_base_is_cut_beside_the_one_that_it_names(model: str, tmp_path: Path) -> None:
    adapter = shaken(load_model(model), "dora", sites=["q_proj"], r=2)
    adapter.meta["model"] = model
    adapter.save(tmp_path / "a")
    assert "in total: relative error" in run("convert", str(tmp_path / "a"), "--rank", "4", "--out", str(tmp_path / "b"))
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["base_model_name_or_path"] == model


def test_three_exports(model: str, tmp_path: Path) -> None:
    run("convert", str(HERE / "loha.safetensors"), "--model", model, "--to", "lorakit", "--out", str(tmp_path / "a"))
    assert "GGUF LoRA for llama" in run("export", str(tmp_path / "a"), "--to", "gguf", "--out", str(tmp_path / "x.gguf"))
    assert len(gguf.GGUFReader(tmp_path / "x.gguf").tensors) == 6
    assert "LORA, exact" in run("export", str(tmp_path / "a"), "--to", "peft", "--out", str(tmp_path / "peft"))
    theirs = run("convert", str(tmp_path / "a"), "--to", "peft", "--out", str(tmp_path / "peft2"))
    assert "LORA, exact" in theirs
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "peft" / name).read_bytes() == (tmp_path / "peft2" / name).read_bytes()


def test_merged_is_what_merge_writes(adapter: Path, tmp_path: Path) -> None:
    assert "verified on" in run("export", str(adapter), "--to", "merged", "--out", str(tmp_path / "a"))
    assert "verified on" in run("merge", str(adapter), "--out", str(tmp_path / "b"))
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["convert", "x.pt", "--out", "o"], "is a pickle, which can run code when it is opened"),
        (["convert", "LOHA", "--rank", "0", "--out", "o"], "rank=0; expected at least 1"),
        (["convert", "LOHA", "--energy", "2", "--out", "o"], "expected 0 < energy <= 1"),
        (["convert", "LOHA", "--only", "lora_te", "--out", "o"], "name begins with 'lora_te'; they begin with lycoris_model"),
        (["convert", "LOHA", "--out", "."], "exists and is not empty; give another --out"),
        (["convert", "LOHA", "--rank", "2", "--svd-rank", "2", "--out", "o"], "leave out svd_rank and compact"),
        (["inspect", "LOHA", "--plot", "p.png"], "makes one of a file"),
        (["export", "LOHA", "--to", "ggml", "--out", "o"], "--to 'ggml' cannot be written. Did you mean 'gguf'"),
        (["export", "LOHA", "--to", "gguf", "--out", "o"], "does not name its base"),
        (["export", "LOHA", "--to", "gguf", "--dtype", "int8", "--model", "MODEL", "--out", "o"], "expected float32 or float16"),
        (["export", "LOHA", "--to", "merged", "--rank", "2", "--out", "o"], "takes the adapter as it is, uncut"),
        (["export", "LOHA", "--to", "peft", "--dtype", "float16", "--out", "o"], "--dtype is for merged and gguf"),
        (["export", "LOHA", "--to", "peft", "--force", "--out", "o"], "--force is for --to merged"),
        (["export", "OFT", "--to", "peft", "--out", "o"], "is of OFT or BOFT"),
        (["eval", "LOHA", "--data", "x"], "does not name its base; give it with --model"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_leave_nothing(
    words: list[str], said: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pt").write_bytes(b"PK\x03\x04")
    named = {"LOHA": str(HERE / "loha.safetensors"), "OFT": str(HERE / "oft.safetensors"), "MODEL": model}
    text = run(*[named.get(word, word) for word in words], code=2)
    assert said in text
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


# --------------------------------------------------------------------------------------------------------------- docs/formats.md
def test_the_page_names_every_architecture_and_kind_of_tensor() -> None:
    assert [name for name in ARCHITECTURES if f"`{name}`" not in PAGE] == []
    roots = {key.split(".")[0].split("_")[0] for key in KNOWN}
    assert [root for root in roots if root not in PAGE] == []


def test_every_block_of_the_page_is_marked() -> None:
    assert len(re.findall(r"^```(?:bash|python)$", PAGE, flags=re.MULTILINE)) == len(blocks(PAGE)) == 5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(PAGE):
        if block.language == "python":
            exec(compile(block.code, "docs/formats.md", "exec"), {})
        else:
            for _, *words in filter(None, (shlex.split(line, comments=True) for line in block.code.splitlines())):
                result = CliRunner().invoke(app, words)
                assert result.exit_code == 0, (words, result.output, result.exception)
