"""`lorakit presets`, as typed."""

from lorakit.train.preset import FOLDER
from tests.cli.typed import run


def test_list_and_print() -> None:
    listed = run("presets")
    assert all(file.stem in listed for file in FOLDER.glob("*.yaml"))
    assert run("presets", "qwen2") == (FOLDER / "qwen2.yaml").read_text()
    assert "Did you mean 'gemma'" in run("presets", "gema", code=2)
