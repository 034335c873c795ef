"""Which way imports point, between the rooms of the package (docs/house.md), and what may be imported at the top of a module."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "src/lorakit"
MAY_IMPORT = {
    "core": {"ops"},
    "ops": set(),
    "parts": {"core", "ops"},
    "methods": {"core", "ops", "parts"},
    "adapters": {"core", "ops"},
    "data": {"core"},
    "train": {"core", "ops", "parts", "adapters", "data"},
    "serve": {"core", "ops", "parts", "adapters", "data", "train"},
    "apps": {"core", "ops", "parts", "adapters", "data", "train", "serve"},
    "cli": {"core", "ops", "parts", "adapters", "data", "train", "serve", "apps"},
}
LAZILY = {("core", "adapters"): {"attach.py"}}  # Adapted.save and load are there for the user's ease; nothing else in core knows files
EXTRAS = {"matplotlib", "datasets", "sklearn", "peft", "pytest", "hypothesis", "jaxtyping", "mkdocs"}


class Import(NamedTuple):
    """One import statement: the file, the module it names, and whether it runs when the file is imported."""

    file: Path
    module: str
    at_top: bool

    @property
    def room(self) -> str:
        """The room of the importing file; "" for the package's own __init__."""
        parts = self.file.relative_to(PACKAGE).parts
        return parts[0] if len(parts) > 1 else ""

    def __str__(self) -> str:
        return f"{self.file.relative_to(PACKAGE)} imports {self.module}"


def imports() -> list[Import]:
    """Every import in the package but those for type checkers only."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        deferred = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
        for node in running(tree):
            found += [Import(file, module, id(node) not in deferred) for module in modules(node)]
    return found


def running(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node outside `if TYPE_CHECKING`."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from running(child)


def modules(node: ast.AST) -> list[str]:
    """The modules that an import statement names; `from lorakit.cli import page` names lorakit.cli.page."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


IMPORTS = imports()


def test_every_room_has_its_arrows():
    rooms = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert rooms == set(MAY_IMPORT), "a new room says here what it may import"


def test_arrows_point_one_way():
    """MAY_IMPORT has no cycle, or it would hold nothing."""
    open_, done = dict(MAY_IMPORT), set()
    while open_:
        free = {room for room, needs in open_.items() if needs <= done}
        assert free, f"a cycle among {sorted(open_)}"
        done |= free
        open_ = {room: needs for room, needs in open_.items() if room not in free}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_lies_below(room):
    for each in IMPORTS:
        top, _, rest = each.module.partition(".")
        if each.room != room or top != "lorakit":
            continue
        other = rest.split(".")[0]
        lazily = not each.at_top and each.file.name in LAZILY.get((room, other), ())
        assert other == room or other in MAY_IMPORT[room] or lazily, str(each)


def test_only_discovery_imports_methods():
    """Methods compose each other; everybody else asks the registry."""
    assert not [str(i) for i in IMPORTS if i.module.startswith("lorakit.methods") and i.room != "methods"]


def test_extras_are_imported_where_they_are_used():
    assert not [str(i) for i in IMPORTS if i.at_top and i.module.split(".")[0] in EXTRAS]


def test_the_walk_sees_imports():
    """So that none of the above passes on an empty list."""
    assert any(i.room == "methods" and i.module.startswith("lorakit.parts.") and i.at_top for i in IMPORTS)
    assert any(i.room == "core" and i.module.startswith("lorakit.adapters.") and not i.at_top for i in IMPORTS)
