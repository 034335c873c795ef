"""`lorakit compress` as a user types it, and the other commands on what it wrote."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from lorakit.adapters.io import load_adapter, save_adapter
from tests.cli.typed import run
from tests.laws.subject import same_bits


def test_compress_says_what_it_saved_and_cost(adapter: Path, tmp_path: Path) -> None:
    before = (adapter / "adapter.safetensors").read_bytes()
    text = run("compress", str(adapter), "--out", str(tmp_path / "small"))
    figures = json.loads(run("compress", str(adapter), "--out", str(tmp_path / "small"), "--json"))
    assert figures["file_bytes"] == (tmp_path / "small" / "adapter.safetensors").stat().st_size < figures["tensor_bytes"] / 4
    assert f"{figures['tensor_bytes']:,} bytes of tensors, {figures['file_bytes']:,} bytes in the file" in text
    assert f"{figures['kept']:,} of {figures['values']:,} values kept (" in text
    assert f"{figures['bits']:.3f} bits a value (entropy {figures['entropy']:.3f})" in text
    assert f"relative error of ΔW: {figures['error']:.3f}" in text
    assert 0 < figures["error"] < 1
    assert (adapter / "adapter.safetensors").read_bytes() == before


def test_every_flag_arrives(adapter: Path, tmp_path: Path) -> None:
    words = ["--density", "0.5", "--alpha", "2", "--scope", "adapter", "--keep", "mean"]
    run("compress", str(adapter), "--out", str(tmp_path / "small"), *words)
    made = json.loads((tmp_path / "small" / "adapter.json").read_text())["meta"]["compressed"]
    digest = made.pop("sha256")
    assert made == {"density": 0.5, "alpha": 2.0, "scope": "adapter", "keep": "mean"}
    assert len(digest) == 32
    assert "compressed: alpha 2.0, density 0.5, keep mean, scope adapter" in run("inspect", str(tmp_path / "small"))
    assert json.loads(run("inspect", str(tmp_path / "small"), "--json"))["compressed"] == made
    assert json.loads(run("inspect", str(adapter), "--json"))["compressed"] is None


def test_sites_that_lose_their_update_are_named(adapter: Path, tmp_path: Path) -> None:
    """A still as it was drawn, of larger values at the one than at the other."""
    read = load_adapter(adapter)
    small = [site.name for site in read.sites if site.d_in == max(site.d_in for site in read.sites)]
    tensors = {k: t * (0.01 if k.endswith(".A") and k.rpartition(".")[0] in small else 1.0) for k, t in read.tensors.items()}
    save_adapter(replace(read, tensors=tensors), tmp_path / "uneven")
    text = run("compress", str(tmp_path / "uneven"), "--out", str(tmp_path / "a"))
    assert f"{len(small)} of {len(read.sites)} sites have no update left ({small[0]}, …)" in text
    assert "--scope tensor has one for each" in text
    assert "no update left" not in run("compress", str(tmp_path / "uneven"), "--out", str(tmp_path / "b"), "--scope", "tensor")
    assert json.loads(run("compress", str(tmp_path / "uneven"), "--out", str(tmp_path / "c"), "--json"))["lost"] == small


def test_the_other_commands_read_what_it_wrote(adapter: Path, tmp_path: Path) -> None:
    small, plain = tmp_path / "small", tmp_path / "plain"
    run("compress", str(adapter), "--out", str(small), "--density", "0.5", "--keep", "mean")
    run("convert", str(small), "--to", "lorakit", "--out", str(plain))
    data = str(adapter.parents[1] / "data.jsonl")
    losses = [json.loads(run("eval", str(folder), "--data", data, "--json"))["loss"] for folder in (small, plain, adapter)]
    assert losses[0] == losses[1] != losses[2]
    assert "q_proj" in run("inspect", str(small))
    assert "verified on" in run("merge", str(small), "--out", str(tmp_path / "merged"))
    run("convert", str(small), "--out", str(tmp_path / "peft"))
    assert run("generate", str(small), "--prompt", "line 1", "--max-new-tokens", "2")


def test_a_peft_folder_is_compressed_too(adapter: Path, tmp_path: Path) -> None:
    run("convert", str(adapter), "--out", str(tmp_path / "peft"))
    for source, out in ((adapter, "a"), (tmp_path / "peft", "b")):
        run("compress", str(source), "--out", str(tmp_path / out))
    a, b = load_adapter(tmp_path / "a"), load_adapter(tmp_path / "b")
    assert all(same_bits(a.tensors[name], b.tensors[name]) for name in a.tensors)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--density", "20"], "density=20.0; expected 0 < density <= 1"),
        (["--density", "0.0001"], "keeps none of the"),
        (["--scope", "site"], "scope='site'; expected adapter, factor, tensor"),
        (["--keep", "sign"], "keep='sign'; expected"),
        (["--alpha", "-1"], "alpha=-1.0; expected a positive factor"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(words: list[str], expected: str, adapter: Path, tmp_path: Path) -> None:
    text = run("compress", str(adapter), "--out", str(tmp_path / "small"), *words, code=2)
    assert expected in text
    assert re.fullmatch("error: .*\n", text)
    assert not (tmp_path / "small").exists()


def test_the_adapter_itself_is_never_overwritten(adapter: Path) -> None:
    before = (adapter / "adapter.safetensors").read_bytes()
    assert "is the adapter itself" in run("compress", str(adapter), "--out", f"{adapter}/../adapter", code=2)
    assert (adapter / "adapter.safetensors").read_bytes() == before
