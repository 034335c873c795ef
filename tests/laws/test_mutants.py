"""Every law catches its mutants."""

import pytest

from tests.laws.matrix import LAWS
from tests.laws.mutants import MUTANTS, Mutant, forgetful_processes


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if not m.slow], ids=lambda m: f"{m.law}: {m.what} ({m.method})")
def test_is_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as m:
        mutant.change(m)
        with pytest.raises(AssertionError):
            mutant.check(mutant.method)


@pytest.mark.slow
def test_processes_that_forget_to_reduce_are_caught() -> None:
    with pytest.raises(AssertionError, match="different adapters"):
        forgetful_processes()


def test_every_law_has_a_mutant() -> None:
    assert {m.law for m in MUTANTS} == set(LAWS)
