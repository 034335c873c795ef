"""That the parametrized tests really covered methods × laws."""

from pathlib import Path

import pytest

from lorakit import list_methods
from tests.laws.matrix import LAWS, product


def test_methods_times_laws_were_collected(collected: set[tuple[str, str]], files: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    missing_files = {p.name for p in Path(__file__).parent.glob("test_l*.py")} - files
    if missing_files:
        pytest.skip(f"only a part of the laws was asked for (without {', '.join(sorted(missing_files))})")
    with capsys.disabled():
        print(f"\nlaws: {len(collected)} of {len(list_methods())} methods × {len(LAWS)} laws collected")
    assert collected == product()


def test_there_are_laws_and_methods() -> None:
    assert len(LAWS) == 21
    assert len(list_methods()) >= 8
    assert len(product()) >= 8 * 21
