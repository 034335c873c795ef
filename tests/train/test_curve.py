"""The drawn curve."""

import sys
from pathlib import Path

import pytest

from lorakit.core.errors import DataError, MissingExtra
from lorakit.train.curve import draw_curve

ROWS = [
    {"step": 1, "loss": 3.0, "learning_rate": 0.0},
    {"step": 2, "loss": 2.0, "learning_rate": 1e-3},
    {"step": 2, "eval_loss": 2.2},
    {"step": 3, "loss": None, "learning_rate": 5e-4},
]


def test_the_curve_is_a_png_and_pyplot_stays_out_of_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sys.modules.pop("matplotlib.pyplot", None)
    png = draw_curve(ROWS, tmp_path / "new" / "curve.png")
    first = png.read_bytes()
    assert first.startswith(b"\x89PNG")
    assert draw_curve(iter(ROWS), png).read_bytes() == first
    assert "matplotlib.pyplot" not in sys.modules
    assert [p.name for p in png.parent.iterdir()] == ["curve.png"]


def test_rows_without_any_loss_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(DataError, match="nothing to draw"):
        draw_curve([{"step": 1, "learning_rate": 0.1}], tmp_path / "curve.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"pip install 'lorakit\[plot\]'"):
        draw_curve(ROWS, tmp_path / "curve.png")
