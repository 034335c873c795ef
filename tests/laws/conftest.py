"""Records which (law, method) pairs were collected, before anything is deselected, and lets the count run last."""

import re

import pytest

COLLECTED: set[tuple[str, str]] = set()
FILES: set[str] = set()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        law = re.match(r"test_(L\d+)", item.name)
        if law and isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            COLLECTED.add((law[1], item.callspec.params["name"]))
            FILES.add(item.path.name)


@pytest.fixture
def collected() -> set[tuple[str, str]]:
    return COLLECTED


@pytest.fixture
def files() -> set[str]:
    return FILES
