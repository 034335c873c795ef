"""A taste of the fuzzing that tests/fuzz/__main__.py does at length: no traceback, no hang, nothing left behind."""

import random
import tempfile
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorakit.core.errors import DataError
from tests.fuzz.targets import Broken, Target, refused, targets

NAMES = ("configurations", "data files", "adapter folders")


@pytest.fixture(scope="module")
def by_name(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return {target.name: target for target in targets(tmp_path_factory.mktemp("good"))}


def used(target: Target, rng: random.Random) -> bool:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="error"):
        (inside := Path(folder) / "in").mkdir()
        target.write(rng, inside)
        return refused(target, inside)


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_input_is_taken_or_refused_in_one_line(name, by_name):
    @settings(max_examples=100, deadline=5000, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=True))
    def check(rng: random.Random) -> None:
        used(by_name[name], rng)

    check()


@pytest.mark.parametrize("name", NAMES)
def test_many_are_refused_and_some_are_taken(name, by_name):
    """The inputs are neither all harmless nor all broken at the first byte."""
    outcomes = [used(by_name[name], random.Random(i)) for i in range(200)]
    assert 20 <= sum(outcomes) <= 198


class _Wrong(Target):
    name, seeds = "wrong", {}

    def __init__(self, does) -> None:
        self.does = does

    def write(self, rng, folder):
        return None

    def use(self, folder):
        self.does(folder)


def _leaves_a_file(folder: Path) -> None:
    (folder / "partial").touch()
    raise DataError("no")


def _raises_key_error(folder: Path) -> None:
    {}["missing"]


@pytest.mark.parametrize(("does", "error"), [(_leaves_a_file, Broken), (_raises_key_error, KeyError)])
def test_what_a_user_must_not_get_is_seen(does, error):
    with pytest.raises(error):
        used(_Wrong(does), random.Random(0))
